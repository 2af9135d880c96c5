"""What each group of channels alone costs: the mAP of the detector that keeps a share of them, and everything else.

    found = sensitivity(graph, scores, detector, mean_ap, store=Path("sensitivity.json"), identity={"images": ...})
    found.rows[0]           # Row("backbone.stem.0", ((0.75, 71.0), (0.5, 68.2), (0.25, 40.9)))
    found.drops             # of `compress.prune.order.blocks`, where shares are by sensitivity

Everything is measured before any training, so that a drop says in which order layers should lose channels, not what
a trained detector would lose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.detectors.base import Detector
from compress.manifest import fingerprint
from compress.prune.cut import cut
from compress.prune.graph import PruningGraph
from compress.prune.order import Block, Drops, blocks, leaving
from deploy.core.errors import UserError
from deploy.core.files import write_json
from deploy.core.progress import Progress

SHARES = (0.75, 0.5, 0.25)
"""Shares of a group's channels that are tried, each rounded to the nearest width that the group can have."""


@dataclass(frozen=True)
class Row:
    """A group of channels.

    points: (share of the channels that stay, mAP in percent), the largest share first.
    """

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Sensitivity:
    """The mAP (percent) of the whole detector, and of those where one group alone lost channels."""

    map: float
    rows: tuple[Row, ...]

    @property
    def drops(self) -> Drops:
        """What a group's loss of channels costs: never less than nothing, nor less than what a smaller loss costs.
        Without any channel all mAP is taken for lost, so that no group is emptied for free beyond the last share."""
        found = {}
        for row in self.rows:
            points, most = [], 0.0
            for share, value in row.points:
                most = max(most, self.map - value)
                points.append((1 - share, most))
            found[row.name] = (*points, (1.0, max(most, self.map)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: `map` and `rows` of `name` and `points`, pairs of share and mAP."""
        rows = [{"name": row.name, "points": [list(point) for point in row.points]} for row in self.rows]
        return {"map": self.map, "rows": rows}


def sensitivity(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    detector: Detector,
    mean_ap: Callable[[Detector], float],
    *,
    store: Path,
    identity: Mapping[str, Any],
    round_to: int = 8,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Measure every group of the graph that can lose channels, the least important ones by `scores` first.

    Args:
        graph: of `detector`.
        mean_ap: measures a detector, percent.
        store: JSON file, written after every group. A group is not measured again that it holds with the same blocks,
            whatever the other groups; a file of another `identity`, or a damaged one, is replaced, which `say` is told.
        identity: what the mAP depends on besides, JSON-able: weights, images, how they are shown.
        round_to: as in `blocks`.
        progress: is called with (groups done, groups), first with those measured before.
        say: takes a line about those.

    Raises UserError for a detector without any mAP, of which none can be lost, and a store that is another file.
    """
    order = blocks(graph, scores, round_to=round_to)
    by_group = {group.name: [block for block in order if block.group == group.name] for group in graph.groups}
    widths = {group.name: group.width for group in graph.groups if by_group[group.name]}
    key = fingerprint({"identity": identity, "shares": SHARES, "rows": "by blocks"})
    row_keys = {name: fingerprint({"blocks": [_plain(block) for block in by_group[name]]}) for name in widths}
    known = _read(store, key)
    if known is None:
        if say is not None and store.exists():
            say(f"note: {store} was measured with other weights, images or settings, or is damaged, and is replaced")
        known = {"key": key, "map": mean_ap(detector), "rows": {}}
        write_json(store, known)
    if known["map"] == 0:
        raise UserError(
            "prune.shares: what a layer's channels are worth is a loss of mAP, and the whole detector has none on "
            "these images; give a trained one, or cut this one by other shares, such as uniform"
        )
    rows = known["rows"]
    missing = [name for name in widths if row_keys[name] not in rows]
    before = len(widths) - len(missing)
    if before and say is not None:
        say(f"sensitivity: {before} of {len(widths)} measured before")
    for done, name in enumerate(missing, start=before):
        if progress is not None:
            progress(done, len(widths))
        points = [
            [by_group[name][n - 1].width / widths[name], mean_ap(cut(detector, graph, leaving(by_group[name], n)))]
            for n in _tried(by_group[name], widths[name])
        ]
        rows[row_keys[name]] = {"name": name, "points": points}
        write_json(store, known)
    if progress is not None:
        progress(len(widths), len(widths))
    found = {name: rows[row_keys[name]]["points"] for name in widths}
    return Sensitivity(known["map"], tuple(Row(name, tuple((s, v) for s, v in found[name])) for name in widths))


# --- details --------------------------------------------------------------------------------------------


def _tried(own: Sequence[Block], width: int) -> list[int]:
    """How many blocks of a group leave for each of `SHARES`, each number once, ascending."""
    numbers = range(1, len(own) + 1)
    return sorted({min(numbers, key=lambda n: abs(own[n - 1].width - share * width)) for share in SHARES})


def _plain(block: Block) -> list[Any]:
    return [block.group, block.width, block.channels.tolist()]


def _read(store: Path, key: str) -> dict[str, Any] | None:
    """An equal measurement, whole or a part of it. Raises UserError for JSON that was never one."""
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(content, dict) and content and "key" not in content:
        raise UserError(f"{store}: holds something else than what layers are worth; move it away, or rename it")
    try:
        if content["key"] != key:
            return None
        rows = {
            str(blocks): {"name": str(row["name"]), "points": [[float(s), float(v)] for s, v in row["points"]]}
            for blocks, row in content["rows"].items()
        }
        return {"key": key, "map": float(content["map"]), "rows": rows}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
