"""Results of a benchmark, as they stand in the JSON file: `schema` is docs/benchmark.schema.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.core.errors import UserError
from deploy.core.files import write_json

SCHEMA_VERSION = 2

Scope = Literal["preprocess", "compute", "h2d+compute+d2h", "end_to_end"]
Scenario = Literal["single-stream", "multi-stream", "offline", "server"]
Verdict = Literal["faster", "slower", "slower, within tolerance", "no difference seen", "too few calls"]

Milliseconds = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(_Model):
    """A figure with its 95 % confidence interval.

    `low` and `high` are null when there are too few calls for the figure: then it describes these calls alone.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def supported(self) -> bool:
        return self.low is not None


class WarmUp(_Model):
    """Warm-up before the measurement. `stable` is false when the time limit ended it."""

    calls: int
    seconds: float
    stable: bool


class Cell(_Model):
    """One artifact in one scenario, scope and batch size."""

    runner: str
    backend: str
    scenario: Scenario
    scope: Scope
    clock: str
    """What took the times: `host` or, for the computation alone, what the backend names."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images a call; in the server scenario the most requests that are taken together."""
    streams: Annotated[int, Field(ge=1)]
    """Sessions that work at the same time, each with a thread of its own."""
    latency_ms: dict[str, Estimate]
    """`p50`, `p90`, `p95`, `p99`, `p99.9`: of a call; in the server scenario of a request, from its scheduled
    arrival."""
    mean_ms: Estimate
    throughput_ips: Estimate
    """Images a second."""
    offered_ips: float | None = None
    """Server scenario: mean rate of the arrivals."""
    start_delay_ms: float | None = None
    """Server scenario: p99 of how late an idle worker began; what the timer adds to every latency."""
    warm_up: WarmUp
    samples_ms: list[list[Milliseconds]]
    """Every measured call in the order of time, a list a block (a round, or a twentieth of a server run)."""
    images: list[int]
    """Images of each block."""
    wall_ms: list[Milliseconds]
    """Time that each block took; images over it is the throughput of the block."""

    @property
    def calls(self) -> int:
        return sum(len(samples) for samples in self.samples_ms)

    @property
    def key(self) -> tuple[Scenario, Scope, int, int, float | None]:
        """Return what must be equal for two cells to be compared, apart from the artifact."""
        return self.scenario, self.scope, self.batch_size, self.streams, self.offered_ips

    @property
    def where(self) -> str:
        """Describe the cell in words, apart from the artifact."""
        streams = f", {self.streams} streams" if self.streams > 1 else ""
        rate = "" if self.offered_ips is None else f", {self.offered_ips:.4g} requests/s"
        return f"{self.scenario}, {self.scope}, batch {self.batch_size}{streams}{rate}"


class Comparison(_Model):
    """One figure of `other` against the same figure of `base`."""

    base: str
    other: str
    where: str
    figure: str
    """`p50`, `p90`, …"""
    ratio: Estimate
    """Time of `other` over time of `base`: above 1 is slower."""
    probability_slower: Share
    """That a call of `other` takes longer than one of `base`, ties half: 0.5 is no effect (Mann-Whitney's U over
    the number of pairs)."""
    p_value: Share
    """Two-sided, of no difference."""
    p_adjusted: Share
    """After Holm's correction for all figures that were compared."""
    p_beyond_tolerance: Share
    """One-sided, of `other` being slower by no more than the tolerance; after Holm's correction."""
    verdict: Verdict


class Probe(_Model):
    """One trial of the search for the highest rate."""

    rate_ips: float
    requests: int
    over_bound: int
    """Requests beyond the bound when the trial ended; a trial ends early once it cannot pass any more."""
    passed: bool


class BoundedThroughput(_Model):
    """The highest arrival rate whose p99 stays within a bound, found by bisection and measured once more."""

    runner: str
    bound_ms: float
    rate_ips: float | None
    """None when no rate meets the bound; `reason` says why."""
    reason: str = ""
    probes: list[Probe]


class Reading(_Model):
    """The machine right after a slice. Null is what it does not tell."""

    second: float
    cpu_mhz: float | None
    """Mean over the cores."""
    load: float | None
    foreign_cpu: float | None
    """Share of all cores that other processes used since the reading before."""
    gpus: list[dict[str, Any]] | None
    """Clocks (MHz), power (W), temperature (°C), memory in use (MiB), reasons for throttling."""


class BenchmarkReport(_Model):
    schema_version: Literal[2] = 2
    cells: list[Cell]
    comparisons: list[Comparison] = []
    """Of each artifact with the first, where they were measured in turn."""
    bounded: list[BoundedThroughput] = []
    environment: dict[str, Any]
    settings: dict[str, Any]
    readings: list[Reading] = []
    notes: list[str] = []
    warnings: list[str] = []

    def cell(self, runner: str, batch_size: int = 1, scope: Scope = "end_to_end") -> Cell:
        """The first cell of that name; KeyError when it was not measured."""
        for cell in self.cells:
            if (cell.runner, cell.batch_size, cell.scope) == (runner, batch_size, scope):
                return cell
        raise KeyError((runner, batch_size, scope))

    def speedup(self, cell: Cell) -> Estimate | None:
        """p50 of the first artifact over that of `cell`; None for the first and where nothing was compared."""
        for found in self.comparisons:
            if (found.other, found.where, found.figure) == (cell.runner, cell.where, "p50"):
                ratio = found.ratio
                if ratio.low is None or ratio.high is None:
                    return Estimate(value=1 / ratio.value)
                return Estimate(value=1 / ratio.value, low=1 / ratio.high, high=1 / ratio.low)
        return None


def write_report(path: Path, report: BenchmarkReport) -> None:
    """The report as JSON, with every sample."""
    write_json(path, report.model_dump(mode="json"))


def read_report(path: Path) -> BenchmarkReport:
    """A report that `write_report` wrote. Raises UserError."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {'no such file' if not path.exists() else error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file; write one with compress benchmark --json") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        found = "no benchmark result" if version is None else f"a benchmark result of schema {version}"
        raise UserError(f"{path}: {found}; this program reads schema {SCHEMA_VERSION}: measure again with --json")
    try:
        return BenchmarkReport.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: bad benchmark result: {where}: {first['msg']}") from error
