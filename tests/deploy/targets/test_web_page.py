"""The page of `--for web` in headless Chromium: the answers of ONNX Runtime, and everything that a user can do."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.core.canvas import fit_canvas, to_original
from deploy.core.card import Form, OperatingPoint
from deploy.core.image import decode_image
from deploy.graph.form import reform
from deploy.runtimes.onnx import OnnxRunner
from deploy.targets import web
from tests.helpers.browser import CHROMIUM, Page, browser
from tests.helpers.encoded_pictures import encode, kinds
from tests.helpers.firefox import FIREFOX, FirefoxPage, firefox
from tests.helpers.red_rectangle_model import CARD, picture, write_red_model
from tests.helpers.videos import box_of, frames, write_video
from tests.helpers.web_site import answers, need_runtime, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the page is not tried")

READY = "document.querySelector('#server').textContent.startsWith('ready')"
BOX = (120, 60, 360, 240)  # in a picture of 640 x 480: exact in the canvas of 128 x 96
POINT = OperatingPoint(score=0.2549, f1=0.8, precision=1.0, recall=0.67, class_scores=[0.3, None], images=9)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Path:
    """A folder with the pages `red` and `tiny`."""
    need_runtime()
    root = tmp_path_factory.mktemp("sites")
    write_red_model(root / "red.onnx", card=CARD.model_copy(update={"operating_point": POINT}))
    web.make(root / "red.onnx", root / "red")
    web.make(tiny_onnx, root / "tiny")
    return root


@pytest.fixture(scope="module")
def server(sites: Path) -> Iterator[str]:
    with serving(sites) as address:
        yield address


@pytest.fixture(scope="module")
def page(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    camera = tmp_path_factory.mktemp("camera") / "red.y4m"
    _write_y4m(camera)
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with browser(*flags, f"--use-file-for-fake-video-capture={camera}") as page:
        yield page
        assert page.complaints == []
        hosts = {url.split("/")[2] for url in page.requested if url.startswith("http")}
        assert hosts == {server.removeprefix("http://")}, "the page asks another server"


@pytest.fixture(scope="module")
def red(page: Page, server: str, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the red model, ready; tests leave it usable. A picture chosen before that is looked at after it."""
    page.open(f"{server}/red/")
    _choose(page, _written(tmp_path_factory.mktemp("early"), "early.png"))
    page.wait(f"{READY} && document.querySelector('#summary').textContent.startsWith('1 of 1')")
    return page


def _open(page: Page, url: str, **size: Any) -> None:
    page.open(url, **size)
    page.wait(f"{READY} || !document.querySelector('#problem').hidden")
    assert _text(page, "#problem") == ""


def _write_y4m(path: Path) -> None:
    """A camera that sees a red rectangle at `BOX`."""
    y, cb, cr = (np.asarray(plane) for plane in Image.fromarray(picture((480, 640), BOX)).convert("YCbCr").split())
    frame = b"FRAME\n" + y.tobytes() + cb[::2, ::2].tobytes() + cr[::2, ::2].tobytes()
    path.write_bytes(b"YUV4MPEG2 W640 H480 F10:1 Ip C420\n" + frame)


def _text(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector('{selector}').textContent"))


def _boxes(page: Page) -> list[list[float]]:
    """The boxes on the screen in pixels of the picture."""
    found: list[list[float]] = page.run("""[...document.querySelectorAll('#boxes .box')].map((box) =>
      ['x', 'y', 'width', 'height'].map((side) => Number(box.getAttribute(side))))
      .map(([x, y, w, h]) => [x, y, x + w, y + h])""")
    return found


def _choose(page: Page, *files: Path) -> None:
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node)


def _written(folder: Path, name: str, box: tuple[int, int, int, int] | None = BOX, shade: int = 40) -> Path:
    path = folder / name
    path.write_bytes(encode(picture((480, 640), box, shade)))
    return path


# ------------------------------------------------------------------------------------------------ the same answers


def _scenes(count: int) -> list[Image.Image]:
    """Of every shape, with rectangles of many colours."""
    generator = np.random.default_rng(3)
    scenes = []
    for number in range(count):
        height, width = (int(side) for side in generator.integers(40, 400, 2))
        pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for _ in range(4):
            x, y = int(generator.integers(0, width)), int(generator.integers(0, height))
            pixels[y : y + height // 3, x : x + width // 3] += generator.integers(0, 190, 3, dtype=np.uint8)
        scenes.append(Image.fromarray(pixels if number % 4 else pixels // 2))
    return scenes


def _check_answers(onnx: Path, files: list[bytes], found: list[dict[str, Any]], *, boxes: float, scores: float) -> int:
    runner, many = OnnxRunner(onnx, threads=1), 0
    for file, answer in zip(files, found, strict=True):
        pixels = decode_image(file)
        canvas, scale = fit_canvas(pixels, runner.card)
        want = runner(canvas[None])
        count = int(want.count[0])
        rows = answer["detections"]
        assert (answer["height"], answer["width"]) == pixels.shape[:2] and len(rows) == count
        many += count
        wanted = to_original(want.boxes[0, :count], scale, pixels.shape[:2])
        assert [one["label"] for one in rows] == want.labels[0, :count].tolist()
        assert [one["category_id"] for one in rows] == [runner.card.category_ids[one["label"]] for one in rows]
        if count:
            assert np.abs(np.array([one["box"] for one in rows]) - wanted).max() <= boxes
            assert np.abs(np.array([one["score"] for one in rows]) - want.scores[0, :count]).max() <= scores
    return many


def test_size(sites: Path) -> None:
    """Besides the model: what the documents say."""
    files = [path for path in (sites / "red").rglob("*") if path.is_file() and path.name != "model.onnx"]
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_answers_are_those_of_onnx_runtime(page: Page, server: str, tiny_onnx: Path) -> None:
    """PNG and JPEG: this browser decodes JPEG as we do."""
    files = [encode(scene) if number % 2 else encode(scene, "JPEG") for number, scene in enumerate(_scenes(20))]
    _open(page, f"{server}/tiny/")
    assert _check_answers(tiny_onnx, files, answers(page, files), boxes=2e-3, scores=2e-6) > 100


PIXELS = """(async () => {{
  const {{ decode }} = await import("./decode.js");
  const answers = [];
  for (const text of {files}) {{
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    try {{
      const {{ width, height, data }} = await decode(new File([bytes], "x"));
      answers.push([height, width, btoa(Array.from(data, (byte) => String.fromCharCode(byte)).join(""))]);
    }} catch (error) {{
      answers.push([error.message, 0, ""]);
    }}
  }}
  return answers;
}})()"""


def test_pictures_are_decoded_as_in_python(red: Page) -> None:
    assert _decoded_otherwise(red) == set()


@pytest.mark.skipif(FIREFOX is None, reason="firefox is not installed: the page is not tried in it")
def test_firefox(server: str, tiny_onnx: Path) -> None:
    files = [encode(scene) for scene in _scenes(20)]
    with firefox() as page:
        page.open(f"{server}/tiny/")
        page.wait(READY)
        assert _check_answers(tiny_onnx, files, answers(page, files), boxes=2e-3, scores=2e-6) > 100
        refused = set() if page.run("!!document.createElement('canvas').getContext('webgl2')") else TRANSPARENT
        assert _decoded_otherwise(page) == {"16-bit png", *refused}
        assert page.complaints == []


TRANSPARENT = {"png with alpha", "palette png, transparent", "webp with alpha", "faint"}
"""What the page refuses where the browser has no WebGL, as on a machine without a graphics card."""


def _decoded_otherwise(page: Page | FirefoxPage) -> set[str]:
    """Pictures that the page's decoder refuses or gives other pixels of than ours: of every kind that a browser knows,
    turned, transparent, with other colour profiles."""
    files = dict(kinds())
    scene = _scenes(1)[0].resize((60, 40))
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        for turn in range(2, 9):
            exif = Image.Exif()
            exif[0x0112] = turn
            files[f"{kind} {turn}"] = encode(scene, kind, exif=exif, **options)
    faint = scene.convert("RGBA")
    faint.putalpha(Image.linear_gradient("L").resize(scene.size))
    files["faint"] = encode(faint)
    texts = json.dumps([base64.b64encode(file).decode() for file in files.values()])
    shown = page.run(PIXELS.format(files=texts))
    other = set()
    for (name, file), (height, width, data) in zip(files.items(), shown, strict=True):
        if not data:
            other.add(name)
            continue
        got = np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)
        want = decode_image(file)
        assert got.shape[:2] == want.shape[:2] and (got[..., 3] == 255).all(), name
        if (got[..., :3] != want).any():
            other.add(name)
    return other


# ------------------------------------------------------------------------------------------------ what a user does


def test_pictures_slider_and_classes(red: Page, tmp_path: Path) -> None:
    assert "wasm, 1 thread" in _text(red, "#server")
    assert not red.run("document.querySelector('#threads').hidden"), "it says why there is one thread"
    assert _text(red, "#score-value") == "0.25", "the operating point"
    assert "score 0.2549: F1 0.80" in _text(red, "#card")
    _choose(
        red, _written(tmp_path, "a.png"), _written(tmp_path, "b.png", (0, 0, 80, 80)), _written(tmp_path, "c.png", None)
    )
    red.wait("document.querySelector('#summary').textContent.startsWith('1 of 1')")
    (box,) = _boxes(red)
    assert np.abs(np.array(box) - BOX).max() < 1e-3
    image = "(({width, height}) => width / height)(document.querySelector('#image').getBoundingClientRect())"
    assert abs(red.run(image) - 640 / 480) < 0.01 and "whole" in _text(red, "#stages")
    assert _text(red, "#place") == "1 of 3" and red.run("document.querySelector('#before').disabled")
    red.run("document.querySelector('#after').click()")
    red.wait("document.querySelectorAll('#boxes .box')[0]?.getAttribute('width') === '80'")
    red.run("document.querySelector('#after').click()")
    red.wait("document.querySelector('#summary').textContent.startsWith('0 of 0')")
    _choose(red, tmp_path / "a.png")
    red.wait("document.querySelector('#summary').textContent.startsWith('1 of 1')")
    assert red.run("document.querySelector('#pager').hidden")
    move = (
        "(() => { const s = document.querySelector('#score'); s.value = %s; s.dispatchEvent(new Event('input')); })()"
    )
    red.run(move % 0.9)
    assert _boxes(red) == [] and "0 of 1" in _text(red, "#summary")
    red.run(move % 0.1)
    assert len(_boxes(red)) == 1
    red.run("document.querySelector('#class-list input').click()")
    assert _boxes(red) == []
    assert red.run("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"


def test_what_is_no_picture_is_said_and_the_next_one_works(red: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    _choose(red, tmp_path / "broken.png")
    red.wait("!document.querySelector('#problem').hidden")
    assert "broken.png: cannot be read as a picture by this browser" in _text(red, "#problem")
    assert red.run("document.querySelector('#figure').hidden")
    red.run(f"""(async () => {{
      const data = new DataTransfer();
      const bytes = Uint8Array.from(atob("{base64.b64encode(encode(picture((480, 640), BOX))).decode()}"),
        (letter) => letter.charCodeAt(0));
      data.items.add(new File([bytes], "pasted.png", {{ type: "image/png" }}));
      document.dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: data, bubbles: true }}));
    }})()""")
    red.wait("document.querySelector('#summary').textContent.startsWith('1 of 1')")
    assert red.run("document.querySelector('#problem').hidden")


def test_a_video_and_the_camera(red: Page, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="no video can be written here")
    video = write_video(tmp_path / "red.mp4", frames(20))
    _choose(red, video)
    red.wait("!document.querySelector('#player').hidden && document.querySelectorAll('#boxes .box').length")
    red.wait("document.querySelector('#pause').textContent === 'Play'")  # at its end
    red.run("""(() => { const seek = document.querySelector('#seek'); seek.value = 0.525;
      seek.dispatchEvent(new Event('input')); })()""")
    red.wait("!document.querySelector('#video').seeking && document.querySelector('#video').currentTime < 1.5")
    wanted = box_of(10)
    red.wait(f"Math.abs(document.querySelector('#boxes .box')?.getAttribute('x') - {wanted[0]}) < 6")
    (box,) = _boxes(red)
    assert np.abs(np.array(box) - wanted).max() < 6, "a canvas has 5 pixels of the video in one of its own"
    red.run("document.querySelector('#camera').click()")
    red.wait(f"Math.abs(document.querySelector('#boxes .box')?.getAttribute('x') - {BOX[0]}) < 6")
    assert np.abs(np.array(_boxes(red)[0]) - BOX).max() < 6
    assert red.run("document.querySelector('#seek-row').hidden")
    red.wait("document.querySelector('#latency-hint').textContent.includes('frames a second')")
    red.run("document.querySelector('#stop').click()")
    assert red.run("document.querySelector('#player').hidden && document.querySelector('#video').srcObject === null")


# ------------------------------------------------------------------------------------------- other browsers, servers

ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
SOFTWARE_GPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--use-angle=swiftshader",
    "--ignore-gpu-blocklist",
)
WITHOUT_JSPI = "delete WebAssembly.Suspending; delete WebAssembly.promising;"
FOUR_CORES = "Object.defineProperty(Navigator.prototype, 'hardwareConcurrency', { get: () => 4 });"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("headers", "script", "says", "loaded"),
    [
        ({}, WITHOUT_JSPI, "wasm, 1 thread", "plain.wasm.gz"),
        (ISOLATED, WITHOUT_JSPI + FOUR_CORES, "wasm, 2 threads", "plain.wasm.gz"),
        (ISOLATED, FOUR_CORES, "wasm, 2 threads", "jspi.wasm.gz"),
    ],
    ids=["plain", "plain, threads", "jspi, threads"],
)
def test_builds_and_threads(
    sites: Path, tiny_onnx: Path, headers: dict[str, str], script: str, says: str, loaded: str
) -> None:
    files = [encode(scene) for scene in _scenes(5)]
    with serving(sites, headers, says_gzip=True) as address, browser() as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        _open(page, f"{address}/tiny/", width=390, height=844, phone=True)
        assert says in _text(page, "#server") and page.run("document.querySelector('#threads').hidden") == bool(headers)
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
        assert any(url.endswith(loaded) for url in page.requested) and page.complaints == []
        assert _check_answers(tiny_onnx, files, answers(page, files), boxes=2e-3, scores=2e-6) > 20


@pytest.mark.exhaustive
def test_webgpu(sites: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """On a graphics card that the CPU plays, which the page takes only when it is asked to."""
    files = [encode(scene) for scene in _scenes(5)]
    with serving(sites) as address, browser(*SOFTWARE_GPU) as page:
        _open(page, f"{address}/tiny/?backend=webgpu")
        assert "WebGPU" in _text(page, "#server")
        found = answers(page, files, "webgpu")
        assert _check_answers(tiny_onnx, files, found, boxes=0.05, scores=1e-4) > 20
        (tmp_path / "a.png").write_bytes(files[0])
        page.choose("#file", tmp_path / "a.png")
        page.wait("document.querySelector('#summary').textContent")
        page.run("""(() => { const choice = document.querySelector('#model'); choice.value = 'wasm';
          choice.dispatchEvent(new Event('change')); })()""")
        page.wait(READY + " && document.querySelector('#server').textContent.includes('wasm')")
        _open(page, f"{address}/tiny/")
        assert "wasm" in _text(page, "#server") and page.complaints == []


@pytest.mark.exhaustive
def test_another_form(sites: Path, tiny_onnx: Path) -> None:
    reform(tiny_onnx, sites / "formed.onnx", Form(batch=1, labels="int32", images="float32"))
    web.make(sites / "formed.onnx", sites / "formed")
    files = [encode(scene) for scene in _scenes(5)]
    with serving(sites) as address, browser() as page:
        _open(page, f"{address}/formed/")
        assert _check_answers(tiny_onnx, files, answers(page, files), boxes=2e-3, scores=2e-6) > 20
        blocked = page.run("""new Promise((done) => {
          document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
          fetch("http://localhost:9/").catch(() => {});
        })""")
        assert blocked == "connect-src", "its content policy lets it ask another server"
