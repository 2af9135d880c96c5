"""An exported file in ONNX Runtime Web, as a page computes it: WebAssembly on one thread, here in Node. No torch.

`node` is called when one opens; the runtime comes from where `compress export --for web` has it (`web_runtime`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np

from deploy.core.card import METADATA_KEY, OUTPUTS, network_precision, parse_card
from deploy.core.errors import UserError
from deploy.core.files import write_text
from deploy.core.onnx_scan import scan_onnx
from deploy.runtimes.base import DetectionBatch, check_images, in_form
from deploy.runtimes.web_runtime import runtime_files

_PROGRAM = Path(__file__).with_name("web_runner.mjs")


class WebRunner:
    """Runs `path` in a process of its own, which ends with this object.

    Raises UserError: there is no node or no runtime, the file has its weights elsewhere or is bf16, and for what the
    runtime says.
    """

    backend, on_cpu = "onnxruntime-web wasm", True

    def __init__(self, path: Path) -> None:
        self.path = path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        facts = scan_onnx(path)
        self.card = parse_card(facts.metadata.get(METADATA_KEY), str(path))
        if facts.external:
            raise UserError(f"{path}: has its weights in {facts.external[0]}; provider web takes one file")
        if network_precision(self.card.precision) == "bf16":
            raise UserError(f"{path}: is bf16, which ONNX Runtime Web does not compute: --provider openvino runs it")
        heads = self.card.form.heads
        self._names = list(OUTPUTS) if heads is None else heads.names
        self._lock = threading.Lock()
        self._process = self._started()
        self._answer()

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        images = np.ascontiguousarray(images)
        line = json.dumps({"type": str(images.dtype), "dims": images.shape}).encode()
        with self._lock:
            try:
                to = _pipe(self._process.stdin)
                to.write(len(line).to_bytes(4, "little") + line)
                to.write(images.data)
                to.flush()
            except OSError:
                raise UserError(f"{self.path}: node ended, in the middle of its work") from None
            found = self._answer()
        if missing := [name for name in self._names if name not in found]:
            raise UserError(f"{self.path}: not a deployable file: it gives no {', '.join(missing)}")
        return [found[name] for name in self._names]

    def _started(self) -> subprocess.Popen[bytes]:
        node = shutil.which("node")
        if node is None:
            raise UserError("provider web: there is no node on PATH; ONNX Runtime Web runs in it here")
        runtime = runtime_files()
        write_text(runtime / "package.json", '{"type": "module"}\n')  # or Node takes its .js files for older scripts
        words = [node, str(_PROGRAM), str(runtime), str(self.path)]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        weakref.finalize(self, _end, process)
        return process

    def _answer(self) -> dict[str, np.ndarray]:
        """The outputs by their names. Raises UserError for an error of the runtime, and where the process is gone."""
        line = json.loads(self._read(int.from_bytes(self._read(4), "little")))
        if "error" in line:
            raise UserError(f"{self.path}: ONNX Runtime Web cannot run it: {line['error']}")
        found = {}
        for output in line["outputs"]:
            kind = np.dtype(output["type"])
            data = self._read(int(np.prod(output["dims"], dtype=np.int64)) * kind.itemsize)
            found[output["name"]] = np.frombuffer(data, kind).reshape(output["dims"])
        return found

    def _read(self, count: int) -> bytes:
        data = _pipe(self._process.stdout).read(count)
        if len(data) < count:
            raise UserError(f"{self.path}: node ended, in the middle of its work")
        return data


# --- details --------------------------------------------------------------------------------------------


def _pipe(pipe: IO[bytes] | None) -> Any:
    assert pipe is not None, "started with pipes"
    return pipe


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not sent is lost with the process
                pipe.close()
