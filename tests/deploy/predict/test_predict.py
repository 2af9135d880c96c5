"""`compress predict`: every kind of source, every kind of output, and what one bad picture costs."""

from __future__ import annotations

import csv
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

import deploy
from compress.cli.app import _exit_code
from deploy.core.card import OperatingPoint
from deploy.core.errors import UserError
from deploy.predict import open_sources
from deploy.predict.video import Video
from deploy.validate.coco import load_annotations
from tests.helpers.encoded_pictures import encode
from tests.helpers.red_rectangle_model import CARD, picture, write_red_model
from tests.helpers.server_process import server
from tests.helpers.videos import box_of, frames, turn, write_video

RED = picture((480, 640), (100, 100, 300, 200))


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("red") / "red.onnx"
    write_red_model(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, one of them below, one without an object and one that is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    (folder / "a.png").write_bytes(encode(RED))
    (folder / "below" / "b.jpg").write_bytes(encode(picture((300, 500), (50, 60, 450, 200)), "JPEG", quality=95))
    (folder / "c.bmp").write_bytes(encode(picture((96, 128), None), "BMP"))
    (folder / "broken.png").write_bytes(encode(RED)[:300])
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames(12))


def predict(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.chdir(folder)
    return _exit_code(["predict", *map(str, arguments)])


def of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "predictions.json").read_text())
    return found


def test_a_folder_is_drawn_and_listed_and_a_broken_picture_costs_itself(
    onnx: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tmp_path, monkeypatch, onnx, photos) == 2
    shown = capsys.readouterr()
    assert "3 frames, 2 with detections: 1 red, 1 large red; score from 0.30 (the default)" in shown.out
    assert [line.partition(" cannot")[0] for line in shown.err.splitlines()] == [
        f"error: {photos / 'broken.png'}:", "error: 1 of 4 could not be looked at"
    ]  # fmt: skip
    out = tmp_path / "predictions"
    rows = of(out)["images"]
    assert [row["name"] for row in rows] == ["a.png", "below/b.jpg", "broken.png", "c.bmp"]
    assert [row["name"] for row in rows if "problem" in row] == ["broken.png"]
    first = of(out)["images"][0]
    assert (first["height"], first["width"]) == (480, 640)
    assert [(found["class_name"], found["box"]) for found in first["detections"]] == [
        ("red", [100.0, 100.0, 300.0, 200.0])
    ]
    drawn = {str(path.relative_to(out / "pictures")) for path in (out / "pictures").rglob("*.*")}
    assert drawn == {"a.png", "below/b.jpg", "c.bmp.jpg"}
    pixels = np.asarray(Image.open(out / "pictures" / "a.png"))
    assert pixels.shape == RED.shape and (pixels != RED).any() and (pixels[300:] == RED[300:]).all()


def test_a_link_to_nothing_costs_itself(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode(RED))
    (tmp_path / "photos" / "b.png").symlink_to("gone.png")
    assert predict(tmp_path, monkeypatch, onnx, "photos") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: photos/b.png: a link to gone.png, where nothing is", "error: 1 of 2 could not be looked at"
    ]  # fmt: skip
    assert [len(row.get("detections", ())) for row in of(tmp_path / "predictions")["images"]] == [1, 0]


def test_other_outputs_hold_the_same(
    onnx: Path, photos: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = ["--save", "json,coco,yolo,csv", "--crop", "--out", "new/all"]
    assert predict(tmp_path, monkeypatch, onnx, photos / "a.png", photos / "c.bmp", clip, *everything) == 0
    out = tmp_path / "new" / "all"
    assert not (out / "pictures").exists()
    listed = of(out)["images"]
    boxes = [found["box"] for row in listed for found in row["detections"]]
    assert len(listed) == 14 and len(boxes) == 13

    truth = load_annotations(out / "coco.json")  # a data set that our own reader takes
    assert [row["file_name"] for row in truth["images"]][:3] == ["a.png", "c.bmp", "clip_000000.jpg"]
    results = json.loads((out / "results.json").read_text())
    corners = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in results)]
    np.testing.assert_allclose(corners, boxes, atol=1e-3)
    assert {row["category_id"] for row in results} == {7}

    lines = [path.read_text().split() for path in sorted((out / "labels").glob("*.txt"))]
    assert len(lines) == 14 and sum(map(len, lines)) == 13 * 6
    label, x, y, w, h, _ = map(float, lines[0])
    assert (label, x * 640, y * 480, w * 640, h * 480) == pytest.approx((0, 200, 150, 200, 100), abs=1e-3)
    assert (out / "classes.txt").read_text() == "red\nlarge red\n"

    rows = list(csv.DictReader(io.StringIO((out / "predictions.csv").read_text())))
    assert [[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in rows] == [
        pytest.approx(box, abs=0.01) for box in boxes
    ]
    assert [row["frame"] for row in rows][:2] == ["", "0"]
    crop = np.asarray(Image.open(out / "crops" / "red" / "a_png_0.jpg"))
    assert crop.shape == (100, 200, 3) and crop[..., 0].min() > 150


def test_a_video_is_what_its_frames_are(
    onnx: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order and with their times; the drawn one has as many frames at the same times."""
    assert predict(tmp_path, monkeypatch, onnx, clip, "--batch-size", "5") == 0
    rows = of(tmp_path / "predictions")["images"]
    assert [(row["frame"], row["time_s"]) for row in rows] == [(index, index / 10) for index in range(12)]
    for index, (pixels, _) in enumerate(Video.open(str(clip)).pictures()):
        alone = deploy.open(onnx, threads=1).detect(pixels)
        assert [found["box"] for found in rows[index]["detections"]] == [list(one.box) for one in alone]
        assert alone[0].box == pytest.approx(box_of(index), abs=8), "and it is the frame of that number"
    drawn = Video.open(str(tmp_path / "predictions" / "pictures" / "clip.mp4"))
    times = [time_s for _, time_s in drawn.pictures()]
    assert times == pytest.approx([index / 10 for index in range(12)], abs=1e-3) and drawn.rate == 10


def test_memory_is_flat_over_a_minute_of_video(onnx: Path, tmp_path: Path) -> None:
    """Its frames together are 550 MB."""
    clip = write_video(tmp_path / "minute.mp4", frames(600))
    process, sizes, seen_boxes = psutil.Process(), [], []
    for seen in deploy.open(onnx, threads=1).predict(clip):
        sizes.append(process.memory_info().rss)
        seen_boxes.append(seen.detections.boxes[0, 0])
        assert seen.frame.index == len(sizes) - 1
    assert len(sizes) == 600
    np.testing.assert_allclose(seen_boxes, [box_of(index)[0] for index in range(600)], atol=8)
    assert max(sizes[100:]) - sizes[100] < 100e6


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)], ids=["90", "180", "270"]
)
def test_a_video_is_turned_upright(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int) -> None:
    """As a phone writes it, which is held upright."""
    path = write_video(tmp_path / "phone.mp4", frames(2))
    flat = [pixels for pixels, _ in Video.open(str(path)).pictures()]
    turn(path, matrix)
    for pixels, before in zip((pixels for pixels, _ in Video.open(str(path)).pictures()), flat, strict=True):
        np.testing.assert_array_equal(pixels, np.rot90(before, turns))


def test_videos_that_cannot_be_read_cost_themselves(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is none, one without its index, and one that says that it is longer than it is."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    data = write_video(tmp_path / "clip.mp4", frames(30)).read_bytes()
    (folder / "a.png").write_bytes(encode(RED))
    (folder / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    (folder / "none.mp4").write_bytes(b"\0" * 2000)
    with av.open(str(folder / "short.mkv"), "w") as half:
        stream = half.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for index, pixels in enumerate(frames(60)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            half.mux(stream.encode(frame))
        half.mux(stream.encode(None))
    whole = (folder / "short.mkv").read_bytes()
    (folder / "short.mkv").write_bytes(whole[: len(whole) // 2])
    assert predict(tmp_path, monkeypatch, onnx, folder) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 4 and "error: 3 of " in error
    for said in (
        "cut.mp4: cannot be read",
        "none.mp4: cannot be read as a video: Invalid data",
        "short.mkv: breaks off",
    ):
        assert said in error
    rows = of(tmp_path / "predictions")["images"]
    assert [row["name"] for row in rows if "problem" in row] == ["cut.mp4", "none.mp4", "short.mkv"]
    assert sum(row["name"] == "short.mkv" for row in rows) > 10 and rows[0]["name"] == "a.png"


def test_what_was_written_before_is_no_source(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by default nor as `--out` in the folder; but by its own name."""
    (tmp_path / "a.png").write_bytes(encode(RED))
    for arguments in (["."], ["."], [".", "--out", "deep/er"], ["."], ["predictions"]):
        assert predict(tmp_path, monkeypatch, onnx, *arguments) == 0
        assert "1 frame, 1 with" in capsys.readouterr().out


def test_a_data_set_says_which_classes_were_looked_for(
    onnx: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--save", "coco", "--out", "some", "--classes", "red", "--score", "0.01"]
    assert predict(tmp_path, monkeypatch, onnx, photos / "a.png", *arguments) == 0
    assert "the model itself leaves out what scores less than 0.05" in capsys.readouterr().out
    assert json.loads((tmp_path / "some" / "coco.json").read_text())["info"]["coverage"] == [7]


def test_from_python(onnx: Path, photos: Path) -> None:
    model = deploy.open(onnx, threads=1)
    sources = [photos / "a.png", str(photos / "below")]
    assert [len(seen.detections) for seen in model.predict(sources)] == [1, 1]
    assert [seen.frame.source.name for seen in model.predict(*sources)] == ["a.png", "b.jpg"]
    for wrong in (-1, 2, "a"):
        with pytest.raises(UserError, match="min_score: a number from 0 to 1"):
            model.predict(sources, min_score=wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def address(photos: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


def test_addresses_patterns_and_a_list_on_stdin(
    onnx: Path,
    photos: Path,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names are the last parts; what is called as something before is called otherwise."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos / 'a.png'}\n\n{photos}/*/*.jpg\n"))
    sources = ["-", f"{address}/a.png", f"{photos}/**/b.*", f"{address}/gone.png", f"{address}/gone.mp4"]
    assert predict(tmp_path, monkeypatch, onnx, *sources) == 2
    assert [row["name"] for row in of(tmp_path / "predictions")["images"]] == [
        "a.png", "b.jpg", "a-2.png", "b-2.jpg", "gone.png", "gone.mp4"
    ]  # fmt: skip
    assert f"error: {address}/gone.png: the server answers 404" in capsys.readouterr().err


def test_a_server_sees_what_the_file_sees(
    onnx: Path, photos: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [photos / "a.png", photos / "below", clip, "--save", "json", "--out"]
    assert predict(tmp_path, monkeypatch, onnx, *pictures, "here") == 0
    with server(onnx, "--threads", "1", "--deadline-ms", "600000") as running:
        assert predict(tmp_path, monkeypatch, running.url, *pictures, "there") == 0
        assert predict(tmp_path, monkeypatch, running.url, *pictures, "none", "--served", "blue") == 2
    assert of(tmp_path / "there")["images"] == of(tmp_path / "here")["images"]


def test_what_is_kept(onnx: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the operating point on, of the classes that are asked for; and a folder of somebody else's is left alone."""
    picky = tmp_path / "picky.onnx"
    point = OperatingPoint(score=0.7, f1=1, precision=1, recall=1, class_scores=[None, 0.7], images=1)
    write_red_model(picky, card=CARD.model_copy(update={"operating_point": point}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for arguments, found in (
        ((onnx,), 1),
        ((picky,), 0),
        ((picky, "--score", "0.1"), 1),
        ((onnx, "--classes", "red,large red"), 1),
        ((onnx, "--classes", "large red"), 0),
    ):
        out = f"{len(list(tmp_path.iterdir()))}"
        assert predict(tmp_path, monkeypatch, *arguments, photos / "a.png", "--out", out) == 0
        assert len(of(tmp_path / out)["images"][0]["detections"]) == found, arguments
    assert predict(tmp_path, monkeypatch, onnx, photos / "a.png", "--out", "full") == 2
    assert predict(tmp_path, monkeypatch, onnx, photos / "a.png", "--out", "full", "--overwrite") == 0
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    for name in ("predictions", "predictions-2"):
        assert predict(tmp_path, monkeypatch, onnx, photos / "a.png") == 0
        assert (tmp_path / name / "predictions.json").is_file()


def test_coco_results_take_the_ids_of_a_data_set(
    onnx: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [{"id": 71, "file_name": "a.png", "height": 480, "width": 640}]
    (tmp_path / "val.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 7, "name": "red"}]})
    )
    with_ids = ["--save", "coco", "--annotations", "val.json", "--out"]
    assert predict(tmp_path, monkeypatch, onnx, photos / "a.png", *with_ids, "a") == 0
    assert [row["image_id"] for row in json.loads((tmp_path / "a" / "results.json").read_text())] == [71]
    assert predict(tmp_path, monkeypatch, onnx, photos / "below", *with_ids, "b") == 2
    assert "--annotations: has no image called b.jpg" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".predictions"], "nothing half-written"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["red.onnx", "gone.jpg"], "gone.jpg: no such file or folder"),
        (["red.onnx", "*.jpg"], "*.jpg: nothing is named so"),
        (["red.onnx", "empty"], "empty: no pictures and no videos in it"),
        (["red.onnx", "nosuch://a/b.png"], "nosuch://a/b.png: Protocol not known: nosuch"),
        (["red.onnx", "camera:97"], "camera:97: there is no /dev/video97"),
        (["gone.onnx", "a.png"], "gone.onnx: no such file"),
        (["empty", "a.png"], "empty: is a folder; name the file in it, such as empty/student.onnx"),
        (["a.png", "a.png"], "a.png: ends in none of .onnx, .xml, .engine, .mnn, .ncnn.param, .tflite, .safetensors"),
        (["red.onnx", "a.png", "--classes", " ,"], "--classes: names none"),
        (
            ["red.onnx", "a.png", "--save", "xml"],
            "--save: 'xml' is none of pictures, json, coco",
        ),
        (["red.onnx", "a.png", "--classes", "blue"], "no class is called blue: the model knows red, large red"),
        (["red.onnx", "a.png", "--annotations", "a.json"], "--annotations: gives the image ids of --save coco"),
        (["red.onnx", "a.png", "--served", "x"], "--served: of a server, and red.onnx is none"),
        (["red.onnx", "a.png", "--show"], "--show: draws into a terminal"),
        (["http://127.0.0.1:9", "a.png"], "http://127.0.0.1:9"),
    ],
)
def test_mistakes_are_one_line(
    onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "red.onnx").write_bytes(onnx.read_bytes())
    (tmp_path / "a.png").write_bytes(encode(RED))
    (tmp_path / "empty").mkdir()
    assert predict(tmp_path, monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("predictions*/*"))


def test_pictures_need_no_pyav_and_videos_name_the_extra(
    onnx: Path, photos: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(open_sources([photos / "a.png"])) == 1
    with pytest.raises(UserError, match=r"clip.mp4: videos need PyAV: pip install 'compress-detectors\[video\]'"):
        open_sources([clip])


def test_ctrl_c_keeps_what_was_found(onnx: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", frames(40))
    program = """
import signal, sys
from deploy.runtimes.onnx import OnnxRunner
call, count = OnnxRunner.__call__, []
def interrupted(self, images):
    count.append(1)
    if len(count) == 3:
        signal.raise_signal(signal.SIGINT)
    return call(self, images)
OnnxRunner.__call__ = interrupted
from compress.cli import main
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, "predict", str(onnx), "clip.mp4"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 130 and "what was found until then is kept" in done.stderr
    out = tmp_path / "predictions"
    assert [row["frame"] for row in of(out)["images"]] == list(range(16))
    assert len(list(Video.open(str(out / "pictures" / "clip.mp4")).pictures())) == 16
