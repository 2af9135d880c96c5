"""The web page in headless Chromium: what a user sees is where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.browser import CHROMIUM, Page, browser
from tests.helpers.encoded_pictures import encode
from tests.helpers.red_rectangle_model import picture
from tests.helpers.server_process import Server, server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the page is not tried")

READY = "document.querySelector('#server').textContent.startsWith('ready')"
BOX = (120, 60, 360, 240)  # in a picture of 640 x 480: exact in the canvas of 128 x 96


@pytest.fixture(scope="module")
def page(red_server: Server) -> Iterator[Page]:
    with browser() as page:
        yield page
        assert page.complaints == []
        hosts = {url.split("/")[2] for url in page.requested if url.startswith("http")}
        assert hosts == {red_server.url.removeprefix("http://")}, "the page asks another server"


@pytest.fixture
def red_file(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(encode(picture((480, 640), BOX)))
    return path


def drawn(page: Page) -> list[dict[str, Any]]:
    """The boxes on the screen, relative to the picture on the screen, in pixels of the file."""
    script = """(() => {
      const image = document.querySelector('#image').getBoundingClientRect();
      const scale = document.querySelector('#image').naturalWidth / image.width;
      return [...document.querySelectorAll('#boxes g')].map((group) => {
        const box = group.querySelector('.box').getBoundingClientRect();
        return { text: group.querySelector('text').textContent,
          box: [box.left - image.left, box.top - image.top, box.right - image.left, box.bottom - image.top]
            .map((side) => side * scale) };
      });
    })()"""
    found: list[dict[str, Any]] = page.run(script)
    return found


def upload(page: Page, file: Path, boxes: int = 1) -> None:
    page.choose("#file", file)
    page.wait(
        f"document.querySelector('#summary').textContent && document.querySelectorAll('#boxes g').length === {boxes}"
        " && document.querySelector('#image').naturalWidth > 0"  # it is decoded on its own
    )


@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 800, False), (390, 844, True)])
def test_boxes_are_where_the_object_is(
    page: Page, red_server: Server, red_file: Path, tmp_path: Path, width: int, height: int, phone: bool
) -> None:
    page.open(red_server.url, width, height, phone=phone)
    page.wait(READY)
    upload(page, red_file)
    (one,) = drawn(page)
    assert np.abs(np.array(one["box"]) - BOX).max() < 4, one  # half a line of the screen, in pixels of the file
    assert one["text"].startswith("red 0.")
    assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    assert "1 of 1 detection shown · 640 × 480 px" in page.run("document.querySelector('#summary').textContent")

    # The pixels themselves: the coloured line lies on the border of the red rectangle.
    page.run("document.querySelector('#image').scrollIntoView({ block: 'center' })")
    page.screenshot(tmp_path / "shot.png")
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    place = page.run(
        "(({left, top, width}) => [left, top, width])(document.querySelector('#image').getBoundingClientRect())"
    )
    ratio = 2 if phone else 1
    x = ratio * (place[0] + BOX[0] * place[2] / 640)
    middle = ratio * (place[1] + (BOX[1] + BOX[3]) / 2 * place[2] / 640)
    around = shot[round(middle), round(x) - 3 * ratio : round(x) + 3 * ratio + 1]
    assert np.abs(around - [255, 210, 63]).max(1).min() < 40, "no yellow line on the left border"


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What undoes each EXIF orientation."""


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_turned_pictures(page: Page, red_server: Server, tmp_path: Path, kind: str, orientation: int) -> None:
    """Browsers turn JPEG and not WebP; the rectangle on the screen is under its box all the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(picture((480, 640), BOX)).transpose(TURNS[orientation])
    path = tmp_path / f"turned.{kind.lower()}"
    path.write_bytes(encode(stored, kind, exif=exif))
    page.open(red_server.url)
    page.wait(READY)
    upload(page, path)
    (one,) = drawn(page)
    assert np.abs(np.array(one["box"]) - BOX).max() < 6, one
    page.run("document.querySelector('#image').scrollIntoView({ block: 'center' })")
    page.wait("document.querySelector('#image').complete")
    page.screenshot(tmp_path / "shot.png")
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    left, top, width = page.run(
        "(({left, top, width}) => [left, top, width])(document.querySelector('#image').getBoundingClientRect())"
    )
    for x, y, red in ((180, 150, True), (300, 220, True), (60, 150, False), (500, 400, False), (240, 300, False)):
        pixel = shot[round(top + y * width / 640), round(left + x * width / 640)]
        assert (pixel[0] - pixel[1] > 100) == red, (x, y, pixel)


def test_the_slider_and_the_classes(page: Page, red_server: Server, red_file: Path) -> None:
    page.open(red_server.url)
    page.wait(READY)
    # It starts at the operating point of the model, in whole hundredths that keep what scores as much.
    assert page.run("document.querySelector('#score-value').textContent + document.querySelector('#score').value") == (
        "0.250.25"
    )
    assert "score 0.2549: F1 0.80, precision 1.00, recall 0.67" in page.run(
        "document.querySelector('#card').textContent"
    )
    red_file.write_bytes(encode(picture((480, 640), BOX, shade=0)))  # scores less than 0.3
    upload(page, red_file)
    assert float(drawn(page)[0]["text"].split()[1]) < 0.3
    move = (
        "(() => {{ const s = document.querySelector('#score'); s.value = {}; s.dispatchEvent(new Event('input')); }})()"
    )
    page.run(move.format(0.9))
    assert drawn(page) == [] and page.run("document.querySelector('#score-value').textContent") == "0.90"
    assert "Nothing at this score" in page.run("document.querySelector('#rows').textContent")
    page.run(move.format(0.1))
    assert len(drawn(page)) == 1
    page.run("document.querySelector('#class-list input').click()")
    assert drawn(page) == []
    page.run("document.querySelector('#all').click()")
    assert len(drawn(page)) == 1
    page.run("document.querySelector('#none').click()")
    assert drawn(page) == []


def test_a_broken_file_says_so_and_the_next_one_works(page: Page, red_server: Server, red_file: Path) -> None:
    page.open(red_server.url)
    page.wait(READY)
    broken = red_file.with_name("broken.png")
    broken.write_bytes(red_file.read_bytes()[:200])
    page.choose("#file", broken)
    page.wait("!document.querySelector('#problem').hidden")
    assert "cannot be read as an image" in page.run("document.querySelector('#problem').textContent")
    assert page.run("document.querySelector('#problem').getAttribute('role')") == "alert"
    assert page.run("document.querySelector('#figure').hidden") and drawn(page) == []
    upload(page, red_file)
    assert page.run("document.querySelector('#problem').hidden") and len(drawn(page)) == 1


def test_it_works_with_the_keyboard_alone(page: Page, red_server: Server, red_file: Path) -> None:
    """Tab to the sample, Enter; Tab on to the slider, arrows."""
    page.open(red_server.url)
    page.wait(READY)
    reached = []
    for _ in range(12):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id"))
        if reached[-1] == "sample":
            page.press("Enter")
            page.wait("document.querySelector('#summary').textContent.includes('480 × 480 px')")
            break
    assert "choose" in reached and "sample" in reached and "file" not in reached
    upload(page, red_file)  # there is nothing red in the sample, so that the slider has nothing to do
    for _ in range(6):
        page.press("Tab")
        if page.run("document.activeElement.id") == "score":
            break
    for _ in range(3):
        page.press("ArrowRight")
    assert page.run("document.querySelector('#score-value').textContent") == "0.28"
    assert page.run("document.querySelector('#stages').textContent.includes('inference')")
    card = page.run("document.querySelector('#card').textContent")
    assert "onnxruntime cpu" in card and "128 × 96 px" in card and "large red" in card


def test_the_arrow_keys_go_through_what_was_found(page: Page, red_server: Server, red_file: Path) -> None:
    page.open(red_server.url)
    page.wait(READY)
    upload(page, red_file)
    page.run("document.querySelector('#found').focus()")
    page.press("ArrowDown")
    assert page.run("document.querySelectorAll('#rows tr.on').length") == 1
    assert page.run("document.querySelectorAll('#boxes .box.on').length") == 1
    page.run("document.querySelector('#choose').focus()")
    assert page.run("document.querySelectorAll('.on').length") == 0


def test_a_server_that_went_away_is_found_again(page: Page, red_onnx: Path, red_file: Path) -> None:
    with server(red_onnx, "--threads", "1") as first:
        page.open(first.url)
        page.wait(READY)
        port = first.address[1]
        first.stop()
        page.run("document.querySelector('#sample').click()")
        page.wait("document.querySelector('#problem').textContent.includes('sample did not come')")
        page.choose("#file", red_file)
        page.wait("document.querySelector('#server').textContent === 'no answer'")
        assert "cannot be reached" in page.run("document.querySelector('#problem').textContent")
    with server(red_onnx, "--threads", "1", "--port", str(port)):
        page.wait(READY)
        assert page.run("document.querySelector('#problem').hidden")
        upload(page, red_file)
        assert len(drawn(page)) == 1
    page.requested = [url for url in page.requested if first.url not in url]


def test_paste_and_drop(page: Page, red_server: Server) -> None:
    page.open(red_server.url)
    page.wait(READY)
    script = """(async () => {{
      const blob = await (await fetch('/page/sample.jpg')).blob();
      const data = new DataTransfer();
      data.items.add(new File([blob], 'a.jpg', {{ type: 'image/jpeg' }}));
      document.dispatchEvent({});
    }})()"""
    for event in (
        "new ClipboardEvent('paste', { clipboardData: data, bubbles: true })",
        "new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })",
    ):
        page.run("document.querySelector('#summary').textContent = ''")
        page.run(script.format(event))
        page.wait("document.querySelector('#summary').textContent.includes('480 × 480 px')")


def test_the_documents_page(page: Page, red_server: Server) -> None:
    page.open(f"{red_server.url}/docs")
    page.wait("document.querySelectorAll('.operation').length === 21")
    text = page.run("document.body.innerText")
    assert "/v2/models/{name}/infer" in text and "curl --data-binary @picture.jpg" in text


def test_a_token_is_asked_for(page: Page, red_onnx: Path, red_file: Path) -> None:
    with server(red_onnx, "--threads", "1", environment={"COMPRESS_SERVE_TOKEN": "s3cret"}) as guarded:
        page.open(guarded.url)
        page.wait("!document.querySelector('#token-form').hidden")
        page.run(
            "document.querySelector('#token').value = 's3cret'; document.querySelector('#token-form').requestSubmit()"
        )
        page.wait(READY)
        upload(page, red_file)
        assert len(drawn(page)) == 1
        page.run("document.querySelector('a[href=\"/metrics\"]').click()")
        page.wait("location.protocol === 'blob:' && document.body.innerText.includes('compress_queue_depth')")
        page.requested = [url for url in page.requested if guarded.url not in url]
