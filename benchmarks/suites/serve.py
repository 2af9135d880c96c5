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

Every part is a row of its own in the results file, with its model: `equality`, `memory` and `sigterm` count requests
and can take a small one, the others measure speed. `--label NAME` keeps a second row of a part, of another model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.lib import measure
from benchmarks.lib.load import LOST, Shot, Target, closed_loop, get, open_loop, percentiles
from deploy.core.files import write_json
from deploy.core.image import decode_image, fit_canvas, to_original
from deploy.runtimes.onnx import OnnxRunner

SIZES = ((240, 320), (480, 640), (427, 640), (640, 480), (720, 1280), (333, 500))
DEADLINE_MS = 2000
OVERLOAD = 3.5  # times the capacity, so that it is more than three times when that was measured a little low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, help="exported file; default: GFL-R18 with random weights, exported now")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of ONNX Runtime, on both sides")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--label", help="the rows are called `PART, LABEL`")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "serve.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        onnx = args.onnx or _export(Path(name) / "student.onnx")
        bench = Bench(onnx, args.threads, args.max_batch, args.quick, _photographs())
        shared = {
            "model": args.onnx.name if args.onnx else "GFL-R18, random weights, 320 x 320",
            "threads": args.threads, "max_batch": args.max_batch, "deadline_ms": DEADLINE_MS, "quick": args.quick,
        }  # fmt: skip
        results = {}
        for part in args.only:
            with measure.ForeignCpu() as other:
                result = PARTS[part](bench)
            row = part if args.label is None else f"{part}, {args.label}"
            results[row] = measure.record(**shared, **result, foreign_cpu=round(other.share, 3))
            print(f"{row}: {json.dumps({k: v for k, v in result.items() if k != 'rows'})}", flush=True)
            done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
            write_json(args.out, {**done, row: results[row]})  # a part that fails loses no other
    bars = [bar for result in results.values() for bar in result["bars"]]
    table = Table("bar", "wanted", "seen", "met")
    for bar in bars:
        table.add_row(bar["name"], f"{bar['wanted']:g}", f"{bar['seen']:g}", "yes" if bar["met"] else "NO")
    Console().print(table)
    print(f"written: {args.out}")
    if args.strict and not all(bar["met"] for bar in bars):
        sys.exit(1)


class Bench:
    """What the parts share: the file, how to serve it, and encoded pictures."""

    def __init__(self, onnx: Path, threads: int, max_batch: int, quick: bool, bodies: list[bytes]) -> None:
        self.onnx, self.threads, self.max_batch, self.quick, self.bodies = onnx, threads, max_batch, quick, bodies

    @contextmanager
    def server(self, *more: str, log: Path | None = None) -> Iterator[tuple[Target, subprocess.Popen[str]]]:
        """`compress serve` on a free port, ready; with a line for each request in `log`, if there is one."""
        command = [sys.executable, "-m", "compress", "serve", str(self.onnx), "--port", "0"]
        command += ["--threads", str(self.threads), "--max-batch", str(self.max_batch), "--log-level"]
        command += ["warning" if log is None else "info"]
        command += ["--deadline-ms", str(DEADLINE_MS), *more]
        with contextlib.nullcontext() if log is None else log.open("w") as errors:
            process = subprocess.Popen(command, cwd=measure.ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.match(r"ready: http://([\d.]+):(\d+)", line):
                    yield Target(match[1], int(match[2])), process
                    break
            else:
                raise RuntimeError(f"the server ended with {process.wait()}")
        finally:
            process.kill()
            process.wait()

    def clients(self) -> int:
        """Enough that a full batch waits while one runs."""
        return 2 * self.max_batch


# ---------------------------------------------------------------------------------------------- the parts


def equality(bench: Bench) -> dict[str, Any]:
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
    return {
        "requests": checked,
        "wrong": dict(wrong),
        "sent_again": retries,
        "detections": sum(len(row[1]) for row in wanted),
        "batches": {str(key): batches[key] for key in sorted(batches)},
        "bars": [
            measure.bar("requests answered with the bits of validation", count, checked - sum(wrong.values())),
            measure.bar("requests accepted by the server but not answered (negative)", 0, -abs(accepted - checked)),
            measure.bar("largest batch they shared", 2, max(batches, default=0)),
        ],
    }


def saturation(bench: Bench) -> dict[str, Any]:
    """In rounds, in turn: the runner alone at batch 1 and at the largest, the server with and without batching.

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
    median = {name: float(np.median(values)) for name, values in rates.items()}
    best = max((name for name in median if name.startswith("runner")), key=median.__getitem__)
    wanted = {"server / the better raw runner": (best, 0.9), "batching / no batching": ("server without batching", 1.0)}
    ratios = {name: np.divide(rates["server"], rates[other]) for name, (other, _) in wanted.items()}
    return {
        "images_per_s": {name: round(value, 2) for name, value in median.items()},
        "rounds": {name: [round(value, 2) for value in values] for name, values in rates.items()},
        "ratio_least_greatest": {name: [round(each.min(), 3), round(each.max(), 3)] for name, each in ratios.items()},
        "bars": [measure.bar(name, wanted[name][1], float(np.median(each))) for name, each in ratios.items()],
    }


def curve(bench: Bench) -> dict[str, Any]:
    seconds = 5.0 if bench.quick else 40.0
    rows = []
    capacity = _capacity(bench)
    with bench.server() as (target, _):
        for share in (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2):
            shots = asyncio.run(open_loop(target, bench.bodies, rate=share * capacity, seconds=seconds))
            rows.append({"offered_share": share, **_row(shots, seconds)})
    table = Table("offered, 1/s", "answered, 1/s", "429", "p50", "p90", "p99", "p99.9 ms")
    for row in rows:
        cells = (row[key] for key in ("offered_per_s", "answered_per_s", "refused", "p50", "p90", "p99", "p99.9"))
        table.add_row(*(f"{cell:.4g}" for cell in cells))
    Console().print(table)
    return {"capacity_per_s": round(capacity, 2), "rows": rows, "bars": []}


def overload(bench: Bench) -> dict[str, Any]:
    seconds = 6.0 if bench.quick else 60.0
    capacity = _capacity(bench)
    with bench.server() as (target, _):
        shots = asyncio.run(open_loop(target, bench.bodies, rate=OVERLOAD * capacity, seconds=seconds))
        ended = time.monotonic()
        after = asyncio.run(closed_loop(target, bench.bodies, clients=1, count=10))
        first = next((shot for shot in after if shot.status == 200), None)
    statuses = Counter(shot.status for shot in shots)
    answered = _row(shots, seconds)
    others = len(shots) - statuses[200] - statuses[429]
    recovered = float("inf") if first is None else first.done - ended
    return {
        "capacity_per_s": round(capacity, 2),
        **answered,
        "statuses": {str(key): value for key, value in statuses.items()},
        "first_answer_after_s": round(recovered, 3),
        "refused_p99_ms": round(percentiles([s.latency_s for s in shots if s.status == 429])["p99"], 2),
        "bars": [
            measure.bar("offered / answered", 3.0, answered["offered_per_s"] / answered["answered_per_s"]),
            measure.bar("2 x deadline / p99 of the answered", 1.0, 2 * DEADLINE_MS / answered["p99"]),
            measure.bar("answers that are neither 200 nor 429 (negative)", 0, -others),
            measure.bar("429s carry Retry-After", 1, all(s.retry_after_s for s in shots if s.status == 429)),
            measure.bar("answered / capacity", 0.8, answered["answered_per_s"] / capacity),
            measure.bar("deadline / first answer afterwards", 1.0, DEADLINE_MS / 1e3 / max(recovered, 1e-3)),
        ],
    }


def memory(bench: Bench) -> dict[str, Any]:
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
    return {
        "requests": sum(statuses.values()),
        "statuses": {str(key): value for key, value in statuses.items()},
        "resident_mb": [round(row, 1) for row in rows],
        "bars": [
            measure.bar("growth after the first fifth, % (negative)", -3.0, -100 * grown / rows[4]),
            measure.bar("answers of 500 and above, lost ones included (negative)", 0, -_bad(statuses)),
        ],
    }


def sigterm(bench: Bench) -> dict[str, Any]:
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
    return {
        "rounds": rounds,
        "sent_again": retries,
        "inside_at_sigterm": inside,
        "exit_codes": codes,
        "statuses": {str(key): value for key, value in statuses.items()},
        "bars": [
            measure.bar("requests without an answer, or with half of one (negative)", 0, -statuses[LOST]),
            measure.bar("requests in the server's log that nobody was answered (negative)", 0, answered - accepted),
            measure.bar("requests inside at SIGTERM", 1, inside),
            measure.bar("rounds that ended with exit code 0", rounds, codes.count(0)),
        ],
    }


def slow(bench: Bench) -> dict[str, Any]:
    """Four clients in a closed loop, alone and beside 200 slow ones; head, body and chunked, a byte a second."""
    seconds = 4.0 if bench.quick else 20.0
    with bench.server() as (target, _):
        alone = asyncio.run(closed_loop(target, bench.bodies, clients=4, seconds=seconds))
        with _slow_clients(target, 200):
            beside = asyncio.run(closed_loop(target, bench.bodies, clients=4, seconds=seconds))
        metrics = asyncio.run(get(target, "/metrics"))[1].decode()
    depth = re.search(r"^compress_queue_depth\S+ (\S+)", metrics, re.MULTILINE)
    p99 = [percentiles([shot.latency_s for shot in shots])["p99"] for shots in (alone, beside)]
    rates = [sum(shot.status == 200 for shot in shots) / seconds for shots in (alone, beside)]
    return {
        "images_per_s": [round(rate, 2) for rate in rates],
        "p99_ms": [round(value, 1) for value in p99],
        "queue_depth_after": None if depth is None else float(depth[1]),
        "bars": [
            measure.bar("throughput beside 200 slow clients / alone", 0.9, rates[1] / rates[0]),
            measure.bar("p99 alone / beside", 0.7, p99[0] / p99[1]),
        ],
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "equality": equality,
    "saturation": saturation,
    "curve": curve,
    "overload": overload,
    "memory": memory,
    "sigterm": sigterm,
    "slow": slow,
}


# ------------------------------------------------------------------------------------------------- details


def _export(path: Path) -> Path:
    """In a process of its own: torch and its threads must not be here while times are taken."""
    script = """
import sys
from pathlib import Path
from benchmarks.suites.latency import _canvases, _card, _images, _random_detector, CLASSES
from compress.export.deployable import Deployable
from deploy.graph.export import export_onnx
path, card = Path(sys.argv[1]), _card(CLASSES, (320, 320))
samples = _canvases(_images(None, path.parent)[:2], card)
export_onnx(Deployable.from_card(_random_detector(), card), card, path, samples=samples, max_batch=2)
"""
    subprocess.run([sys.executable, "-c", script, str(path)], cwd=measure.ROOT, check=True, stdout=subprocess.DEVNULL)
    return path


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
    """What `compress validate` finds in the file: boxes in its pixels, scores, labels."""
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
    """Answered a second when nobody is refused: as in `saturation`."""
    with bench.server("--deadline-ms", "600000", "--max-queue", "512") as (target, _):
        return _served_rate(bench, target, 4.0 if bench.quick else 15.0)


def _row(shots: list[Shot], seconds: float) -> dict[str, float]:
    """Latencies of the answered, from the moment at which they were due."""
    answered = [shot.latency_s for shot in shots if shot.status == 200]
    return {
        "offered_per_s": round(len(shots) / seconds, 2),
        "answered_per_s": round(len(answered) / seconds, 2),
        "refused": sum(shot.status == 429 for shot in shots),
        **{key: round(value, 2) for key, value in percentiles(answered).items()},
    }


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


if __name__ == "__main__":
    main()
