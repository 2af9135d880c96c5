"""The machine and the software that a measurement was made with."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "numpy",
    "pillow",
    "simplejpeg",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "torch",
    "torchvision",
    "pycocotools",
)


def environment() -> dict[str, Any]:
    """JSON types only. What cannot be read is None: absence of a fact is not a fact."""
    return {
        "cpu": {
            "model": _cpu_model(),
            "logical_cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "governor": _line_of(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "memory_gib": _memory_gib(),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "thread_variables": {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
        },
    }


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version, to compare: "2.6.9" → (2, 6, 9)."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def usable_cores() -> int:
    """Logical cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def integer_dot_product() -> bool:
    """Tell whether this machine multiplies uint8 by int8 without saturation (VNNI on x86; ARM always)."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False  # unknown: 7 bits are safe everywhere
    return bool({"avx512_vnni", "avx_vnni"} & set(flags.split()))


def gpus() -> list[dict[str, Any]] | None:
    """One entry a GPU, an empty list when the driver sees none, None when it cannot be told (no pynvml or no
    driver)."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: in each case nothing is known
        return None
    try:
        return [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


# ----------------------------------------------------------------------------------------------------


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    def ask(question: Any, *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:  # not every board answers every question
            return None

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    limit_mw = ask(nvml.nvmlDeviceGetPowerManagementLimit)
    name = ask(nvml.nvmlDeviceGetName)
    driver = nvml.nvmlSystemGetDriverVersion()
    return {
        "name": name.decode() if isinstance(name, bytes) else name,
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "memory_gib": None if memory is None else round(memory.total / 2**30, 1),
        "sm_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "power_limit_w": None if limit_mw is None else limit_mw / 1000,
        "temperature_c": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _line_of(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _version(package: str) -> str | None:
    module = sys.modules.get(package.replace("-", "_"))
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(module, "__version__", None)
