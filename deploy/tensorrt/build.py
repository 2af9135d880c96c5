"""ONNX file → TensorRT engine with a card beside it, and new weights into an existing engine.

`build_engine` and `refit_engine` use NVIDIA's `tensorrt` Python API, 10.x and 11.x alike, and neither torch nor onnx.
Precision is that of the ONNX graph; what is refused, and when, is in `deploy.tensorrt.card`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from deploy.core.card import METADATA_KEY, need_plain, parse_card
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, atomic_path, need_place, sha256_of
from deploy.core.progress import Progress
from deploy.tensorrt.card import (
    EngineCard,
    EngineOptions,
    Layers,
    Machine,
    Profile,
    TensorSpec,
    TimingCacheUse,
    claimed_precision,
    contradiction,
    open_engine,
    rebuild,
    remedy,
    this_machine,
    write_engine_card,
)
from deploy.tensorrt.network import (
    ParsedNetwork,
    compute_layers,
    format_name,
    library,
    load_engine,
    load_tensorrt,
    log,
    parse_network,
)

TIMING_CACHES = Path.home() / ".cache" / "compress" / "timing"
_REASONS = (
    (r"libnvinfer_lean", "a version-compatible engine needs TensorRT's lean runtime: pip install tensorrt_lean"),
    (r"graph_jit|CUDA_SUCCESS|cudaError|Cuda Runtime", "this needs a GPU and its driver"),
    (r"no runners that implement|Could not find any implementation", "give more --workspace-gb, or change this layer"),
    (r"[Oo]ut of memory|OutOfMemory", "give less --workspace-gb, or a smaller largest --batch"),
)


def build_engine(
    onnx: Path,
    engine: Path | None = None,
    options: EngineOptions | None = None,
    *,
    timing_caches: Path = TIMING_CACHES,
    progress: Progress | None = None,
) -> EngineCard:
    """Build `onnx` for this machine into `engine` (default: its name with .engine), with a card beside it.

    timing_caches: folder of timing caches; one is kept for each (ONNX SHA-256, TensorRT version, GPU, precision).
    progress(done, total) is called many times.

    Raises UserError, one line: the file is broken, TensorRT cannot build it, or it is not the precision that it is
    called. Nothing is left behind then, and what was at `engine` before stays.
    """
    onnx, options = Path(onnx), options or EngineOptions()
    engine = onnx.with_suffix(ENGINE_SUFFIX) if engine is None else Path(engine)
    if engine.suffix != ENGINE_SUFFIX:
        raise UserError(f"{engine}: an engine's name ends in {ENGINE_SUFFIX}")
    need_place(engine)
    parsed = parse_network(onnx)
    model = parse_card(parsed.facts.metadata.get(METADATA_KEY), str(onnx))
    need_plain(model, onnx, "engines are built")
    precision = claimed_precision(engine.name) or claimed_precision(onnx.name, model)
    compute = compute_layers(parsed.trt, parsed.network)
    if problem := contradiction(precision, compute, None):
        raise UserError(f"{onnx}: {problem}: {remedy(precision, model)}")

    machine = this_machine(*library(parsed.trt))
    onnx_sha256 = sha256_of(onnx)
    config = _configure(parsed, onnx, options, progress)
    profile = _add_profile(parsed, config, onnx, options)
    marked = _make_refittable(parsed, onnx, options)
    key = timing_cache_key(onnx_sha256, machine, precision)
    cache_file = Path(timing_caches) / f"{key}.cache"
    state = _use_timing_cache(parsed.trt, config, cache_file)

    start = time.perf_counter()
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    seconds = time.perf_counter() - start
    if getattr(config.progress_monitor, "interrupted", False):
        raise KeyboardInterrupt
    if plan is None:
        raise UserError(f"{onnx}: TensorRT does not build it: {_why_not(log().errors())}")
    data = bytes(plan)
    _keep_timing_cache(config, cache_file)

    layers, missing = inspect_layers(parsed.trt, data, version_compatible=options.version_compatible)
    if problem := contradiction(precision, compute, layers):
        raise UserError(f"{onnx}: {problem}; the engine was not written")
    card = EngineCard(
        engine=engine.name,
        engine_sha256=hashlib.sha256(data).hexdigest(),
        engine_bytes=len(data),
        onnx=onnx.name,
        onnx_sha256=onnx_sha256,
        structure_sha256=parsed.facts.structure_sha256,
        precision=precision,
        machine=machine,
        options=options,
        profiles=[profile],
        inputs=[_spec(parsed.network.get_input(i)) for i in range(parsed.network.num_inputs)],
        outputs=[_spec(parsed.network.get_output(i)) for i in range(parsed.network.num_outputs)],
        network=compute,
        layers=layers,
        layers_missing=missing,
        refittable_weights=marked,
        weights_sha256={} if options.refit is None else parsed.facts.weights,
        timing_cache=TimingCacheUse(key=key, state=state),
        build_seconds=round(seconds, 3),
        model=model,
        created=_now(),
    )
    _write(engine, data, card)
    return card


def refit_engine(engine: Path, onnx: Path, out: Path | None = None) -> EngineCard:
    """Put the weights of `onnx` into a refittable engine and write it to `out` (default: over `engine`).

    The two must have the same structure, as a student has that was trained again. A stripped engine becomes a whole
    one. Needs the GPU that the engine was built for. Raises UserError.
    """
    engine, onnx = Path(engine), Path(onnx)
    out = engine if out is None else Path(out)
    if out.suffix != ENGINE_SUFFIX:
        raise UserError(f"{out}: an engine's name ends in {ENGINE_SUFFIX}")
    need_place(out)
    trt = load_tensorrt()
    data, card = open_engine(engine, this_machine(*library(trt)))
    if card.options.refit is None:
        raise UserError(f"{engine}: built without --refit or --strip, its weights are fixed: {rebuild(card)}")
    parsed = parse_network(onnx)
    model = parse_card(parsed.facts.metadata.get(METADATA_KEY), str(onnx))
    need_plain(model, onnx, "engines are built")
    if parsed.facts.structure_sha256 != card.structure_sha256:
        raise UserError(f"{onnx}: not the structure that {engine} was built from (layers, shapes or constants differ)")
    changed = {name for name, digest in parsed.facts.weights.items() if card.weights_sha256.get(name) != digest}
    refitted = _refit(trt, data, engine, onnx, changed, card.options.version_compatible)
    new = card.model_copy(
        update={
            "engine": out.name,
            "engine_sha256": hashlib.sha256(refitted).hexdigest(),
            "engine_bytes": len(refitted),
            "onnx": onnx.name,
            "onnx_sha256": sha256_of(onnx),
            "options": card.options.model_copy(update={"strip": False}),
            "refitted_from": card.engine_sha256,
            "weights_sha256": parsed.facts.weights,
            "model": model,
            "created": _now(),
        }
    )
    _write(out, refitted, new)
    return new


def inspect_layers(trt: Any, engine: bytes, *, version_compatible: bool = False) -> tuple[Layers | None, str]:
    """Layers of a built engine and the share of each number format, and if that cannot be had None and why."""
    loaded = load_engine(trt, engine, version_compatible=version_compatible)
    if loaded is None:
        return None, f"the engine does not load here: {_why_not(log().errors())}"
    inspector = loaded.create_engine_inspector()
    try:
        information = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except ValueError as error:
        return None, f"the inspector's answer is not JSON: {error}"
    return layer_formats(information)


def layer_formats(information: dict[str, Any]) -> tuple[Layers | None, str]:
    """`inspect_layers` from the inspector's JSON, of TensorRT 10 (`Format/Datatype`) or 11 (`DataType`).

    A layer counts as the narrowest floating or int8 format among its inputs and outputs: a convolution that reads int8
    and writes fp16 runs on int8. Layers that only handle integers and booleans count as those.
    """
    layers = information.get("Layers") or []
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    if not detailed:
        return None, "the inspector lists no details: was the engine built with profiling verbosity DETAILED?"
    order = ("int8", "fp8", "fp4", "fp16", "bf16", "fp32", "int32", "int64", "uint8", "bool")
    formats: Counter[str] = Counter()
    for layer in detailed:
        ends = [*(layer.get("Inputs") or []), *(layer.get("Outputs") or [])]
        texts = [end.get("DataType") or end.get("Datatype") or end.get("Format/Datatype") for end in ends]
        names = {format_name(text) for text in texts if text}
        formats[next((name for name in order if name in names), "other")] += 1
    total = sum(formats.values())
    return Layers(count=total, share={name: round(count / total, 4) for name, count in formats.most_common()}), ""


def timing_cache_key(onnx_sha256: str, machine: Machine, precision: str | None) -> str:
    """Everything that measured kernel times hold for, as a file name."""
    parts = (onnx_sha256[:16], machine.library, machine.version, machine.gpu or "no GPU", precision or "as exported")
    return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)


# ----------------------------------------------------------------------------------------------------


def _configure(parsed: ParsedNetwork, onnx: Path, options: EngineOptions, progress: Progress | None) -> Any:
    trt = parsed.trt
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector has nothing to say
    config.builder_optimization_level = options.optimization_level
    if options.workspace_gb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * 1e9))
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible is not None:
        levels = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
        level = getattr(trt.HardwareCompatibilityLevel, levels[options.hardware_compatible], None)
        if level is None:
            raise UserError(f"{onnx}: this TensorRT has no hardware compatibility '{options.hardware_compatible}'")
        config.hardware_compatibility_level = level
    if options.refit == "all":
        config.set_flag(trt.BuilderFlag.REFIT)
    elif options.refit == "individual":
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if options.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    return config


def _add_profile(parsed: ParsedNetwork, config: Any, onnx: Path, options: EngineOptions) -> Profile:
    """One optimisation profile over the batch, which must be the only dynamic dimension."""
    if parsed.network.num_inputs != 1:
        raise UserError(f"{onnx}: {parsed.network.num_inputs} inputs; a deployable file has one, `images`")
    images = parsed.network.get_input(0)
    shape = list(images.shape)
    if [size for size in shape[1:] if size < 0]:
        raise UserError(f"{onnx}: input {images.name} is {shape}: only the batch may be dynamic")
    if shape[0] > 0 and set(options.batches) != {shape[0]}:
        raise UserError(f"{onnx}: exported for a batch of {shape[0]}: give --batch {shape[0]}, or export it dynamic")
    shapes = [[batch, *shape[1:]] for batch in options.batches]
    profile = parsed.builder.create_optimization_profile()
    profile.set_shape(images.name, *shapes)
    config.add_optimization_profile(profile)
    return Profile(input=images.name, min=shapes[0], opt=shapes[1], max=shapes[2])


def _make_refittable(parsed: ParsedNetwork, onnx: Path, options: EngineOptions) -> list[str] | None:
    """Mark each floating-point weight for refit "individual". Their names; None when it is all or none of them."""
    if options.refit != "individual":
        return None
    marked = [name for name in parsed.facts.weights if parsed.network.mark_weights_refittable(name)]
    if not marked:
        raise UserError(f"{onnx}: TensorRT knows none of its weights by name, so none can be replaced: use --refit all")
    return marked


def _use_timing_cache(trt: Any, config: Any, file: Path) -> str:
    """Give TensorRT the timings of an earlier build, if there are any. "new", "reused" or "not accepted: why"."""
    old = file.read_bytes() if file.is_file() else b""
    before = len(log().messages)
    accepted = config.set_timing_cache(config.create_timing_cache(old), False)
    if not old:
        return "new"
    messages = [message for _, message in log().messages[before:]]
    if accepted and not any(re.search(r"timing cache", message, re.IGNORECASE) for message in messages):
        return "reused"
    return f"not accepted: {_why_not(log().errors()) or 'no reason'}"


def _keep_timing_cache(config: Any, file: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    with atomic_path(file) as temporary:
        temporary.write_bytes(bytes(cache.serialize()))


def _refit(trt: Any, data: bytes, engine: Path, onnx: Path, changed: set[str], version_compatible: bool) -> bytes:
    """The engine with the weights of `onnx`; `changed` names those that differ from the engine's."""
    loaded = load_engine(trt, data, version_compatible=version_compatible)
    if loaded is None:
        raise UserError(f"{engine}: does not load here: {_why_not(log().errors())}")
    refitter = trt.Refitter(loaded, log().logger)
    fixed = sorted(changed - set(refitter.get_all_weights()))
    if fixed:
        raise UserError(f"{onnx}: {len(fixed)} weights changed that {engine} cannot replace: {', '.join(fixed[:3])}")
    parser = trt.OnnxParserRefitter(refitter, log().logger)
    if not parser.refit_from_file(str(onnx)):
        problems = [parser.get_error(i).desc() for i in range(parser.num_errors)] or log().errors() or ["no reason"]
        raise UserError(f"{onnx}: its weights do not fit {engine}: {' '.join(problems[0].split())}")
    missing = refitter.get_missing_weights()
    if missing or not refitter.refit_cuda_engine():
        reason = f"no weights for {', '.join(missing[:3])}" if missing else _why_not(log().errors())
        raise UserError(f"{onnx}: its weights do not fit {engine}: {reason}")
    config = loaded.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(loaded.serialize_with_config(config))


def _monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT's nested phases as one fraction of 1000: each phase fills the current step of its parent."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._best = 0
            self._phases: dict[str, list[Any]] = {}  # name → [parent, steps, steps done]

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [parent_phase, max(num_steps, 1), 0]

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._phases:
                    self._phases[phase_name][2] = step + 1
                self._best = max(self._best, min(int(1000 * self._fraction(phase_name)), 1000))
                progress(self._best, 1000)
            except KeyboardInterrupt:  # it must not fly through TensorRT's own code
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            phase = self._phases.pop(phase_name, None)
            if phase is not None and phase[0] is None:
                progress(1000, 1000)

        def _fraction(self, name: str) -> float:
            within, phase = 0.0, self._phases.get(name)
            while phase is not None:
                within = min((phase[2] + within) / phase[1], 1.0)
                phase = self._phases.get(phase[0])
            return within

    return Monitor()


def _why_not(errors: list[str]) -> str:
    """TensorRT's last error in one line, with a hint when we know one."""
    reason = errors[-1] if errors else "it gives no reason"
    hint = next((hint for pattern, hint in _REASONS if re.search(pattern, " ".join(errors))), "")
    return f"{reason}{f': {hint}' if hint else ''}"


def _spec(tensor: Any) -> TensorSpec:
    return TensorSpec(name=tensor.name, dtype=format_name(tensor.dtype.name), shape=list(tensor.shape))


def _write(engine: Path, data: bytes, card: EngineCard) -> None:
    """Engine first: should this be cut short, the old card refuses the new engine."""
    with atomic_path(engine) as temporary:
        temporary.write_bytes(data)
    write_engine_card(engine, card)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
