"""The machine while it measures: clocks, power, temperature, memory, throttling, and who else uses the CPU.

GPUs are asked through NVML (pynvml) where that is installed. Readings are taken right after a slice of the
measurement, never within one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.latency.results import Reading

# nvmlClocksEventReasons, from nvml.h. Idle (1) and the user's own clock settings (2) are no throttling.
_THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


class Telemetry:
    """Takes readings between `with` and its end."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self._nvml: Any = None
        self._gpus: list[Any] = []

    def __enter__(self) -> Telemetry:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except Exception:  # no package, no driver, no permission: in each case nothing is known
            self._nvml = None
        self._start = time.perf_counter()
        self._before = _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()

    def read(self) -> None:
        now = _cpu_seconds()
        self.readings.append(
            Reading(
                second=round(time.perf_counter() - self._start, 3),
                cpu_mhz=_cpu_mhz(),
                load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                foreign_cpu=_foreign(self._before, now),
                gpus=None if self._nvml is None else [_gpu(self._nvml, handle) for handle in self._gpus],
            )
        )
        self._before = now


def troubles(readings: Sequence[Reading]) -> list[str]:
    """Reasons in the readings to doubt the figures."""
    found = []
    foreign = [reading.foreign_cpu for reading in readings if reading.foreign_cpu is not None]
    if foreign and sum(foreign) / len(foreign) > 0.1:
        found.append(f"other processes used {sum(foreign) / len(foreign):.0%} of the CPU during the measurement")
    count = max((len(reading.gpus or []) for reading in readings), default=0)
    for index in range(count):
        gpus = [reading.gpus[index] for reading in readings if reading.gpus and len(reading.gpus) > index]
        reasons = sorted({reason for gpu in gpus for reason in gpu["throttle_reasons"] or []})
        if reasons:
            found.append(f"GPU {index} was throttled: {', '.join(reasons)}")
        clocks = [gpu["sm_clock_mhz"] for gpu in gpus if gpu["sm_clock_mhz"]]
        if clocks and max(clocks) > 1.05 * min(clocks):
            found.append(f"the SM clock of GPU {index} moved between {min(clocks)} and {max(clocks)} MHz")
    return found


# ----------------------------------------------------------------------------------------------------


def _cpu_seconds() -> tuple[float, float, float] | None:
    """(all cores' busy seconds, this process's CPU seconds, all cores' seconds) since the system started."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    unit = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / unit, time.process_time(), sum(ticks) / unit


def _foreign(before: tuple[float, float, float] | None, now: tuple[float, float, float] | None) -> float | None:
    if before is None or now is None or now[2] - before[2] < 0.05:  # a few ticks say nothing
        return None
    busy, own, whole = (b - a for a, b in zip(before, now, strict=True))
    return round(min(max((busy - own) / whole, 0.0), 1.0), 3)


def _cpu_mhz() -> float | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError, IndexError):
        return None
    return round(sum(found) / len(found), 1) if found else None


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:  # not every board answers every question
            return None

    memory, power_mw = ask(nvml.nvmlDeviceGetMemoryInfo), ask(nvml.nvmlDeviceGetPowerUsage)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    return {
        "sm_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "power_w": None if power_mw is None else power_mw / 1000,
        "temperature_c": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "memory_used_mib": None if memory is None else round(memory.used / 2**20),
        "throttle_reasons": None if reasons is None else [text for bit, text in _THROTTLE.items() if reasons & bit],
    }
