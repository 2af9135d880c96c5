"""`compress serve` under load, on one machine over loopback, with the generator in the same run.

    python -m benchmarks serve                       everything: about 25 minutes on two quiet cores
    python -m benchmarks serve --quick               the same in two minutes, to see that it works
    python -m benchmarks serve --only curve overload

The model is a GFL with a ResNet-18 of random weights at 320 x 320 (as in `latency`), or `--onnx FILE`.

equality    5,000 requests of mixed sizes: every answer is that of `compress validate`, bit for bit
saturation  images a second: the raw runner on ready canvases, the server, the server without batching; in rounds
curve       open loop: p50 to p99.9 against the offered rate
overload    more than three times the capacity for a minute: p99 of the answered, the share of 429, and recovery
memory      resident memory over 20,000 good, broken and hostile files
sigterm     kill -TERM in the middle of the load, several times: accepted requests that were lost
slow        200 clients that send one byte a second: latency of the others

Every part is a case of its own: `equality`, `memory` and `sigterm` count requests and can take a small model, the
others measure speed. `--label NAME` keeps a part of another model beside the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.lib import child, options
from benchmarks.lib.load import LOST, Shot, Target, closed_loop, get, open_loop, percentiles
from benchmarks.lib.measure import ForeignCpu, range_row
from benchmarks.lib.results import Case, Row
from benchmarks.lib.server import started
from deploy.core.canvas import fit_canvas, to_original
from deploy.core.image import decode_image
from deploy.runtimes.onnx import OnnxRunner

SIZES = ((240, 320), (480, 640), (427, 640), (640, 480), (720, 1280), (333, 500))
DEADLINE_MS = 2000
OVERLOAD = 3.5  # times the capacity, so that it is more than three times when that was measured a little low


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--onnx", type=Path, help="exported file; default: GFL-R18 with random weights, exported now")
    options.threads(parser, None)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a few seconds a part: shows that it works")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))


def run(args: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        onnx = args.onnx or Path(name) / "student.onnx"
        if args.onnx is None:  # in a process of its own: torch and its threads must not be here while times are taken
            child.call("benchmarks.lib.random_student:export_random_student", str(onnx), 320, 320)
        bar = ">= 0.9" if args.onnx is None else ">= 0.4"
        bench = Bench(onnx, args.threads, args.max_batch, args.quick, _photographs(), bar)
        notes = args.onnx.name if args.onnx else "GFL-R18, random weights, 320 x 320"
        notes += f", {args.threads} threads, batches of at most {args.max_batch}{', quick' if args.quick else ''}"
        for part in args.only:
            with ForeignCpu() as other:
                rows = PARTS[part](bench)
            notes_of_part = notes if other.share < 0.1 else f"{notes}, busy: others used {other.share:.0%} of the CPUs"
            yield Case(part, [replace(row, notes=notes_of_part) for row in rows])


@dataclass(frozen=True)
class Bench:
    """Shared state of the parts: the file, how to serve it, and encoded pictures."""

    onnx: Path
    threads: int
    max_batch: int
    quick: bool
    bodies: list[bytes]
    saturation: str
    """Bar of the server's throughput over the runner's: small models leave HTTP and decoding the larger share."""

    @contextmanager
    def server(self, *more: str, log: Path | None = None) -> Iterator[tuple[Target, subprocess.Popen[str]]]:
        """`compress serve` on a free port, ready; with a line for each request in `log`, if there is one."""
        command = [sys.executable, "-m", "compress", "serve", str(self.onnx), "--port", "0"]
        command += ["--threads", str(self.threads), "--max-batch", str(self.max_batch), "--log-level"]
        command += ["warning" if log is None else "info"]
        command += ["--deadline-ms", str(DEADLINE_MS), *more]
        with contextlib.nullcontext() if log is None else log.open("w") as errors, started(command, errors) as found:
            yield found

    def clients(self) -> int:
        """Enough that a full batch waits while one runs."""
        return 2 * self.max_batch


# ---------------------------------------------------------------------------------------------- the parts


def equality(bench: Bench) -> list[Row]:
    """Every answer against that of validation, from one client and from many."""
    runner = OnnxRunner(bench.onnx, threads=bench.threads)
    bodies = bench.bodies if not bench.quick else bench.bodies[:12]
    wanted = [_alone(runner, body) for body in bodies]
    count = 200 if bench.quick else 5000
    wrong: Counter[str] = Counter()
    batches: Counter[int] = Counter()
    retries = 0

    def compare(shot: Shot) -> None:
        nonlocal retries
        retries += shot.retries
        if shot.status != 200:
            wrong[str(shot.status)] += 1
            return
        answer = json.loads(shot.body)
        batches[answer["batch"]] += 1
        rows = answer["images"][0]["detections"]
        boxes = np.array([row["box"] for row in rows], np.float32).reshape(-1, 4)
        scores = np.array([row["score"] for row in rows], np.float32)
        labels = np.array([row["label"] for row in rows], np.int64)
        if not all(np.array_equal(a, b) for a, b in zip((boxes, scores, labels), wanted[shot.index], strict=True)):
            wrong["other detections"] += 1

    with bench.server("--deadline-ms", "600000", "--max-queue", "512") as (target, _):
        for clients in (1, bench.clients()):
            share = count // 10 if clients == 1 else count - count // 10
            asyncio.run(closed_loop(target, bodies, clients=clients, count=share, on_shot=compare))
        accepted = _accepted(asyncio.run(get(target, "/metrics"))[1].decode())
    checked = sum(batches.values()) + sum(wrong.values()) - wrong["other detections"]
    print(f"wrong: {dict(wrong)}; requests by batch: {dict(sorted(batches.items()))}")
    right = checked - sum(wrong.values())
    return [
        Row("server", "requests answered with the bits of validation", right, n=checked, bar=f">= {count}"),
        Row("server", "requests accepted but not answered", abs(accepted - checked), bar="<= 0"),
        Row("server", "largest batch that requests shared", max(batches, default=0), bar=">= 2"),
        Row("server", "requests sent again", retries),
        Row("server", "detections", sum(len(row[1]) for row in wanted), n=len(bodies)),
    ]


def saturation(bench: Bench) -> list[Row]:
    """Measure in rounds, in turn: the runner alone at batch 1 and at the largest, the server with and without batching.

    The ratios are of one round each: median, least and greatest."""
    seconds = 3.0 if bench.quick else 12.0
    rounds = 1 if bench.quick else 7
    runner = OnnxRunner(bench.onnx, threads=bench.threads)
    canvases = np.stack([fit_canvas(decode_image(body), runner.card)[0] for body in bench.bodies[: bench.max_batch]])
    rates: dict[str, list[float]] = {}
    with (
        bench.server("--deadline-ms", "600000", "--max-queue", "512") as (batching, _),
        bench.server("--deadline-ms", "600000", "--max-queue", "512", "--max-batch", "1") as (single, _),
    ):
        cases: dict[str, Callable[[], float]] = {
            "runner, batch 1": lambda: _rate(runner, canvases[:1], seconds),
            f"runner, batch {len(canvases)}": lambda: _rate(runner, canvases, seconds),
            "server": lambda: _served_rate(bench, batching, seconds),
            "server without batching": lambda: _served_rate(bench, single, seconds),
        }
        for _ in range(rounds):
            for name, case in cases.items():
                rates.setdefault(name, []).append(case())
    rows = [range_row(name, "throughput", values, "images/s") for name, values in rates.items()]
    best = max((row for row in rows if row.variant.startswith("runner")), key=lambda row: row.value).variant
    for name, other, bar in (
        ("server over the better raw runner", best, bench.saturation),
        ("batching over no batching", "server without batching", ">= 1"),
    ):
        ratios = np.divide(rates["server"], rates[other]).tolist()
        rows.append(replace(range_row(name, "ratio", ratios, "×"), bar=bar))
    return rows


def curve(bench: Bench) -> list[Row]:
    """Open loop at shares of the capacity."""
    seconds = 5.0 if bench.quick else 40.0
    rows = []
    capacity = _capacity(bench)
    with bench.server() as (target, _):
        for share in (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2):
            shots = asyncio.run(open_loop(target, bench.bodies, rate=share * capacity, seconds=seconds))
            rows += _load_rows(f"{share:g} × capacity", shots, seconds)
    return [*rows, Row("server", "capacity", capacity, "images/s")]


def overload(bench: Bench) -> list[Row]:
    """More than three times the capacity for a minute, then ten requests one after the other."""
    seconds = 6.0 if bench.quick else 60.0
    capacity = _capacity(bench)
    with bench.server() as (target, _):
        shots = asyncio.run(open_loop(target, bench.bodies, rate=OVERLOAD * capacity, seconds=seconds))
        ended = time.monotonic()
        after = asyncio.run(closed_loop(target, bench.bodies, clients=1, count=10))
    answered_after = [shot for shot in after if shot.status == 200]
    statuses = Counter(shot.status for shot in shots)
    recovered_s = (answered_after or after[-1:])[0].done - ended
    refused = [shot for shot in shots if shot.status == 429]
    others, in_vain = len(shots) - statuses[200] - len(refused), sum(not shot.retry_after_s for shot in refused)
    rows = _load_rows("server", shots, seconds)
    found = {row.metric: row.value for row in rows}
    bars = {"p99": f"<= {2 * DEADLINE_MS}"}
    made = [
        *(replace(row, bar=bars.get(row.metric, "")) for row in rows),
        Row("server", "capacity", capacity, "images/s"),
        Row("server", "offered over answered", found["offered"] / found["answered"], "×", bar=">= 3"),
        Row("server", "answers that are neither 200 nor 429", others, n=len(shots), bar="<= 0"),
        Row("server", "429s without Retry-After", in_vain, n=len(refused), bar="<= 0"),
        Row("server", "answered over capacity", found["answered"] / capacity, "×", bar=">= 0.8"),
        Row("server", "requests answered afterwards", len(answered_after), n=len(after), bar=">= 1"),
        Row("server", "first answer afterwards", recovered_s, "s", bar=f"<= {DEADLINE_MS / 1e3:g}"),
    ]
    if refused:
        p99 = percentiles([shot.latency_s for shot in refused])["p99"]
        made.append(Row("server", "p99 of the refused", p99, "ms", n=len(refused)))
    return made


def memory(bench: Bench) -> list[Row]:
    """Resident megabytes of the server, every twentieth of the way."""
    count = 800 if bench.quick else 20_000
    small = [_encode(_photograph(size, 99 + k), "JPEG") for k, size in enumerate([(120, 160), (200, 100), (64, 64)])]
    rng = np.random.default_rng(0)
    hostile = [small[0][: len(small[0]) // 2], b"hello", rng.bytes(200_000), b"\x89PNG\r\n\x1a\n" + rng.bytes(5000)]
    hostile += [b"GIF89a\xff\xff\xff\xff" + rng.bytes(500), b"RIFF\0\0\0\0WEBPVP8X" + b"\xff" * 40, b""]
    bodies = [*small, *hostile, *(_encode(_photograph((90, 120), k), kind) for k, kind in enumerate(["PNG", "WEBP"]))]
    rows, statuses = [], Counter[int]()
    with bench.server("--deadline-ms", "600000") as (target, process):
        for _ in range(20):
            for shot in asyncio.run(closed_loop(target, bodies, clients=16, count=count // 20)):
                statuses[shot.status] += 1
            rows.append(_resident_mb(process.pid))
    grown = rows[-1] - rows[4]  # the first fifth fills pools and arenas
    print(f"statuses: {dict(statuses)}; resident MB on the way: {[round(row, 1) for row in rows]}")
    requests = sum(statuses.values())
    return [
        Row("server", "memory after the first fifth", rows[4], "MB"),
        Row("server", "memory at the end", rows[-1], "MB", n=requests),
        Row("server", "growth after the first fifth", 100 * grown / rows[4], "%", bar="<= 3"),
        Row("server", "answers of 500 and above, lost ones included", _bad(statuses), n=requests, bar="<= 0"),
    ]


def sigterm(bench: Bench) -> list[Row]:
    """A server that is told to end under load, in rounds."""
    rounds = 2 if bench.quick else 5
    statuses: Counter[int] = Counter()
    codes: list[int] = []
    retries = accepted = inside = 0
    for _ in range(rounds):
        with (
            tempfile.TemporaryDirectory() as folder,
            bench.server("--drain-seconds", "1", log=Path(folder) / "log") as (target, process),
        ):
            threading.Timer(3.0, process.send_signal, [signal.SIGTERM]).start()
            shots = asyncio.run(closed_loop(target, bench.bodies, clients=bench.clients(), seconds=5.0))
            codes.append(process.wait(120))
            statuses.update(shot.status for shot in shots)
            retries += sum(shot.retries for shot in shots)
            lines = [json.loads(line) for line in (Path(folder) / "log").read_text().splitlines()]
            accepted += sum(line.get("path") == "/v1/detect" for line in lines)
            inside += sum(line["requests"] for line in lines if line["message"] == "draining")
    answered = sum(count for status, count in statuses.items() if status > 0)
    print(f"statuses: {dict(statuses)}; exit codes: {codes}; requests sent again: {retries}")
    return [
        Row("server", "requests without an answer, or with half of one", statuses[LOST], n=accepted, bar="<= 0"),
        Row("server", "requests in the server's log but not answered", accepted - answered, n=accepted, bar="<= 0"),
        Row("server", "requests inside at SIGTERM", inside, bar=">= 1"),
        Row("server", "rounds that ended with exit code 0", codes.count(0), n=rounds, bar=f">= {rounds}"),
    ]


def slow(bench: Bench) -> list[Row]:
    """Four clients in a closed loop, alone and beside 200 slow ones; head, body and chunked, a byte a second."""
    seconds = 4.0 if bench.quick else 20.0
    with bench.server() as (target, _):
        alone = asyncio.run(closed_loop(target, bench.bodies, clients=4, seconds=seconds))
        with _slow_clients(target, 200):
            beside = asyncio.run(closed_loop(target, bench.bodies, clients=4, seconds=seconds))
    p99 = [percentiles([shot.latency_s for shot in shots])["p99"] for shots in (alone, beside)]
    rates = [sum(shot.status == 200 for shot in shots) / seconds for shots in (alone, beside)]
    rows = [Row(name, "throughput", rate, "images/s") for name, rate in zip(("alone", "beside"), rates, strict=True)]
    rows += [Row(name, "p99", value, "ms") for name, value in zip(("alone", "beside"), p99, strict=True)]
    return [
        *rows,
        Row("beside over alone", "throughput", rates[1] / rates[0], "×", bar=">= 0.9"),
        Row("alone over beside", "p99", p99[0] / p99[1], "×", bar=">= 0.7"),
    ]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "equality": equality,
    "saturation": saturation,
    "curve": curve,
    "overload": overload,
    "memory": memory,
    "sigterm": sigterm,
    "slow": slow,
}


# ------------------------------------------------------------------------------------------------- details


def _photographs() -> list[bytes]:
    """48 JPEGs of six sizes: smooth colour, noise and edges, about as large as photographs of these sizes."""
    return [_encode(_photograph(SIZES[k % len(SIZES)], k), "JPEG") for k in range(48)]


def _photograph(size_hw: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    height, width = size_hw
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    for _ in range(12):
        y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
        smooth[y : y + int(rng.integers(8, 90)), x : x + int(rng.integers(8, 90))] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def _encode(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, quality=88)
    return out.getvalue()


def _alone(runner: OnnxRunner, body: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `compress validate` finds in the file: boxes in its pixels, scores, labels."""
    pixels = decode_image(body)
    canvas, scale = fit_canvas(pixels, runner.card)
    out = runner(canvas[None])
    n = int(out.count[0])
    return (
        to_original(out.boxes[0, :n], scale, (pixels.shape[0], pixels.shape[1])),
        out.scores[0, :n],
        out.labels[0, :n],
    )


def _rate(runner: OnnxRunner, canvases: np.ndarray, seconds: float) -> float:
    """Images a second on ready canvases, after one call that does not count."""
    runner(canvases)
    start, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        runner(canvases)
        done += len(canvases)
    return done / passed


def _served_rate(bench: Bench, target: Target, seconds: float) -> float:
    """Images a second that come back: the slope of their count over time, because they come in batches of which a
    window of time would cut one. The first and the last second, in which queues fill and empty, do not count."""
    shots = asyncio.run(closed_loop(target, bench.bodies, clients=bench.clients(), seconds=seconds + 2))
    start = min(shot.due for shot in shots) + 1
    done = sorted(shot.done for shot in shots if shot.status == 200 and start <= shot.done < start + seconds)
    return float(np.polyfit(np.array(done) - start, np.arange(len(done)), 1)[0])


def _capacity(bench: Bench) -> float:
    """Count answers a second while no request is refused: as in `saturation`."""
    with bench.server("--deadline-ms", "600000", "--max-queue", "512") as (target, _):
        return _served_rate(bench, target, 4.0 if bench.quick else 15.0)


def _load_rows(variant: str, shots: list[Shot], seconds: float) -> list[Row]:
    """Rates, and latencies of the answered from the moment at which they were due."""
    answered = [shot.latency_s for shot in shots if shot.status == 200]
    return [
        Row(variant, "offered", len(shots) / seconds, "1/s", n=len(shots)),
        Row(variant, "answered", len(answered) / seconds, "1/s", n=len(answered)),
        Row(variant, "refused", sum(shot.status == 429 for shot in shots), n=len(shots)),
        *(Row(variant, name, ms, "ms", n=len(answered)) for name, ms in percentiles(answered).items() if answered),
    ]


def _accepted(metrics: str) -> int:
    """Requests to /v1/detect that the server counted, however they ended."""
    lines = re.findall(r"^compress_requests_total\{(.*)\} (\S+)$", metrics, re.MULTILINE)
    return int(sum(float(value) for labels, value in lines if 'route="/v1/detect"' in labels))


def _bad(statuses: Counter[int]) -> int:
    return sum(count for status, count in statuses.items() if status >= 500 or status < 0)


def _resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) / 1e3


@contextmanager
def _slow_clients(target: Target, count: int) -> Iterator[None]:
    """Each sends a byte a second for as long as the server lets it."""
    head = f"POST /v1/detect HTTP/1.1\r\nHost: {target.host}\r\n".encode()
    starts = (b"", head, head + b"Content-Length: 99999\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\n400\r\n")
    connections = []
    for k in range(count):
        connections.append(socket.create_connection((target.host, target.port)))
        connections[-1].sendall(starts[k % len(starts)])
    over = threading.Event()

    def drip() -> None:
        while not over.wait(1.0):
            for connection in connections:
                with contextlib.suppress(OSError):  # the server has cut it off
                    connection.send(b"a")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for connection in connections:
            connection.close()
