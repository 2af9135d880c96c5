"""The folder of `--for web`: what is in it, when it is refused, where its runtime comes from, and its scripts in Node
against Python. The page itself: test_web_page.py."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from deploy.core.canvas import letterbox, to_original
from deploy.core.card import Form, Heads, ModelCard, card_from_file
from deploy.core.errors import UserError
from deploy.core.image import decode_oriented
from deploy.targets import web, web_runtime
from deploy.targets.table import TARGETS, place_for
from tests.helpers.encoded_pictures import encode, kinds
from tests.helpers.red_rectangle_model import CARD, picture, write_red_model
from tests.helpers.web_package import fake_package, name_package

PAGE = Path(web.__file__).parent / "web_page"
NODE = shutil.which("node")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_package(tmp_path, monkeypatch)


@pytest.fixture
def red(tmp_path: Path) -> Path:
    return _red(tmp_path / "red.onnx")


def _red(path: Path, **changes: Any) -> Path:
    write_red_model(path, card=CARD.model_copy(update=changes))
    return path


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ the folder


def test_what_is_in_it(package: Path, red: Path, tmp_path: Path) -> None:
    web_runtime.keep_runtime(package)
    place = tmp_path / "red.web"
    said = TARGETS["web"].make(red, place)
    assert "http.server --directory" in said and "red.web" in said
    about = json.loads((place / "model.json").read_text())
    assert set(about["files"]) == _files(place) and about["runtime"] == web_runtime.VERSION
    assert ModelCard.model_validate(about["card"]) == card_from_file(red) == card_from_file(place / about["model"])
    for name, piece in web_runtime.PIECES.items():
        content = (place / "runtime" / name).read_bytes()
        assert (gzip.decompress(content) if piece.packed else content) == f"content of {piece.source}".encode()
    readme = (place / "README.md").read_text()
    assert web_runtime.VERSION in readme and "{" not in readme.split("import")[0]
    assert place.stat().st_mode & 0o055 == 0o055, "a server of another user reads it"
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_ours_is_replaced_and_nobody_elses(package: Path, red: Path, tmp_path: Path) -> None:
    web_runtime.keep_runtime(package)
    place = tmp_path / "site"
    place.mkdir()
    web.make(red, place)
    web.make(_red(tmp_path / "b.onnx", name="second"), place)
    assert json.loads((place / "model.json").read_text())["card"]["name"] == "second"
    (place / "notes.txt").write_text("mine")
    before = _files(place)
    with pytest.raises(UserError, match=r"site holds notes.txt, which is not what this command wrote"):
        web.make(red, place)
    assert _files(place) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.json").write_text('{"format": 3}')
    with pytest.raises(UserError, match="other is there, and is nothing that this command wrote; give"):
        web.make(red, tmp_path / "other")
    for below in (red, red / "site"):
        with pytest.raises(UserError, match="cannot be a folder"):
            web.make(red, below)
    assert (tmp_path / "other" / "model.json").read_text() == '{"format": 3}'


def test_nothing_is_left_of_one_that_failed(
    package: Path, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web_runtime.keep_runtime(package)
    place = tmp_path / "red.web"
    web.make(red, place)
    before, there = _files(place), set(tmp_path.iterdir())
    monkeypatch.setattr(web, "SHARED", ("no-such-file.css",))
    with pytest.raises(FileNotFoundError):
        web.make(red, place)
    assert _files(place) == before and set(tmp_path.iterdir()) == there


def test_files_that_no_page_can_take(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "x.web"
    for changes, message in (
        (
            {"form": Form(batch=1, images="float32", heads=Heads(strides=[8], bins=1))},
            "is a network alone; the page does not decode",
        ),
        ({"form": Form(batch=4)}, "has a fixed batch of 4; a page detects in one picture at a time"),
    ):
        with pytest.raises(UserError, match=message):
            web.make(_red(tmp_path / "x.onnx", **changes), place)
    facts = web.scan_onnx(_red(tmp_path / "x.onnx"))
    facts.external.append("x.data")
    monkeypatch.setattr(web, "scan_onnx", lambda path: facts)
    with pytest.raises(UserError, match=r"x.onnx: has its weights in x.data; a page takes one file"):
        web.make(tmp_path / "x.onnx", place)
    assert not place.exists()


def test_the_place(tmp_path: Path) -> None:
    assert place_for(Path("a/student.int8.onnx"), "web") == Path("a/student.int8.web")
    assert place_for(Path("a.onnx"), "web", tmp_path / "site") == tmp_path / "site"


# ------------------------------------------------------------------------------------------------ the runtime


def test_where_the_runtime_is_looked_for(package: Path, tmp_path: Path) -> None:
    modules = tmp_path / "project" / "node_modules"
    modules.mkdir(parents=True)
    package.rename(modules / web_runtime.NAME)
    for given in (modules, modules.parent, modules / web_runtime.NAME):
        shutil.rmtree(web_runtime.CACHE, ignore_errors=True)
        web_runtime.keep_runtime(given)
        assert {path.name for path in web_runtime.runtime_files().iterdir()} == set(web_runtime.PIECES)
    name_package(modules / web_runtime.NAME, "1.2.3")
    with pytest.raises(UserError, match=r"node_modules/onnxruntime-web is onnxruntime-web 1.2.3; 1.30.0 is needed"):
        web_runtime.keep_runtime(modules)
    with pytest.raises(UserError, match=r"--web-runtime: .*bin holds no onnxruntime-web; give the package, unpacked"):
        web_runtime.keep_runtime(tmp_path / "bin")


def test_other_files_are_refused_wherever_they_come_from(package: Path) -> None:
    (package / "dist/ort.webgpu.min.mjs").write_text("something else")
    with pytest.raises(UserError, match=r"dist/ort.webgpu.min.mjs is not that of onnxruntime-web 1.30.0: its hash"):
        web_runtime.keep_runtime(package)
    (package / "dist/ort.webgpu.min.mjs").unlink()
    with pytest.raises(UserError, match=r"dist/ort.webgpu.min.mjs: No such file"):
        web_runtime.keep_runtime(package)


def test_npm_brings_it_once(package: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no npm here to fetch it: run `npm pack onnxruntime-web@1.30.0` elsewhere"):
        web_runtime.runtime_files()
    _npm(tmp_path, "echo npm error 404 >&2; exit 1")
    with pytest.raises(UserError, match=r"npm could not fetch onnxruntime-web@1.30.0: npm error 404; or give it"):
        web_runtime.runtime_files()
    archive = tmp_path / "made.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package, "package")
    _npm(tmp_path, f'test "$*" = "pack onnxruntime-web@1.30.0 --loglevel=error" && /bin/cp {archive} .')
    folder = web_runtime.runtime_files()
    _npm(tmp_path, "exit 9")
    assert web_runtime.runtime_files() == folder, "it is in the cache"
    (folder / "plain.wasm.gz").write_bytes((folder / "plain.wasm.gz").read_bytes()[:-9])  # cut off
    with pytest.raises(UserError, match="npm could not fetch"):
        web_runtime.runtime_files()
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("package/package.json"), io.BytesIO())
    _npm(tmp_path, f"/bin/cp {archive} .")
    with pytest.raises(UserError, match=r"as npm gave it has no dist/ort"):
        web_runtime.runtime_files()


def _npm(folder: Path, script: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "npm").chmod(0o755)


# ------------------------------------------------------------------------------------------------ scripts in Node

needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed: the page's scripts are not tried")


def _node(folder: Path, script: str) -> Any:
    """What a script prints as JSON; `canvas.mjs` and `orientation.mjs` lie beside it."""
    for name in ("canvas", "orientation"):
        shutil.copy(PAGE / f"{name}.js", folder / f"{name}.mjs")  # .js is a module for a page, and not for Node
    (folder / "script.mjs").write_text(script)
    assert NODE is not None
    ran = subprocess.run([NODE, "script.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


ON_CANVAS = """
import fs from "node:fs";
import { fitCanvas, toOriginal } from "./canvas.mjs";
const answers = JSON.parse(fs.readFileSync("jobs.json")).map(({ file, width, height, card, box }) => {
  const { canvas, scale } = fitCanvas({ width, height, data: new Uint8ClampedArray(fs.readFileSync(file)) }, card);
  fs.writeFileSync(`${file}.canvas`, canvas);
  return toOriginal(Float32Array.from(box), scale, { width, height });
});
console.log(JSON.stringify(answers));
"""


@needs_node
def test_the_canvas_is_that_of_python_to_the_bit(tmp_path: Path) -> None:
    """Random pictures, also of one pixel, very wide or high, made smaller and larger; noise, and black and white."""
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (1, 300), (300, 1), (640, 480), (97, 961), (961, 97), (64, 96), (40, 96)]
    sizes += [tuple(generator.integers(1, 260, 2)) for _ in range(60)]
    jobs, wanted = [], []
    for number, (height, width) in enumerate(sizes):
        if height > width and int(PIL.__version__.split(".")[0]) < 13:
            continue  # it makes them narrower first
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if number % 3 == 2:
            pixels = (pixels > 127).astype(np.uint8) * 255
        short, long = (None if generator.random() < 0.5 else int(generator.integers(1, 200)) for _ in range(2))
        size = (64, 96) if number < 8 else tuple(int(side) * 32 for side in generator.integers(1, 7, 2))
        short, long = (None, None) if number < 8 else (short, long)
        canvas, scale = letterbox(pixels, size, (124, 116, 104), short=short, long=long)
        box = generator.uniform(-5, 200, (1, 4)).astype(np.float32)
        wanted.append((canvas, to_original(box, scale, (height, width))[0]))
        file = tmp_path / str(number)
        file.write_bytes(np.dstack([pixels, generator.integers(0, 256, (height, width), dtype=np.uint8)]).tobytes())
        card = {"input_size": size, "short": short, "long": long, "pad_color": (124, 116, 104)}
        sides = {"width": int(width), "height": int(height)}
        jobs.append({"file": file.name, **sides, "card": card, "box": box[0].tolist()})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    boxes = _node(tmp_path, ON_CANVAS)
    for job, (canvas, box), got in zip(jobs, wanted, boxes, strict=True):
        assert (tmp_path / f"{job['file']}.canvas").read_bytes() == canvas.tobytes(), job
        assert np.asarray(got, np.float32).tolist() == box.tolist() == got, job


TURNS = """
import fs from "node:fs";
import { orientationOf } from "./orientation.mjs";
console.log(JSON.stringify(JSON.parse(fs.readFileSync("files.json"))
  .map((file) => orientationOf(new Uint8Array(fs.readFileSync(file))))));
"""


@needs_node
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_the_orientation_is_read_as_in_python(tmp_path: Path) -> None:
    files = dict(kinds())
    shown = Image.fromarray(picture((20, 30), (2, 2, 9, 9)))
    for kind in ("JPEG", "PNG", "WEBP"):
        for turn in range(10):
            exif = Image.Exif()
            exif[0x0112] = turn
            files[f"{kind} {turn}"] = encode(shown, kind, exif=exif)
        exif = Image.Exif()
        exif[0x010F] = "a maker"  # without an orientation
        files[f"{kind} none"] = encode(shown, kind, exif=exif)
    about = b'<rdf:Description tiff:Orientation="6"/>'
    exif[0x0112] = 3
    files |= {"xmp": encode(shown, "JPEG", xmp=about), "both": encode(shown, "JPEG", xmp=about, exif=exif)}
    files["webp xmp"] = encode(shown, "WEBP", xmp=b"<tiff:Orientation>8<")
    files["big endian"] = encode(shown, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\5\0\0\0\0\0\0")
    files["broken"] = encode(shown, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    for number, content in enumerate(files.values()):
        (tmp_path / str(number)).write_bytes(content)
    (tmp_path / "files.json").write_text(json.dumps([str(number) for number in range(len(files))]))
    wanted = {name: decode_oriented(content)[1] for name, content in files.items()}
    assert set(wanted.values()) == set(range(1, 9))
    assert dict(zip(files, _node(tmp_path, TURNS), strict=True)) == wanted
