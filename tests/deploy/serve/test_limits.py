"""Limits that no option sets, made small: connections, slow receivers, pixels of a request, bodies in memory."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.datastructures import MutableHeaders

from deploy.serve.batching import Ticket
from deploy.serve.bodies import Bodies
from deploy.serve.decode import check_together, decode
from deploy.serve.settings import OverloadedError, RefusalError
from tests.helpers.encoded_pictures import encode, png_that_claims
from tests.helpers.red_rectangle_model import CARD, picture, write_red_model
from tests.helpers.server_process import Server, server

SMALL = encode(picture((48, 64), (10, 10, 30, 30)))
HEAD = b"POST /v1/detect HTTP/1.1\r\nHost: a\r\n"


def until(true: Callable[[], bool], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def held_bytes(running: Server) -> float:
    text = httpx.get(f"{running.url}/metrics", timeout=600).text
    (line,) = [line for line in text.splitlines() if line.startswith("compress_held_bytes ")]
    return float(line.split()[1])


def depth(running: Server) -> float:
    text = httpx.get(f"{running.url}/metrics", timeout=600).text
    (line,) = [line for line in text.splitlines() if line.startswith("compress_queue_depth{")]
    return float(line.split()[1])


def ports_of(running: Server) -> set[int]:
    """Ports of the clients for whom the server, or the kernel after it, still has something to send."""
    theirs = [one for one in psutil.net_connections("tcp") if one.laddr.port == running.address[1] and one.raddr]
    return {connection.raddr.port for connection in theirs}


def closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_half_sent_bodies_lock_nobody_out(red_onnx: Path) -> None:
    """More of them than connections are allowed; a kept connection lives on, and new ones come in."""
    slow: list[socket.socket] = []
    with (
        server(red_onnx, limits={"max_connections": 20}) as running,
        httpx.Client(base_url=running.url, timeout=600) as kept,
    ):
        assert kept.post("/v1/detect", content=SMALL).status_code == 200
        try:
            for _ in range(25):
                slow.append(running.connect())
                slow[-1].sendall(HEAD + b"Content-Length: 1000\r\n\r\nabc")
            until(lambda: held_bytes(running) > 0)
            assert kept.post("/v1/detect", content=SMALL).status_code == 200  # httpx does not repeat a POST
            for _ in range(3):
                assert httpx.get(f"{running.url}/healthz", timeout=600).status_code == 200
                assert httpx.post(f"{running.url}/v1/detect", content=SMALL, timeout=600).status_code == 200
        finally:
            for connection in slow:
                connection.close()


def test_idle_connections_cost_nobody_an_upload(red_onnx: Path) -> None:
    idle: list[socket.socket] = []
    with server(red_onnx, limits={"max_connections": 20}) as running, running.connect() as uploading:
        uploading.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(SMALL) + SMALL[:20])
        until(lambda: held_bytes(running) > 0)  # before that, it is one of the idle
        try:
            idle += [running.connect() for _ in range(25)]
            until(lambda: all(closed(connection) for connection in idle[:6]))
            uploading.sendall(SMALL[20:])
            assert uploading.recv(65536).startswith(b"HTTP/1.1 200")
        finally:
            for connection in idle:
                connection.close()


def slow_receiver(address: tuple[str, int]) -> socket.socket:
    """Has asked for pictures that fill every buffer on the way, many times over, and reads nothing yet."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(600)
    connection.connect(address)
    noisy = encode(picture((2000, 2000), (100, 100, 300, 200), seed=1), "JPEG", quality=95)
    head = b"POST /v1/detect?annotate=1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(noisy)
    connection.sendall(head + noisy)
    return connection


def test_who_takes_his_answer_slowly_gets_all_of_it(red_onnx: Path) -> None:
    """It takes several times the idle timeout, and never pauses as long as the send timeout."""
    limits = {"idle_timeout_s": 1.0, "send_timeout_s": 300.0, "deadline_ms": 600_000.0}
    with server(red_onnx, limits=limits) as running, slow_receiver(running.address) as connection:
        answer = connection.recv(4096)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        wanted, got, start = int(fields[b"content-length"]), len(body), time.monotonic()
        assert wanted > 500_000
        while got < wanted:
            chunk = connection.recv(wanted // 60)
            assert chunk, f"cut after {got} of {wanted} bytes"
            got += len(chunk)
            time.sleep(max(0.0, start + 4.0 * got / wanted - time.monotonic()))
        assert time.monotonic() - start > 2.5


def test_who_does_not_take_his_answer_is_cut(red_onnx: Path) -> None:
    limits = {"idle_timeout_s": 1.0, "send_timeout_s": 2.0, "deadline_ms": 600_000.0}
    with server(red_onnx, limits=limits) as running, slow_receiver(running.address) as connection:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(100)
        wanted = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        client = connection.getsockname()[1]
        until(lambda: client not in ports_of(running))
        got = len(head)
        try:
            while chunk := connection.recv(65536):
                got += len(chunk)
        except ConnectionResetError:
            pass
        assert got < wanted, "the buffers held the whole answer: nothing was tested"


def test_answers_leave_at_once(red_server: Server) -> None:
    """With Nagle's algorithm the second half of each waits for the client's delayed acknowledgement, 40 ms, unless the
    client acknowledges at once: on any machine both take the same time."""
    times: dict[bool, list[float]] = {False: [], True: []}
    with red_server.connect() as connection:
        for number in range(80):
            at_once = number % 2 == 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, int(at_once))
            start = time.monotonic()
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            times[at_once].append(time.monotonic() - start)
    late, early = (sorted(times[at_once])[4] for at_once in (False, True))  # of some: others wait for the processor
    assert late < early + 0.03, times


def test_a_client_that_sends_ahead_and_leaves_is_noticed(tmp_path: Path) -> None:
    write_red_model(tmp_path / "slow.onnx", work=60)
    with server(tmp_path / "slow.onnx", "--threads", "1", "--max-batch", "1", "--deadline-ms", "60000") as running:
        clients = [running.connect() for _ in range(60)]
        for client in clients:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(SMALL) + SMALL)
        until(lambda: depth(running) > 40)
        for client in clients:
            client.sendall(b"G")
        time.sleep(0.1)
        for client in clients:
            client.close()
        until(lambda: depth(running) == 0)
        text = httpx.get(f"{running.url}/metrics", timeout=600).text
        assert float(text.split('compress_batch_size_count{model="slow"} ')[1].split()[0]) < 40, "worked for no one"


def test_requests_sent_ahead_are_all_answered(red_server: Server) -> None:
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(SMALL) + SMALL
    with red_server.connect() as connection:
        count = 400_000 // len(one)  # more than is read ahead
        thread = threading.Thread(target=connection.sendall, args=(one * count,))
        thread.start()
        got = b""
        while got.count(b"HTTP/1.1 200 OK") < count:
            chunk = connection.recv(65536)
            assert chunk, (got.count(b"HTTP/1.1 200 OK"), count)
            got += chunk
        thread.join()


def test_a_body_in_tiny_chunks_is_cut(red_server: Server) -> None:
    with red_server.connect() as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(200):
                connection.sendall(b"1\r\na\r\n" * 2000)
                time.sleep(0.005)
    chunks = (SMALL[k : k + 20] for k in range(0, len(SMALL), 20))  # small ones are taken
    assert httpx.post(f"{red_server.url}/v1/detect", content=chunks, timeout=600).status_code == 200


def test_a_broken_chunk_after_an_early_answer_is_no_error_of_ours(red_onnx: Path) -> None:
    with server(red_onnx) as running:
        for _ in range(3):
            with running.connect() as connection:
                head = HEAD.replace(b"/v1/detect", b"/nothing")
                connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 404")
                connection.sendall(b"zz\r\n")
                until(lambda: closed(connection))
        assert not [row for row in running.log() if row["level"] == "error"]


def test_many_large_pictures_in_one_request_are_refused() -> None:
    one = png_that_claims(1000, 1000)
    check_together([one] * 4, max_pixels=4_000_000)
    with pytest.raises(RefusalError, match="5000000 pixels together; at most 4000000") as caught:
        check_together([one] * 5, max_pixels=4_000_000)
    assert caught.value.status == 413
    with pytest.raises(RefusalError, match="image 1: not a"):
        check_together([one, b"text"], max_pixels=4_000_000)


def test_others_wait_for_a_decoder_no_longer_than_their_deadline(red_onnx: Path) -> None:
    """One worker, kept busy by large pictures: the 429 of the others comes on time, and what is late is not decoded."""
    large = encode(picture((3900, 3900), None), compress_level=1)  # flat: small, but not quick to decode
    limits = {"decode_workers": 1, "deadline_ms": 400.0}
    with server(red_onnx, limits=limits) as running, httpx.Client(base_url=running.url, timeout=600) as http:
        assert http.post("/v1/detect", content=SMALL, params={"deadline_ms": 400}).status_code in (200, 429)
        files = [("image", (str(k), large)) for k in range(8)]
        statuses: list[int] = []

        def occupy() -> None:
            statuses.append(httpx.post(f"{running.url}/v1/detect", files=files, timeout=600).status_code)

        thread = threading.Thread(target=occupy)
        thread.start()
        waits = []
        while thread.is_alive():
            start = time.monotonic()
            answer = http.post("/v1/detect", content=SMALL)
            assert answer.status_code in (200, 429)
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                waits.append(time.monotonic() - start)
        thread.join()
        assert statuses == [429]
        start = time.monotonic()
        decode(large, CARD, max_pixels=20_000_000, where="image")
        one_picture = time.monotonic() - start
        assert waits and max(waits) < 5 * 0.4 + 10 * one_picture, waits
        text = http.get("/metrics").text
        assert 'compress_rejected_total{model="red",reason="the deadline passed before it was decoded"}' in text


def test_a_late_ticket_says_so() -> None:
    ticket = Ticket(None, 1, time.monotonic() - 1)  # type: ignore[arg-type]
    assert ticket.left_s < 0 and ticket.late().status == 429 and ticket.late().retry_after_s == 1


class Arriving:
    """A request whose body comes when it is told to."""

    def __init__(self) -> None:
        self.headers = MutableHeaders()
        self.chunks: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def stream(self):  # type: ignore[no-untyped-def]
        while (chunk := await self.chunks.get()) is not None:
            yield chunk


@pytest.mark.parametrize(("kind", "held"), [("image/png", 600), ("Multipart/Form-Data; boundary=x", 1200)])
def test_the_parts_of_a_body_are_counted_beside_it(kind: str, held: int) -> None:
    async def work() -> None:
        bodies = Bodies(max_bytes=1000, max_held_bytes=2000, timeout_s=20.0)
        request = Arriving()
        request.headers["content-type"] = kind
        for chunk in (bytes(600), None):
            request.chunks.put_nowait(chunk)
        async with bodies.read(request) as data:  # type: ignore[arg-type]
            assert len(data) == 600 and bodies.held_bytes == held
        assert bodies.held_bytes == 0

    asyncio.run(work())


def test_bodies_that_make_room_are_told_to_come_back() -> None:
    async def work() -> None:
        bodies = Bodies(max_bytes=1000, max_held_bytes=1000, timeout_s=20.0)

        async def read(request: Arriving) -> bytes:
            async with bodies.read(request) as data:  # type: ignore[arg-type]
                return data

        slow, quick = Arriving(), Arriving()
        evicted = asyncio.create_task(read(slow))
        slow.chunks.put_nowait(bytes(600))
        await asyncio.sleep(0.01)
        assert bodies.held_bytes == 600
        for chunk in (bytes(900), None):
            quick.chunks.put_nowait(chunk)
        assert len(await read(quick)) == 900
        with pytest.raises(OverloadedError) as caught:
            await evicted
        assert caught.value.status == 429 and caught.value.retry_after_s == 1
        assert caught.value.reason == "too many bodies at one time"
        assert bodies.held_bytes == 0

    asyncio.run(work())
