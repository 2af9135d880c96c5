"""Compressed bodies: every form that clients send, in pieces of any size; bombs, broken streams; what is answered."""

from __future__ import annotations

import gzip
import json
import random
import zlib

import httpx
import numpy as np
import pytest

from deploy.serve.encoding import Decoder, accepted, encode
from deploy.serve.settings import RefusalError
from tests.helpers.encoded_pictures import encode as encode_picture
from tests.helpers.red_rectangle_model import picture
from tests.helpers.server_process import Server

DATA = random.Random(0).randbytes(3000) + bytes(3000)
LIMIT = 10**6


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def decoded(headers: list[str], body: bytes, step: int = 7, most: int = LIMIT) -> bytes:
    decoder, out = Decoder(headers), b""
    for start in range(0, len(body), step):
        out += decoder.decode(body[start : start + step], most - len(out) + 1)
        if len(out) > most:
            return out
    decoder.finish()
    return out


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([], DATA),
        (["identity"], DATA),
        (["gzip"], gzip.compress(DATA)),
        ([" X-GZIP , identity"], gzip.compress(DATA)),
        (["gzip"], gzip.compress(DATA[:100]) + gzip.compress(b"") + gzip.compress(DATA[100:])),
        (["deflate"], zlib.compress(DATA)),
        (["Deflate", ""], raw_deflate(DATA)),
    ],
)
def test_bodies_come_out_as_they_were(headers: list[str], body: bytes, step: int) -> None:
    assert decoded(headers, body, step) == DATA


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb_gives_one_byte_more_than_is_taken(coding: str) -> None:
    bomb = encode(bytes(10**7), coding)
    assert len(bomb) < 10**5
    assert len(decoded([coding], bomb, step=1000, most=5000)) == 5001


@pytest.mark.parametrize(
    ("coding", "body", "says"),
    [
        ("gzip", b"", "ends too early"),
        ("gzip", b"\x1f", "ends too early"),
        ("gzip", gzip.compress(DATA)[:-1], "ends too early"),
        ("gzip", gzip.compress(DATA) + b"\x1f", "ends too early"),
        ("gzip", gzip.compress(DATA) + b"more", "cannot be decoded"),
        ("gzip", DATA, "cannot be decoded"),
        ("gzip", zlib.compress(DATA), "cannot be decoded"),
        ("gzip", gzip.compress(b"") * 1001, "has more after its end"),
        ("gzip", gzip.compress(DATA)[:-8] + bytes(8), "cannot be decoded"),  # another sum
        ("deflate", zlib.compress(DATA)[:-4], "ends too early"),
        ("deflate", zlib.compress(DATA) + b"more", "has more after its end"),
        ("deflate", b"\xff" * 50, "cannot be decoded"),
    ],
)
def test_broken_streams_are_refused(coding: str, body: bytes, says: str) -> None:
    with pytest.raises(RefusalError, match=f"^the {coding} body {says}$") as error:
        decoded([coding], body)
    assert error.value.status == 400


@pytest.mark.parametrize("headers", [["br"], ["zstd"], ["gzip, deflate"], ["gzip", "gzip"], ["nonsense" * 99]])
def test_other_codings_are_named(headers: list[str]) -> None:
    with pytest.raises(RefusalError, match=r"^Content-Encoding .{1,60} is not taken: use one of gzip, deflate, or none$"
                       ) as error:  # fmt: skip
        Decoder(headers)
    assert error.value.status == 415


@pytest.mark.parametrize(
    ("headers", "chosen"),
    [
        ([], None),
        ([""], None),
        (["gzip"], "gzip"),
        (["deflate"], "deflate"),
        (["br, deflate", "gzip"], "deflate"),
        (["gzip;q=0.5, deflate;q=0.8"], "deflate"),
        (["gzip ; q=0, identity"], None),
        (["identity, gzip;q=0.5"], None),
        (["identity;q=0.1, X-Gzip;Q=0.5"], "gzip"),
        (["*", "br"], None),
        (["gzip;q=nan", "deflate;q=1e9"], None),
    ],
)
def test_what_the_client_likes_best(headers: list[str], chosen: str | None) -> None:
    assert accepted(headers) == chosen
    if chosen is not None:
        assert decoded([chosen], encode(DATA, chosen)) == DATA


# --- a server --------------------------------------------------------------------------------------------


def test_pictures_may_be_compressed_and_limits_hold_for_what_comes_out(red_server: Server) -> None:
    body = encode_picture(picture((48, 64), (10, 10, 30, 30)))
    url = f"{red_server.url}/v1/detect"
    plain = httpx.post(url, content=body, timeout=600).json()["images"]
    for coding in ("gzip", "deflate"):
        headers = {"Content-Encoding": coding}
        found = httpx.post(url, content=encode(body, coding), headers=headers, timeout=600)
        assert found.status_code == 200 and found.json()["images"] == plain
        bomb = httpx.post(url, content=encode(bytes(64 * 2**20), coding), headers=headers, timeout=600)
        assert bomb.status_code == 413 and "decompressed too" in bomb.json()["error"]
        assert httpx.post(url, content=body, headers=headers, timeout=600).status_code == 400
    assert httpx.post(url, content=body, headers={"Content-Encoding": "br"}, timeout=600).status_code == 415
    with httpx.Client(base_url=red_server.url, timeout=600) as client:
        held = [line for line in client.get("/metrics").text.splitlines() if line.startswith("compress_held_bytes ")]
    assert held == ["compress_held_bytes 0.0"]


def test_only_tensors_come_back_compressed(red_server: Server) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 96, 128]}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 36864}}]}).encode()
    body = head + np.zeros(36864, np.uint8).tobytes()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Accept-Encoding": "gzip"}
    answer = httpx.post(f"{red_server.url}/v2/models/red/infer", content=body, headers=headers, timeout=600)
    assert (answer.headers["content-encoding"], answer.headers["vary"]) == ("gzip", "Accept-Encoding")
    assert answer.json()["outputs"][0]["name"] == "boxes"
    for path in ("/v2", "/v1/models"):
        found = httpx.get(f"{red_server.url}{path}", headers={"Accept-Encoding": "gzip"}, timeout=600)
        assert "content-encoding" not in found.headers
