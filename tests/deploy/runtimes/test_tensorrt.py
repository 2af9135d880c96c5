"""The TensorRT runner: everything on the host's side with a CUDA of NumPy arrays, and all of it where a GPU is.

In the fake, device memory is bytes at made-up addresses that only queued work may touch, work waits on the stream until
somebody synchronises, and the engine is ONNX Runtime on the very same file: what the runner returns must be what
ONNX Runtime gives.
"""

from __future__ import annotations

import ctypes.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from deploy.core.errors import UserError
from deploy.runtimes import tensorrt
from deploy.runtimes.base import DetectionBatch
from deploy.runtimes.onnx import OnnxRunner
from deploy.runtimes.open import open_runner
from deploy.runtimes.providers import ONNX_RUNTIME
from deploy.tensorrt.build import build_engine
from deploy.tensorrt.card import EngineOptions, TensorSpec, write_engine_card
from tests.helpers import tensorrt_rig
from tests.helpers.engine_cards import T4, engine_card
from tests.helpers.tiny_onnx import SIZE, pictures


class Memory:
    """Device memory: an address and bytes that are not written yet."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.content = address, np.full(size, 0xCD, np.uint8)

    def __int__(self) -> int:
        return self.address


class FakeCuda:
    """`deploy.runtimes.cuda.CudaDevice` without a device."""

    stream = 7

    def __init__(self, index: int = 0) -> None:
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.memory: dict[int, Memory] = {}
        self.inside, self.launches = 0, 0

    @contextmanager
    def active(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def put(self, work: Callable[[], None]) -> None:
        assert self.inside, "no context is current"
        (self.queue if self.recording is None else self.recording).append(work)

    def synchronize(self) -> None:
        assert self.inside and self.recording is None, "a capture must not be synchronised"
        while self.queue:
            self.queue.pop(0)()

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        return np.full(shape, 0x5A, dtype)

    def allocate(self, size: int) -> Memory:
        memory = Memory(4096 * (len(self.memory) + 1), size)
        self.memory[memory.address] = memory
        return memory

    def to_device(self, memory: Memory, host: np.ndarray) -> None:
        assert host.flags.c_contiguous

        def copy() -> None:
            memory.content[: host.nbytes] = host.view(np.uint8).reshape(-1)

        self.put(copy)

    def to_host(self, host: np.ndarray, memory: Memory) -> None:
        assert host.flags.c_contiguous

        def copy() -> None:
            host.view(np.uint8).reshape(-1)[:] = memory.content[: host.nbytes]

        self.put(copy)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        assert not self.queue, "work of before must be done"
        self.recording = []
        work()
        recorded, self.recording = self.recording, None

        def launch() -> None:
            self.launches += 1
            for step in recorded:
                self.put(step)

        return launch

    def time_ms(self, work: Callable[[], None]) -> float:
        work()
        self.synchronize()
        return 1.25


class FakeContext:
    """An execution context that runs the ONNX file, on what lies at the addresses it was told, at launch time."""

    def __init__(self, cuda: FakeCuda, model: OnnxRunner, limits: tuple[int, int]) -> None:
        self.cuda, self.model, self.limits = cuda, model, limits
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.shapes_set = 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in ("images", "boxes", "scores", "labels", "count")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape, self.shapes_set = shape, self.shapes_set + 1
        return name == "images" and self.limits[0] <= shape[0] <= self.limits[1]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.cuda.stream and self.limits[0] <= self.shape[0] <= self.limits[1]
        shape, told = self.shape, self.shapes_set

        def run() -> None:
            assert self.shapes_set == told, "TensorRT: a context must not change after its work was recorded"
            memory = self.cuda.memory
            images = memory[self.addresses["images"]].content[: int(np.prod(shape))].reshape(shape)
            found = self.model(np.ascontiguousarray(images))
            for name in ("boxes", "scores", "labels", "count"):
                value = np.ascontiguousarray(getattr(found, name))
                memory[self.addresses[name]].content[: value.nbytes] = value.view(np.uint8).reshape(-1)

        self.cuda.put(run)
        return True


@pytest.fixture
def reference(tiny_onnx: Path) -> OnnxRunner:
    return OnnxRunner(tiny_onnx, threads=1)


@pytest.fixture
def runner(
    reference: OnnxRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tensorrt.TensorRTRunner]:
    """A runner of an engine with these batches, on the fake. Its `_cuda` and `_context` tell what it did."""

    def make(batches: tuple[int, int, int] = (1, 2, 4), **arguments: Any) -> tensorrt.TensorRTRunner:
        path = tmp_path / "tiny.engine"
        path.write_bytes(b"engine")
        write_engine_card(path, engine_card(batches=batches))
        cuda = FakeCuda()
        limits = (batches[0], batches[2])
        monkeypatch.setattr(tensorrt, "CudaDevice", lambda index: cuda)
        monkeypatch.setattr(tensorrt, "load_tensorrt", lambda: SimpleNamespace())
        monkeypatch.setattr(tensorrt, "library", lambda trt: (T4.library, T4.version))
        monkeypatch.setattr(tensorrt, "this_machine", lambda library, version, device: T4)
        monkeypatch.setattr(
            tensorrt, "_load", lambda trt, data, path, version_compatible: lambda: FakeContext(cuda, reference, limits)
        )
        monkeypatch.setattr(tensorrt, "_last_error", lambda: "no reason")
        return tensorrt.TensorRTRunner(path, **arguments)

    return make


def same(found: DetectionBatch, wanted: DetectionBatch) -> None:
    for name in ("boxes", "scores", "labels", "count"):
        one, two = getattr(found, name), getattr(wanted, name)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("batches", [(1, 2, 4), (2, 2, 2), (3, 4, 8)])
def test_any_number_of_images_gives_what_the_file_gives(
    runner: Callable[..., tensorrt.TensorRTRunner],
    reference: OnnxRunner,
    batches: tuple[int, int, int],
    cuda_graph: bool,
) -> None:
    engine = runner(batches, cuda_graph=cuda_graph)
    for count in (1, 4, 2, 9, 1, 4):  # each batch size again, after others
        images = pictures(count, seed=count)
        assert images.any()
        same(engine(images), reference(images))
    assert engine.batches == (batches[0], batches[2])


def test_results_are_not_overwritten_by_the_next_call(runner: Callable[..., tensorrt.TensorRTRunner]) -> None:
    engine = runner()
    first = engine(pictures(2, seed=1))
    kept = DetectionBatch(*(getattr(first, name).copy() for name in ("boxes", "scores", "labels", "count")))
    engine(pictures(2, seed=2))
    same(first, kept)


def test_a_graph_is_recorded_once_a_batch_size(runner: Callable[..., tensorrt.TensorRTRunner]) -> None:
    engine = runner(cuda_graph=True)
    for _ in range(3):
        engine(pictures(2))
        engine(pictures(3))
    assert sorted(engine._graphs or ()) == [(2, True), (4, True)] and len(engine._contexts) == 3  # one is for batch 1
    assert engine._cuda.launches == 6  # type: ignore[attr-defined]
    assert engine.backend.endswith(" graph")


def test_memory_is_allocated_once_for_the_largest_batch(runner: Callable[..., tensorrt.TensorRTRunner]) -> None:
    engine = runner((1, 2, 4))
    sizes = {name: memory.content.nbytes for name, memory in engine._device.items()}
    assert sizes == {
        "images": 4 * 3 * SIZE[0] * SIZE[1],
        "boxes": 4 * 20 * 4 * 4,
        "scores": 4 * 20 * 4,
        "labels": 4 * 20 * 8,
        "count": 4 * 4,
    }
    before = len(engine._cuda.memory)  # type: ignore[attr-defined]
    for count in (1, 4, 7):
        engine(pictures(count))
    assert len(engine._cuda.memory) == before  # type: ignore[attr-defined]


def test_the_shape_is_only_set_when_it_changes(runner: Callable[..., tensorrt.TensorRTRunner]) -> None:
    engine = runner()
    for count in (2, 2, 2, 3, 3):
        engine(pictures(count))
    assert engine._context.shapes_set == 3 and len(engine._contexts) == 1  # 1 at the start, then 2, then 3


def test_the_steps_of_a_call(runner: Callable[..., tensorrt.TensorRTRunner], reference: OnnxRunner) -> None:
    engine = runner()
    images = pictures(3)
    engine.upload(images)
    for _ in range(2):
        engine.compute()
    assert engine.compute_ms() == 1.25
    same(engine.fetch(), reference(images))
    with pytest.raises(UserError, match="batch 5: built for at most 4"):
        engine.upload(pictures(5))


def test_threads_take_turns(runner: Callable[..., tensorrt.TensorRTRunner], reference: OnnxRunner) -> None:
    engine = runner()
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            images = pictures(1 + seed % 3, seed)
            for _ in range(5):
                same(engine(images), reference(images))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize("images", [pictures(1)[0], pictures(1).astype(np.float32), pictures(1)[:, :, :32]])
def test_wrong_images_are_one_line(runner: Callable[..., tensorrt.TensorRTRunner], images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"images must be uint8 \[batch, 3, 64, 96\]"):
        runner()(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": [TensorSpec(name="logits", dtype="fp32", shape=[-1, 5])]}, "not an engine of a deployable file"),
        ({"inputs": [TensorSpec(name="images", dtype="fp32", shape=[-1, 3, *SIZE])]}, "not an engine of a deployable"),
        ({"options": EngineOptions(refit="all", strip=True)}, "holds no weights: put them in with `compress refit"),
        ({"machine": T4.model_copy(update={"gpu": "NVIDIA L4", "compute_capability": "8.9"})}, "built on NVIDIA L4"),
        ({"precision": "int8"}, "called int8, but its convolutions and matrix products are 100% fp32"),
    ],
)
def test_engines_that_do_not_fit_are_refused(
    runner: Callable[..., tensorrt.TensorRTRunner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    runner()  # puts the fake in place
    write_engine_card(tmp_path / "tiny.engine", engine_card(**changes))
    with pytest.raises(UserError, match=message) as error:
        tensorrt.TensorRTRunner(tmp_path / "tiny.engine")
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path: Path, tiny_onnx: Path) -> None:
    with pytest.raises(UserError, match=r"ends in none of .onnx, .xml, .engine"):
        open_runner(tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"no such file|tensorrt is not installed"):
        open_runner(tmp_path / "none.engine")
    assert isinstance(open_runner(tiny_onnx), OnnxRunner)


# ----------------------------------------------------------------------------------------------- on a real GPU


@tensorrt_rig.needs_gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_real_engine_gives_what_onnxruntime_gives(
    tiny_onnx: Path, reference: OnnxRunner, tmp_path: Path, cuda_graph: bool
) -> None:
    path = tmp_path / "tiny.engine"
    build_engine(tiny_onnx, path, EngineOptions(batches=(1, 4, 8)), timing_caches=tmp_path)
    engine = tensorrt.TensorRTRunner(path, cuda_graph=cuda_graph)
    for count in (1, 8, 3, 11, 3):
        images = pictures(count, seed=count)
        found, wanted = engine(images), reference(images)
        np.testing.assert_array_equal(found.count, wanted.count)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-3)
    engine.upload(pictures(8))
    assert 0 < engine.compute_ms() < 1000


@tensorrt_rig.needs_device
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_bound_inputs_give_what_the_cpu_gives(tiny_onnx: Path, reference: OnnxRunner, provider: str) -> None:
    if ONNX_RUNTIME[provider] not in onnxruntime.get_available_providers():
        pytest.skip(f"this build of ONNX Runtime has no {ONNX_RUNTIME[provider]}")
    if provider == "tensorrt" and ctypes.util.find_library("nvinfer") is None:
        pytest.skip("TensorRT's library, libnvinfer, is not installed")
    runner = OnnxRunner(tiny_onnx, (provider, "cpu"))  # a provider that is there and does not come up is a failure
    images = pictures(4)
    runner.upload(images)
    runner.compute()
    found, wanted = runner.fetch(), reference(images)
    np.testing.assert_array_equal(found.count, wanted.count)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-3)
    same(runner(images), found)
