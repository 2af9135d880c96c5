"""`compress doctor`: what is installed, what really works, and how to mend what does not.

`examine()` gives the findings, `show()` prints them. A finding is "broken" when commands would fail or give
wrong results; "absent" parts are only needed by some commands.
"""

from __future__ import annotations

import contextlib
import io
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from compress import __version__, foreign_kernels
from deploy.core.environment import usable_cores
from deploy.core.errors import first_line

TRAIN = (
    "torch",
    "torch-pruning",
    "torchvision",
    "lightning",
    "msgspec",
    "safetensors",
    "onnx",
    "onnxscript",
    "tensorboard",
)
SERVE = ("fastapi", "h11", "uvicorn", "python-multipart", "prometheus-client")
BASE = (
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "pyyaml",
    "pillow",
    "simplejpeg",
    "jinja2",
    "pycocotools",
)
OWNERS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-training",
)
"""Distributions that write one folder, `onnxruntime`. Others ask for one of them: onnxruntime-qnn for the first."""
KNOWN_OF_TENSORRT = {
    "10.3": "int8 engines of some detectors do not build with 10.3, JetPack 6's, and do with 10.7",
    "11.2": "11.2 was seen to fuse layers of some networks wrongly, in every precision: compress validate each engine",
}
OTHER_RUNTIMES = {
    "ai-edge-litert": "litert",
    "mnn": "mnn",
    "ncnn": "ncnn",
    "tract": "tract",
    "apache-tvm": "tvm",
}
"""Distribution → the extra that brings it, which is also its name in `compress export --for`."""
DISK_WANTED_GB = 5
CUDA_13_DRIVER = 580  # the first Linux driver series with CUDA 13
INSTALL_TRAIN = "pip install 'compress-detectors[train]'"
INSTALL_SERVE = "pip install 'compress-detectors[serve]'"
INSTALL_OPENVINO = "pip install 'compress-detectors[openvino]'"

# One Identity node, float32 [1], opset 17: the smallest model that makes a provider show whether it starts.
_IDENTITY_ONNX = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)


@dataclass(frozen=True)
class Finding:
    """One line of the table. `remedy` says what to do when the state is not "ok"."""

    part: str
    text: str
    state: Literal["ok", "absent", "broken"] = "ok"
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at this machine. Imports torch and onnxruntime if they are there; starts each provider once."""
    installed = installed_versions()
    driver = _nvidia_smi()
    return [
        check_python(sys.version_info[:2]),
        check_machine(),
        check_disk(shutil.disk_usage(Path.cwd()).free),
        check_kernels(foreign_kernels(), installed),
        check_base(installed),
        *check_train(installed),
        *check_import("torch", installed),
        *check_import("torchvision", installed),
        check_driver(driver, _torch_sees_cuda() if "torch" in installed else None),
        check_onnxruntime(installed, driver),
        *check_providers(installed),
        check_tensorrt(installed),
        check_openvino(installed, *(_openvino() if "openvino" in installed else ([], False))),
        check_other_runtimes(installed, shutil.which("onnx2tf")),
        check_serve(installed),
        check_optional("triton", installed, "comes with torch on Linux; only GPU kernels need it"),
    ]


def installed_versions() -> dict[str, str]:
    """Version of every installed distribution, by normalised name (`PyYAML` is `pyyaml`)."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a damaged installation has none
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return versions


def show(findings: list[Finding]) -> bool:
    """Print the table and the remedies. True when nothing is broken."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    marks = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[red]broken[/]"}
    table = Table(title=f"compress {__version__}", title_justify="left", box=None, pad_edge=False)
    for column in ("part", "state", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.part, marks[finding.state], finding.text.replace("[", r"\["))
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(f"{finding.part}: {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    return all(finding.state != "broken" for finding in findings)


# ------------------------------------------------------------------ checks, each a function of what was found


def check_python(version: tuple[int, ...]) -> Finding:
    """Check that Python is of a version that we run on."""
    text = ".".join(map(str, version)) + f" ({platform.python_implementation()})"
    if (3, 11) <= version[:2] <= (3, 13):
        return Finding("python", text)
    return Finding("python", text, "broken", "use Python 3.11, 3.12 or 3.13")


def check_machine() -> Finding:
    """Name the machine; nothing can be wrong with it."""
    return Finding("machine", f"{platform.system()} {platform.machine()}, {usable_cores()} cores")


def check_disk(free_bytes: int) -> Finding:
    """Check that there is room for checkpoints and caches."""
    free_gb = free_bytes / 1e9
    if free_gb >= DISK_WANTED_GB:
        return Finding("disk", f"{free_gb:.0f} GB free here")
    remedy = f"free {DISK_WANTED_GB} GB: checkpoints and caches need room"
    return Finding("disk", f"{free_gb:.1f} GB free here", "broken", remedy)


def check_kernels(hidden: str | None, installed: Mapping[str, str]) -> Finding:
    """Check that `import kernels` finds ours. hidden: what `foreign_kernels` says."""
    if hidden:
        return Finding("kernels", "hidden by another package", "broken", hidden)
    if "kernels" in installed:
        text = f"ours, but Hugging Face's kernels {installed['kernels']} is installed under the same name"
        remedy = (
            "pip uninstall -y kernels; pip install --force-reinstall --no-deps compress-detectors "
            "(the two overwrite each other's files)"
        )
        return Finding("kernels", text, "broken", remedy)
    return Finding("kernels", "ours")


def check_base(installed: Mapping[str, str]) -> Finding:
    """Packages that every command needs."""
    missing = [name for name in BASE if name not in installed]
    if missing:
        remedy = "pip install --force-reinstall compress-detectors"
        return Finding("base", f"missing {', '.join(missing)}", "broken", remedy)
    return Finding("base", ", ".join(f"{name} {installed[name]}" for name in BASE))


def check_serve(installed: Mapping[str, str]) -> Finding:
    """Packages of the server: all, or none."""
    missing = [name for name in SERVE if name not in installed]
    if len(missing) == len(SERVE):
        return Finding("serve", "not installed", "absent", f"for compress serve: {INSTALL_SERVE}")
    if missing:
        return Finding("serve", f"missing {', '.join(missing)}", "broken", INSTALL_SERVE)
    return Finding("serve", ", ".join(f"{name} {installed[name]}" for name in SERVE))


def check_train(installed: Mapping[str, str]) -> list[Finding]:
    """Packages of training: all, or none."""
    missing = [name for name in TRAIN if name not in installed]
    if len(missing) == len(TRAIN):
        remedy = f"to train, distill and export: {INSTALL_TRAIN}"
        return [Finding("train", "not installed", "absent", remedy)]
    if missing:
        return [Finding("train", f"missing {', '.join(missing)}", "broken", INSTALL_TRAIN)]
    if _release(installed["torch"]) < (2, 11):
        text = f"torch {installed['torch']} is older than 2.11"
        return [Finding("train", text, "broken", "pip install --upgrade torch torchvision")]
    return [Finding("train", ", ".join(f"{name} {installed[name]}" for name in TRAIN))]


def check_import(name: str, installed: Mapping[str, str]) -> list[Finding]:
    """Check that an installed package imports; no finding when it is not installed."""
    if name not in installed:
        return []
    try:
        import_module(name)
    except Exception as error:  # a torchvision built for another torch raises RuntimeError, a lost library OSError
        remedy = "pip install --force-reinstall torch torchvision (both from the same index)"
        return [Finding(name, f"does not import: {first_line(error)}", "broken", remedy)]
    return [Finding(name, f"{installed[name]} imports")]


def check_driver(driver: str | None, torch_sees_cuda: bool | None) -> Finding:
    """`driver` is nvidia-smi's line about the GPUs; `torch_sees_cuda` is None without torch."""
    if driver is None:
        return Finding("gpu", "no NVIDIA GPU or driver", "absent", "everything runs on the CPU, only slower")
    if torch_sees_cuda is False:
        remedy = "the driver is older than torch's CUDA, or torch is the CPU build: update one of them"
        return Finding("gpu", f"{driver}; torch does not see it", "broken", remedy)
    return Finding("gpu", driver)


def check_onnxruntime(installed: Mapping[str, str], driver: str | None) -> Finding:
    """Check that one ONNX Runtime is installed, and fits the driver."""
    found = {name: installed[name] for name in OWNERS if name in installed}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        remedy = "pip install --force-reinstall compress-detectors"
        return Finding("onnxruntime", "not installed", "broken", remedy)
    if len(found) > 1:
        remedy = (
            f"they overwrite each other's files, and the last one holds: pip uninstall -y {' '.join(found)}; "
            "pip install compress-detectors"
        )
        return Finding("onnxruntime", f"both {text.replace(', ', ' and ')}", "broken", remedy)
    major = re.search(r"driver (\d+)", driver or "")
    needs_cuda_13 = "onnxruntime-gpu" in found and _release(found["onnxruntime-gpu"]) >= (1, 27)
    if needs_cuda_13 and major and int(major[1]) < CUDA_13_DRIVER:
        remedy = (
            f"1.27 and later need CUDA 13, a driver of {CUDA_13_DRIVER} or later: update the driver, or "
            "pip install 'onnxruntime-gpu<1.27'"
        )
        return Finding("onnxruntime", f"{text}; the driver is too old for it", "broken", remedy)
    return Finding("onnxruntime", text)


def check_providers(installed: Mapping[str, str]) -> list[Finding]:
    """Start every provider that onnxruntime lists: listed only means compiled in."""
    if not {"onnxruntime", "onnxruntime-gpu"} & set(installed):
        return []
    try:
        import onnxruntime
    except Exception as error:
        remedy = "pip install --force-reinstall compress-detectors"
        return [Finding("providers", f"onnxruntime does not import: {first_line(error)}", "broken", remedy)]
    onnxruntime.set_default_logger_severity(4)  # a provider that cannot start would print pages
    starts: list[str] = []
    listed: list[str] = []
    for provider in onnxruntime.get_available_providers():
        (starts if _provider_starts(onnxruntime.InferenceSession, provider) else listed).append(
            provider.removesuffix("ExecutionProvider")
        )
    text = f"{', '.join(starts) or 'none'} start" + (f"; {', '.join(listed)} listed but do not" if listed else "")
    if "CPU" not in starts:
        return [Finding("providers", text, "broken", "pip install --force-reinstall compress-detectors")]
    gpu_libraries = "for CUDA: pip install 'compress-detectors[gpu]' and a driver" if "CUDA" in listed else ""
    return [Finding("providers", text, "ok", gpu_libraries)]


def check_tensorrt(installed: Mapping[str, str]) -> Finding:
    """Check that TensorRT, if installed, is of a version that we build with."""
    version = installed.get("tensorrt")
    if version is None:
        remedy = "only engines need it: pip install 'compress-detectors[trt]'"
        return Finding("tensorrt", "not installed", "absent", remedy)
    if _release(version)[:3] == (10, 2, 0):
        return Finding("tensorrt", version, "broken", "10.2.0 is known bad: pip install 'tensorrt>=10.3,<12'")
    if _release(version) < (10, 3) or _release(version) >= (12,):
        return Finding("tensorrt", version, "broken", "not supported: pip install 'tensorrt>=10.3,<12'")
    known = KNOWN_OF_TENSORRT.get(".".join(map(str, _release(version)[:2])))
    return Finding("tensorrt", version if known is None else f"{version}; {known}")


def check_other_runtimes(installed: Mapping[str, str], onnx2tf: str | None) -> Finding:
    """Name the runtimes of `compress export --for` that are here. onnx2tf: where litert's converter is."""
    found = [f"{extra} {installed[name]}" for name, extra in OTHER_RUNTIMES.items() if name in installed]
    if not found:
        remedy = f"only --for needs them: pip install 'compress-detectors[{','.join(OTHER_RUNTIMES.values())}]'"
        return Finding("other runtimes", "none", "absent", remedy)
    lacks = "ai-edge-litert" in installed and onnx2tf is None
    remedy = "--for litert makes its files with onnx2tf: pipx install onnx2tf" if lacks else ""
    text = ", ".join(found) + ("; no onnx2tf on PATH" if lacks else "")
    return Finding("other runtimes", text, "absent" if lacks else "ok", remedy)


def check_openvino(installed: Mapping[str, str], devices: Sequence[str] | str, bf16: bool = False) -> Finding:
    """Check that OpenVINO, if installed, is of a version that we know, and starts. devices: that it finds, or why it
    does not start. bf16: the CPU has bfloat16, in which OpenVINO then computes unless it is told otherwise."""
    version = installed.get("openvino")
    if version is None:
        remedy = f"only --provider openvino needs it: {INSTALL_OPENVINO}"
        return Finding("openvino", "not installed", "absent", remedy)
    if _release(version) < (2026, 4):
        return Finding("openvino", f"{version} is older than 2026.4", "broken", INSTALL_OPENVINO)
    if isinstance(devices, str):
        remedy = f"pip install --force-reinstall 'openvino=={version}'"
        return Finding("openvino", f"{version} does not start: {devices}", "broken", remedy)
    default = "; computes in bfloat16 where nothing says otherwise, which compress does" if bf16 else ""
    return Finding("openvino", f"{version}; finds {', '.join(devices) or 'no device'}{default}")


def check_optional(name: str, installed: Mapping[str, str], remedy: str) -> Finding:
    """A package that can be absent."""
    if name in installed:
        return Finding(name, installed[name])
    return Finding(name, "not installed", "absent", remedy)


# ---------------------------------------------------------------------------------------------- asking around


def _provider_starts(session: Callable[..., object], provider: str) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # onnxruntime prints its fallback there
            active = session(_IDENTITY_ONNX, providers=[provider]).get_providers()  # type: ignore[attr-defined]
    except Exception:  # each provider fails in its own way; the answer is the same
        return False
    return provider in active


def _nvidia_smi() -> str | None:
    """The GPUs and their driver, for example `NVIDIA L4, 23034 MiB, driver 570.86`, or None."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [", driver ".join(line.rsplit(", ", 1)) for line in answer.splitlines()]
    return "; ".join(lines) or None


def _openvino() -> tuple[list[str] | str, bool]:
    """The devices, or why OpenVINO does not start; and whether the CPU has bfloat16."""
    try:
        import openvino

        core = openvino.Core()
        bf16 = "CPU" in core.available_devices and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return list(core.available_devices), bf16
    except Exception as error:  # a lost library raises ImportError, a broken plugin RuntimeError
        return first_line(error), False


def _torch_sees_cuda() -> bool | None:
    try:
        import torch
    except Exception:  # reported by check_import
        return None
    return torch.cuda.is_available()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".") if number)  # type: ignore[index]
