"""The server as a user has it: `compress serve` in its own process, over HTTP."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import deploy
from compress import cli
from deploy.core.card import card_from_file
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.runtimes.onnx import OnnxRunner
from deploy.serve.client import Client, ServerError
from deploy.validate.detect import detect_all
from tests.helpers.encoded_pictures import encode, hostile, kinds, with_exif
from tests.helpers.red_rectangle_model import CARD, picture, write_red_model
from tests.helpers.server_process import ROOT, Server, server

PNG = encode(picture((480, 640), (100, 100, 300, 200)))


@pytest.fixture
def http(red_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=red_server.url, timeout=600) as client:
        yield client


def found(response: httpx.Response, image: int = 0) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    detections: list[dict[str, Any]] = response.json()["images"][image]["detections"]
    return detections


# ------------------------------------------------------------------------------------------------ /v1/detect


def test_one_picture(http: httpx.Client) -> None:
    """640 x 480 in a canvas of 128 x 96: exactly a fifth, so that the box is exact."""
    response = http.post("/v1/detect", content=PNG)
    (one,) = found(response)
    assert one["box"] == [100.0, 100.0, 300.0, 200.0] and one["class_name"] == "red" and one["category_id"] == 7
    answer = response.json()
    assert (answer["images"][0]["width"], answer["images"][0]["height"]) == (640, 480)
    assert answer["model"] == "red" and answer["batch"] == 1
    assert answer["request_id"] == response.headers["x-request-id"]
    timing = answer["timing_ms"]
    assert list(timing) == ["receive", "decode", "queue", "inference", "total"]
    assert all(value >= 0 for value in timing.values())
    assert timing["total"] >= timing["decode"] + timing["inference"]


def test_no_detection_is_an_empty_list(http: httpx.Client) -> None:
    assert found(http.post("/v1/detect", content=encode(picture((48, 64), None)))) == []


def test_several_pictures_keep_their_order(http: httpx.Client) -> None:
    boxes = [(10 * k, 5, 10 * k + 20, 25) for k in range(6)]
    files = [("image", (f"{k}.png", encode(picture((96, 128), box)))) for k, box in enumerate(boxes)]
    response = http.post("/v1/detect", files=files)
    assert [found(response, k)[0]["box"] for k in range(6)] == [list(map(float, box)) for box in boxes]


def test_minimum_score(http: httpx.Client) -> None:
    (one,) = found(http.post("/v1/detect", content=PNG))
    assert found(http.post("/v1/detect", content=PNG, params={"min_score": one["score"]})) == [one]
    assert found(http.post("/v1/detect", content=PNG, params={"min_score": one["score"] + 1e-6})) == []


@pytest.mark.parametrize("name", kinds())
def test_every_kind_of_file(http: httpx.Client, name: str) -> None:
    """Same detections as the runner alone, through the functions of validation."""
    response = http.post("/v1/detect", content=kinds()[name])
    assert (response.json()["images"][0]["width"], response.json()["images"][0]["height"]) == (90, 60)
    if not any(word in name for word in ("grey", "16", "bile")):
        (one,) = found(response)
        assert np.abs(np.array(one["box"]) - [20, 10, 70, 40]).max() < 2


def test_the_annotated_picture(http: httpx.Client) -> None:
    response = http.post("/v1/detect", content=PNG, params={"annotate": 1})
    spent = {stage: float(ms) for stage, ms in re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])}
    assert set(spent) == {"receive", "decode", "queue", "inference", "draw", "total"}
    assert sum(spent.values()) - spent["total"] <= spent["total"], "the whole is more than its parts"
    assert response.status_code == 200 and response.headers["content-type"] == "image/jpeg"
    assert "inference;dur=" in response.headers["server-timing"]
    drawn = np.asarray(Image.open(io.BytesIO(response.content)).convert("RGB")).astype(int)
    assert drawn.shape == (480, 640, 3)
    line = drawn[150, 100]  # #ffd23f on the left side of the box
    assert np.abs(line - [255, 210, 63]).max() < 40 and np.abs(drawn[150, 200] - [255, 0, 0]).max() < 30
    two = [("image", ("a", PNG)), ("image", ("b", PNG))]
    assert http.post("/v1/detect", files=two, params={"annotate": 1}).status_code == 400


def test_what_is_drawn_scores_at_least_the_operating_point(red_server: Server) -> None:
    """0.2549 on this card; of two pictures one scores more, and less than 0.3."""
    faint = encode(picture((480, 640), (100, 100, 300, 200), shade=0))
    with Client(red_server.url) as client:
        (one,) = client.detect(faint)
        assert 0.2549 < one.score < 0.3
        shown, hidden = (
            np.asarray(Image.open(io.BytesIO(client.annotate(faint, min_score=score))).convert("RGB")).astype(int)
            for score in (None, 0.3)
        )
        assert np.abs(shown[150, 100] - [255, 210, 63]).max() < 40 and np.abs(hidden[150, 103] - [255, 0, 0]).max() < 30
        tiny = encode(picture((480, 640), (100, 100, 130, 120), shade=0))
        (one,) = client.detect(tiny)
        assert one.score < 0.2549, "detections themselves are not cut"
        assert client.annotate(tiny) != client.annotate(tiny, min_score=0)


@pytest.mark.parametrize("name", hostile())
def test_hostile_files(http: httpx.Client, name: str) -> None:
    response = http.post("/v1/detect", content=hostile()[name])
    assert response.status_code in (413, 415, 422)
    assert list(response.json()) == ["error", "request_id"]
    assert "Traceback" not in response.text and "/usr" not in response.text and "site-packages" not in response.text


def test_one_broken_picture_of_several_is_named(http: httpx.Client) -> None:
    response = http.post("/v1/detect", files=[("image", ("a", PNG)), ("image", ("b", PNG[:200]))])
    assert response.status_code == 422 and response.json()["error"].startswith("image 1: ")


def test_requests_that_are_wrong(http: httpx.Client) -> None:
    def ask(**more: Any) -> tuple[int, str]:
        response = http.post("/v1/detect", **more)
        return response.status_code, response.json()["error"]

    assert ask(content=b"") == (400, "the body is empty: send the picture as the body")
    assert ask(content=PNG, params={"model": "blue"}) == (404, "no such model; there are: red")
    assert ask(content=PNG, params={"min_score": 2})[0] == 422
    assert ask(content=PNG, params={"deadline_ms": 0})[0] == 422
    assert ask(content=PNG, params={"min_score": "nan"})[0] == 422
    assert ask(json={"image": "x"})[0] == 415
    assert ask(content=PNG, headers={"Content-Encoding": "br"})[0] == 415
    assert ask(content=PNG, headers={"Content-Encoding": "gzip"})[0] == 400
    assert ask(content=b"x", headers={"Content-Type": "multipart/form-data"})[0] == 400
    assert ask(content=b"x" * 9, headers={"Content-Type": "multipart/form-data; boundary=a"})[0] == 400
    assert ask(data={"image": "text"}, files={})[0] in (400, 415)
    assert ask(files=[("image", ("a", b"")) for _ in range(33)])[0] == 413
    assert http.get("/v1/detect").status_code == 405 and http.get("/v1/detect").headers["allow"] == "POST"
    assert http.get("/nothing").json()["error"] == "Not Found"
    assert http.get("/page/..%2fapp.py").status_code == 404


def test_a_declared_or_a_sent_body_that_is_too_large(red_server: Server, http: httpx.Client) -> None:
    assert http.post("/v1/detect", content=b"x" * 20_000_001).status_code == 413
    with red_server.connect() as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 1_000_000

    with contextlib.suppress(httpx.WriteError):  # it was told while it was still sending
        assert http.post("/v1/detect", content=chunks()).status_code == 413


# ------------------------------------------------------------------------- the same bits as `compress validate`


def test_bits_equal_those_of_validation(tiny_onnx: Path, tmp_path: Path) -> None:
    """A detector with real suppression; files of many sizes and formats; alone, and all together in batches."""
    rng = np.random.default_rng(0)
    files = []
    for k in range(12):
        height, width = int(rng.integers(30, 200)), int(rng.integers(30, 200))
        coarse = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
        path = tmp_path / f"{k}.{['png', 'jpg', 'webp', 'bmp'][k % 4]}"
        image.save(path)
        files.append(path)
    runners = {"tiny": OnnxRunner(tiny_onnx, threads=1)}
    wanted = detect_all(runners, dict(enumerate(files)), batch_size=len(files))["tiny"].detections
    assert sum(len(one.scores) for one in wanted.values()) > 20

    def equal(image: dict[str, Any], k: int) -> None:
        rows = image["detections"]
        boxes = np.array([row["box"] for row in rows], np.float32).reshape(-1, 4)
        assert np.array_equal(boxes, wanted[k].boxes)
        assert np.array_equal(np.array([row["score"] for row in rows], np.float32), wanted[k].scores)
        assert [row["label"] for row in rows] == wanted[k].labels.tolist()

    with server(tiny_onnx, "--threads", "1") as running, httpx.Client(base_url=running.url, timeout=600) as http:
        for k, path in enumerate(files):
            equal(http.post("/v1/detect", content=path.read_bytes()).json()["images"][0], k)
        together = http.post("/v1/detect", files=[("image", (path.name, path.read_bytes())) for path in files]).json()
        assert together["batch"] > 1
        for k in range(len(files)):
            equal(together["images"][k], k)


# ------------------------------------------------------------------------------- probes, documents, headers, logs


def test_probes_and_documents(http: httpx.Client, red_onnx: Path) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    for path in ("/", "/healthz", "/readyz"):  # some monitors ask so
        assert http.head(path).status_code == 200 and http.head(path).content == b""
    ready = http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {
        "ready": True,
        "draining": False,
        "models": [{"name": "red", "ready": True, "backend": "onnxruntime cpu"}],
    }
    (model,) = http.get("/v1/models").json()
    assert model["card"] == card_from_file(red_onnx).model_dump(mode="json") and model["backend"] == "onnxruntime cpu"
    assert http.get("/openapi.json").json()["openapi"].startswith("3.")
    for path in ("/", "/docs"):
        page = http.get(path)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "'unsafe" not in page.headers["content-security-policy"]
        outside = re.findall(r"(?:src|href)=\"((?:https?:)?//[^\"]*)", page.text)
        assert outside == []  # it works offline


def test_metrics(http: httpx.Client) -> None:
    def value(name: str) -> float:
        match = re.search(rf"^{re.escape(name)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
        return float(match[1]) if match else 0.0

    counts = (
        'compress_requests_total{method="POST",route="/v1/detect",status="200"}',
        'compress_requests_total{method="POST",route="/v1/detect",status="415"}',
        'compress_images_total{model="red"}',
        'compress_stage_seconds_count{model="red",stage="decode"}',
        'compress_stage_seconds_count{model="red",stage="total"}',
        'compress_batch_size_sum{model="red"}',
    )
    before = [value(name) for name in counts]
    http.post("/v1/detect", files=[("image", ("a", PNG)), ("image", ("b", PNG))])
    http.post("/v1/detect", content=b"hello")
    http.get(f"/{time.time_ns()}")  # a path that does not exist: no new series
    assert [value(name) - old for name, old in zip(counts, before, strict=True)] == [1, 1, 2, 1, 1, 2]
    text = http.get("/metrics").text
    assert 'compress_model_info{backend="onnxruntime cpu",card="red",model="red"} 1.0' in text
    assert 'compress_queue_depth{model="red"} 0.0' in text and "process_resident_memory_bytes" in text
    assert 'route="none"' in text


def test_request_ids_and_logs(red_server: Server, http: httpx.Client) -> None:
    given = http.get("/v1/models", headers={"X-Request-Id": "from-the-gateway:1"})
    assert given.headers["x-request-id"] == "from-the-gateway:1"
    forged = http.post("/v1/detect", content=b"x", headers={"X-Request-Id": 'a"}\\ninjected'})
    made = forged.headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made) and forged.json()["request_id"] == made
    rows: dict[Any, Any] = {}
    end = time.monotonic() + 600
    while made not in rows:  # written after the answer
        assert time.monotonic() < end
        rows = {row.get("request_id"): row for row in red_server.log()}
    assert rows["from-the-gateway:1"]["path"] == "/v1/models" and rows["from-the-gateway:1"]["status"] == 200
    assert rows[made]["status"] == 415 and rows[made]["ms"] > 0 and rows[made]["level"] == "info"


def test_a_deadline_that_cannot_be_kept(slow_onnx: Path) -> None:
    patient = ("--deadline-ms", "600000")  # of all others
    with (
        server(slow_onnx, "--threads", "1", *patient) as running,
        httpx.Client(base_url=running.url, timeout=600) as http,
    ):
        files = [("image", (str(k), PNG)) for k in range(20)]
        first = subprocess.Popen(
            [sys.executable, "-c", _SEND_20, running.url], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        assert first.stdin is not None
        first.stdin.write(PNG)
        first.stdin.close()
        end = time.monotonic() + 600
        while (response := http.post("/v1/detect", content=PNG, params={"deadline_ms": 1})).status_code != 429:
            assert time.monotonic() < end and first.poll() is None, "the server was never busy"
        assert int(response.headers["retry-after"]) >= 1 and "overloaded" in response.json()["error"]
        assert first.wait(600) == 0
        assert http.post("/v1/detect", files=files).status_code == 200
        assert 'compress_rejected_total{model="slow",reason=' in http.get("/metrics").text


_SEND_20 = """
import sys, httpx
picture = sys.stdin.buffer.read()
files = [("image", (str(k), picture)) for k in range(20)]
for _ in range(3):
    answer = httpx.post(sys.argv[1] + "/v1/detect", files=files, timeout=600)
    assert answer.status_code == 200, answer.text
"""


def test_a_picture_that_no_jpeg_can_hold_is_refused_when_drawn(http: httpx.Client) -> None:
    for size in ((1, 65_501), (65_501, 1)):
        data = encode(np.zeros((*size, 3), np.uint8))
        assert http.post("/v1/detect", content=data).status_code == 200
        refused = http.post("/v1/detect", content=data, params={"annotate": 1})
        assert refused.status_code == 413 and "65500" in refused.json()["error"]
    data = encode(np.zeros((1, 65_500, 3), np.uint8))
    assert http.post("/v1/detect", content=data, params={"annotate": 1}).status_code == 200


def test_warnings_about_pictures_are_lines_of_the_log(red_server: Server, http: httpx.Client) -> None:
    jpeg = encode(picture((480, 640), (100, 100, 300, 200)), "JPEG")
    odd = with_exif(jpeg, [(0x0112, 3, 1, b"\x06\0\0\0"), (0x010E, 2, 5000, b"\xff\xff\0\0")])  # text beyond the end
    assert http.post("/v1/detect", content=odd).status_code == 200
    assert any("Tag data larger" in row["message"] for row in red_server.log())


# -------------------------------------------------------------------------------- several models, loading again


def test_several_models_and_loading_again(red_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "second.onnx"
    shutil.copy(red_onnx, path)
    with (
        server(red_onnx, f"other={path}", "--threads", "1", "--allow-reload") as running,
        httpx.Client(base_url=running.url, timeout=600) as http,
    ):
        assert "model_repository" in http.get("/v2").json()["extensions"]
        assert [row["name"] for row in http.get("/v1/models").json()] == ["red", "other"]
        assert found(http.post("/v1/detect", content=PNG, params={"model": "other"}))[0]["class_name"] == "red"
        assert http.post("/v1/detect", content=PNG).json()["model"] == "red"

        write_red_model(path, card=CARD.model_copy(update={"name": "new", "class_names": ["rouge", "large"]}))
        assert http.post("/v2/repository/models/other/load").json() == {"name": "other", "state": "READY"}
        assert found(http.post("/v1/detect", content=PNG, params={"model": "other"}))[0]["class_name"] == "rouge"
        assert found(http.post("/v1/detect", content=PNG))[0]["class_name"] == "red"
        assert (
            'compress_model_info{backend="onnxruntime cpu",card="new",model="other"} 1.0' in http.get("/metrics").text
        )

        path.write_bytes(b"not a model")  # the old one goes on
        refused = http.post("/v2/repository/models/other/load", json={"parameters": {"config": "{}"}})
        assert refused.status_code == 400 and str(tmp_path) not in refused.text
        assert found(http.post("/v1/detect", content=PNG, params={"model": "other"}))[0]["class_name"] == "rouge"
        assert http.post("/v2/repository/models/none/load").status_code == 404

        write_red_model(path, card=CARD.model_copy(update={"class_names": ["rosso", "large"]}))
        running.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 600
        while found(http.post("/v1/detect", content=PNG, params={"model": "other"}))[0]["class_name"] != "rosso":
            assert time.monotonic() < end
        assert running.stop() == 0


def test_loading_again_is_not_for_everybody(http: httpx.Client) -> None:
    assert http.post("/v2/repository/models/red/load").status_code == 403


# ------------------------------------------------------------------------------------------------ the token


def test_a_token(red_onnx: Path, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret\n")
    with (
        server(red_onnx, "--threads", "1", "--token-file", secret) as running,
        httpx.Client(base_url=running.url, timeout=600) as http,
    ):
        for path in ("/v1/models", "/metrics", "/v2/models/red", "/openapi.json", "/nothing"):
            refused = http.get(path)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"].startswith("a token is needed")
            for wrong in ("Bearer s3cre", "Bearer s3crets", "Basic s3cret", "s3cret", "Bearer", "Bearer \xff"):
                assert http.get(path, headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
        right = {"Authorization": "Bearer s3cret"}
        assert http.post("/v1/detect", content=PNG).status_code == 401
        assert http.post("/v1/detect", content=PNG, headers=right).status_code == 200
        for path in ("/", "/docs", "/page/app.js", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert http.get(path).status_code == 200
        assert len(Client(running.url, token="s3cret").detect(PNG)) == 1
        with pytest.raises(ServerError, match="401: a token is needed"):
            Client(running.url).detect(PNG)
        assert "s3cret" not in running.log_file.read_text()


# ----------------------------------------------------------------------------------------- the Python client


def test_the_client(red_server: Server, red_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with Client(red_server.url) as client:
        assert client.ready() and client.models()[0]["name"] == "red"
        (one,) = client.detect(path)
        assert one.box == (100.0, 100.0, 300.0, 200.0) and one.class_name == "red" and one.label == 0
        found = client.detect(str(path))
        assert found == client.detect(PNG) == client.detect(load_image(path)) == client.detect(Image.open(path))
        assert list(found) == [one] and found.class_names == ("red", "large red") and found.path == path
        assert found == deploy.open(red_onnx).detect(path)
        many = client.detect_many([path, encode(picture((96, 128), None)), PNG])
        assert [len(each) for each in many] == [1, 0, 1] and many[0] == many[2] == found
        assert len(client.detect(path, min_score=0.99)) == 0
        assert client.annotate(path).startswith(b"\xff\xd8\xff")
        with pytest.raises(ServerError, match="415: image: not a JPEG") as caught:
            client.detect(b"hello")
        assert caught.value.status == 415
        with pytest.raises(UserError, match="the file is missing"):
            client.detect(tmp_path / "none.png")
        with pytest.raises(UserError, match="uint8"):
            client.detect(np.zeros((4, 4), np.float32))
        client._connection.sock.shutdown(socket.SHUT_RDWR)  # a kept connection that broke is made again
        assert client.detect(PNG) == found
    with pytest.raises(ServerError, match="refused"):
        Client("http://127.0.0.1:9").detect(PNG)
    assert not Client("http://127.0.0.1:9").ready()
    for url in ("ftp://127.0.0.1", "http://h:99999", "http://[::1", "h:abc", ""):
        with pytest.raises(UserError, match="not the address"):
            Client(url)
    with pytest.raises(UserError, match="printable ASCII"):
        Client("http://127.0.0.1:9", token="s\xe9cret\u20ac")


# ------------------------------------------------------------------------------------------ the command line


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err.strip()


def test_mistakes_on_the_command_line(
    red_onnx: Path, tmp_path: Path, red_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    model = str(red_onnx)
    for arguments, message in (
        (["none.onnx"], "none.onnx: no such file"),
        ([str(ROOT / "README.md")], "ends in none of .onnx, .xml, .engine"),
        ([str(text)], "ONNX Runtime cannot load it"),
        ([model, model], "a second model named 'red': give NAME="),
        ([f"a b={model}"], "'a b': not a model name"),
        ([model, "--provider", "tpu"], "unknown provider 'tpu'"),
        ([model, "--max-queue", "4"], "--max-queue: 4 is less than one batch (--max-batch 16)"),
        ([model, "--deadline-ms", "inf"], "--deadline-ms: needs a finite number"),
        ([model, "--token-file", str(tmp_path / "none")], "--token-file"),
        ([model, "--port", red_server.url.rsplit(":", 1)[1]], "cannot listen there: Address already in use"),
        ([model, "--host", "256.0.0.1", "--port", "0"], "cannot listen there"),
    ):
        code, err = outcome(arguments, capsys)
        assert code == 2 and err.startswith("error: ") and message in err and "\n" not in err, (arguments, err)


def test_serving_loads_no_torch(red_onnx: Path) -> None:
    script = f"""
import sys, os, signal
from compress.cli import main
class Out:
    def write(self, text):
        sys.__stdout__.write(text)
        if text.startswith("ready: "):
            assert not {{"torch", "torchvision", "lightning", "onnx"}} & set(sys.modules), "heavy packages"
            os.kill(os.getpid(), signal.SIGINT)
    def flush(self):
        sys.__stdout__.flush()
sys.stdout = Out()
main(["serve", {str(red_onnx)!r}, "--port", "0", "--threads", "1"])
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert answer.returncode == 0 and "ready: http" in answer.stdout, answer.stderr
    assert "heavy" not in answer.stderr


def test_every_line_of_the_log_is_json(red_server: Server) -> None:
    rows = red_server.log()
    assert all({"time", "level", "message"} <= set(row) for row in rows)
    assert not any(row["level"] == "error" for row in rows), [row for row in rows if row["level"] == "error"]
    assert json.dumps(rows).count("Traceback") == 0
