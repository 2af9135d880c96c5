"""A folder that any server of static files serves: the exported file, ONNX Runtime Web, and a page for pictures, videos
and the camera, which gives the same answers as `compress serve`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from deploy.core.card import METADATA_KEY, ModelCard, parse_card
from deploy.core.errors import UserError
from deploy.core.onnx_scan import scan_onnx
from deploy.targets.web_runtime import PIECES, VERSION, runtime_files

ABOUT = "model.json"
"""What the folder was written with: {"format", "model", "runtime", "files", "card"}. It marks a folder as ours."""
FORMAT = "compress web 1"
SHARED = ("style.css", "view.js")
"""Files of the server's page."""


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    card = _card_for_web(source)
    _need_place(place)
    pieces = runtime_files()
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.absolute().parent))
    try:
        _write(temporary, source, card, pieces)
        temporary.chmod(0o755)
        _swap(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / 1e6
    return (
        f"{size:.1f} MB, {source.stat().st_size / 1e6:.1f} of them the model; look at it with "
        f"`python -m http.server --directory {shlex.quote(str(place))}`"
    )


# --- details --------------------------------------------------------------------------------------------


def _card_for_web(source: Path) -> ModelCard:
    facts = scan_onnx(source)
    card = parse_card(facts.metadata.get(METADATA_KEY), str(source))
    if facts.external:
        raise UserError(f"{source}: has its weights in {facts.external[0]}; a page takes one file")
    if card.form.heads is not None:
        raise UserError(f"{source}: is a network alone; the page does not decode: give the file that it was cut from")
    if card.form.batch not in (None, 1):
        raise UserError(f"{source}: has {card.form.in_words()}; a page detects in one picture at a time")
    return card


def _need_place(place: Path) -> None:
    """Raise UserError unless the folder may be written: it is not there, is empty, or holds what was written here."""
    try:
        place.absolute().parent.mkdir(parents=True, exist_ok=True)
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        known = set(about["files"]) if about["format"] == FORMAT else set()
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--out: {place} cannot be a folder: {error.strerror}") from error
    except PermissionError as error:
        raise UserError(f"--out: {place}: {error.strerror}") from error
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    there = {str(path.relative_to(place).as_posix()) for path in place.rglob("*") if not path.is_dir()}
    if not known or there - known:
        what = f"holds {min(there - known)}, which is not what" if known else "is there, and is nothing that"
        raise UserError(f"--out: {place} {what} this command wrote; give another folder or remove it")


def _write(folder: Path, source: Path, card: ModelCard, pieces: Path) -> None:
    """Fill a folder."""
    page = resources.files("deploy") / "targets" / "web_page"
    shared = resources.files("deploy") / "serve" / "page"
    files: dict[str, Path | Traversable] = {
        item.name: item for item in page.iterdir() if item.name.endswith((".js", ".html"))
    }
    files |= {name: shared / name for name in SHARED}
    files |= {f"runtime/{name}": pieces / name for name in PIECES}
    files |= {"runtime/LICENSE": page / "LICENSE.runtime", "model.onnx": source}
    (folder / "runtime").mkdir()
    for name, file in files.items():
        (folder / name).write_bytes(file.read_bytes())
    readme = (page / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(readme.format(name=card.name, model="model.onnx", version=VERSION), "utf-8")
    about = {
        "format": FORMAT,
        "model": "model.onnx",
        "runtime": VERSION,
        "files": sorted([*files, "README.md", ABOUT]),
        "card": card.model_dump(mode="json"),
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _swap(temporary: Path, place: Path) -> None:
    """Rename to `place`; what was there goes away after that."""
    if not place.exists():
        os.rename(temporary, place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.absolute().parent))
    os.rename(place, old / "old")
    os.rename(temporary, place)
    shutil.rmtree(old, ignore_errors=True)
