"""ONNX Runtime Web, which a page needs: where its files come from, and that they are the ones that were tested.

It is an npm package of a hundred megabytes, of which five files are taken. They are kept in the user's
cache, to which they come from a folder that the user names, or by `npm pack`. Wherever they come from, each must have
the hash below.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from deploy.core.errors import UserError, first_line
from deploy.core.files import atomic_path

NAME, VERSION = "onnxruntime-web", "1.30.0"
CACHE = Path.home() / ".cache" / "compress" / NAME


@dataclass(frozen=True)
class Piece:
    """A file of the package: where it is there, its SHA-256, and whether pages get it packed with gzip."""

    source: str
    sha256: str
    packed: bool = False


PIECES = {
    "ort.js": Piece("dist/ort.webgpu.min.mjs", "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0"),
    "jspi.js": Piece(
        "dist/ort-wasm-simd-threaded.jspi.mjs", "270e2c6da9f297239d301d329782b6446641cb1e16a77967690adcfca35f3268"
    ),
    "jspi.wasm.gz": Piece(
        "dist/ort-wasm-simd-threaded.jspi.wasm",
        "a54c76f86b0f0d9572380cf1c6292a7b3903716ffcbcd6b0e5c7050bf430eb93",
        packed=True,
    ),
    "plain.js": Piece(
        "dist/ort-wasm-simd-threaded.mjs", "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b"
    ),
    "plain.wasm.gz": Piece(
        "dist/ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
        packed=True,
    ),
}
"""Name in a page's `runtime/` → file of the package. A new version is a new number above and new hashes here. `ort.js`
is named after another build, and drives both of these: of the package's own two for them, it lacks a check and file
names. Modules are named .js, since not every server knows .mjs as a script."""


def runtime_files() -> Path:
    """The folder with `PIECES` under their names, checked: that of the cache, which is filled where it is not.

    Raises UserError, one line: there is no npm, or it cannot fetch; files that are not the ones tested.
    """
    folder = CACHE / VERSION
    if not all(_is_tested(folder / name, piece) for name, piece in PIECES.items()):
        with tempfile.TemporaryDirectory() as place:
            _fill(folder, _download(Path(place)), f"{NAME}@{VERSION} as npm gave it")
    return folder


def keep_runtime(given: Path) -> None:
    """Fill the cache from the package, unpacked, or from a folder with it inside.

    Raises UserError, one line: there is none, another version, files that are not the ones tested.
    """
    _fill(CACHE / VERSION, _package_in(given), f"--web-runtime: {given}")


# --- details --------------------------------------------------------------------------------------------


def _package_in(given: Path) -> Path:
    places = [given, given / "package", given / NAME, given / "node_modules" / NAME]
    found = next((place for place in places if (place / "package.json").is_file() and _name(place)[0] == NAME), None)
    if found is None:
        raise UserError(f"--web-runtime: {given} holds no {NAME}; give the package, unpacked, or a node_modules folder")
    version = _name(found)[1]
    if version != VERSION:
        raise UserError(f"--web-runtime: {found} is {NAME} {version}; {VERSION} is needed")
    return found


def _name(package: Path) -> tuple[str, str]:
    try:
        content = json.loads((package / "package.json").read_text(encoding="utf-8"))
        return str(content["name"]), str(content["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def _download(place: Path) -> Path:
    """`npm pack` into a folder, unpacked there."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"--for: web needs {NAME} {VERSION}, and there is no npm here to fetch it: run `npm pack {NAME}@{VERSION}` "
            "elsewhere, unpack it, and give the folder as --web-runtime"
        )
    ran = subprocess.run(
        [npm, "pack", f"{NAME}@{VERSION}", "--loglevel=error"], cwd=place, capture_output=True, text=True, check=False
    )
    archives = list(place.glob("*.tgz"))
    if ran.returncode or len(archives) != 1:
        said = first_line(RuntimeError(ran.stderr.strip() or ran.stdout.strip() or "it says nothing"))
        raise UserError(f"--for: web: npm could not fetch {NAME}@{VERSION}: {said}; or give it as --web-runtime")
    with tarfile.open(archives[0]) as archive:
        for piece in PIECES.values():
            try:
                content = archive.extractfile(f"package/{piece.source}")
            except KeyError:
                content = None
            if content is None:
                raise UserError(f"--for: web: {NAME}@{VERSION} as npm gave it has no {piece.source}")
            target = place / "package" / piece.source
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
    return place / "package"


def _fill(folder: Path, package: Path, where: str) -> None:
    """Bring the pieces of a package into the cache, checked and packed."""
    for name, piece in PIECES.items():
        try:
            content = (package / piece.source).read_bytes()
        except OSError as error:
            raise UserError(f"{where}: {piece.source}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != piece.sha256:
            raise UserError(f"{where}: {piece.source} is not that of {NAME} {VERSION}: its hash is another one")
        if not _is_tested(folder / name, piece):
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(gzip.compress(content, 9, mtime=0) if piece.packed else content)


def _is_tested(path: Path, piece: Piece) -> bool:
    try:
        content = path.read_bytes()
        return hashlib.sha256(gzip.decompress(content) if piece.packed else content).hexdigest() == piece.sha256
    except (OSError, EOFError, zlib.error):  # not there, or no gzip; cut off; broken
        return False
