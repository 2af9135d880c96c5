"""A report.json with every part, and a parser of the page made of it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HOSTILE = "<b>\"cat\" & 'dog'</b>"
VOID = {"meta", "link", "br", "img", "input", "hr", "base", "source", "col"}


class Page(HTMLParser):
    """Collects what a browser would load and the text it would show; checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "srcset", "xlink:href", "data", "action", "poster"):
                self.loads.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def full_report() -> dict[str, Any]:
    def figures(value: float, params: float, gflops: float) -> dict[str, Any]:
        per_class = {"disc": value + 3, HOSTILE: value - 3, "never seen": None}
        return {
            "map": value, "map50": value + 20, "map75": value + 1, "per_class": per_class,
            "params_m": params, "gflops": gflops,
        }  # fmt: skip

    latency = {"p50": 12.5, "p90": 13.1, "p95": 14.2, "p99": 19.9}
    one = {
        "file": "student.onnx", "backend": "onnx", "precision": "fp32", "size_mb": 18.6, "map": 44.95,
        "map_drop": 0.05, "agreement": 0.998, "latency_ms": latency, "throughput_ips": 80.0, "gate": "pass",
    }  # fmt: skip
    truth = [{"box": [10, 10, 50, 50], "label": 0}, {"box": [60, 20, 110, 80], "label": 1}]
    found = [{"box": [11, 10, 50, 51], "label": 0, "score": 0.9}]
    return {
        "name": "run <i>one</i>",
        "created": "2026-02-11T10:24:00+00:00",
        "classes": ["disc", HOSTILE, "never seen"],
        "models": {
            "teacher": figures(50.0, 50.0, 100.0), "baseline": figures(42.0, 5.0, 10.0),
            "student": figures(45.0, 5.0, 10.0),
        },
        "artifacts": [
            one,
            {**one, "file": "student.int8.onnx", "map": 40.0, "map_drop": 5.0, "gate": "fail",
             "training_drop": 5.25, "reason": "first step that differs: pixels: <b>turned</b>",
             "differs_most": [{"id": 7, "file": "turned.png", "difference": 2.5}],
             "latency_ms": {"p50": 0.5, "p90": 0.6, "p95": 0.7, "p99": 0.8}},
            {"file": "student.engine", "gate": "not run: no GPU <here>"},
        ],
        "environment": {"cpu": {"model": "A & B", "cores": 2}, "gpu": None, "providers": ["cpu"]},
        "commands": ["compress distill recipes/a.yaml --set 'name=<x>'"],
        "pictures": [
            {"image": "photo.png", "ground_truth": truth, "teacher": found, "baseline": [], "student": found},
            {"image": "gone.png", "student": []},
        ],
    }  # fmt: skip


def write_run(folder: Path, report: dict[str, Any]) -> Path:
    least = {"name": folder.name, "models": {}}
    (folder / "report.json").write_text(json.dumps({**least, **report}), encoding="utf-8")
    return folder


def pruned_report() -> dict[str, Any]:
    """The report of a run whose student was cut from its teacher, with sensitivities of eight layers."""
    report = full_report()
    models, one = report["models"], report["artifacts"][0]
    rows = [("backbone.stem.0", 32, 24), ("backbone.stage1.0", 64, 32), ("neck.fpn.0", 96, 96), ("head.conv<0>", 96, 8)]
    layers = [f"layer{index}" for index in range(7)] + ["head.conv<0>"]
    points = [[[0.75, 75 - index], [0.5, 74 - 2 * index], [0.25, 70.25 - 4 * index]] for index in range(8)]
    points[0] = points[0][:2]
    small = {"params_m": 1.0, "gflops": 0.335}
    return {
        **report,
        "models": {
            "teacher": {**models["teacher"], "map": 76.5, "params_m": 2.2, "gflops": 0.683},
            "pruned": {**models["student"], **small, "map": 3.25},
            "baseline": {**models["baseline"], **small, "map": 21.0},
            "baseline.pruned": {**models["baseline"], **small, "map": 71.4},
            "student": {**models["student"], **small, "map": 73.9},
        },
        "artifacts": [
            {"file": "teacher (torch)", "gate": "not run: the teacher does not ship", "latency_ms": {"p50": 8.16}},
            {**one, "file": "student.safetensors", "map": 73.9, "map_drop": None, "latency_ms": {"p50": 5.1}},
            {**one, "map": 73.9, "map_drop": 0.0, "latency_ms": {"p50": 1.91, "p99": 3.0}},
            {**one, "file": "student.int8.onnx", "map": 73.7, "map_drop": 0.2, "latency_ms": {"p50": 1.02, "p99": 2.5}},
        ],
        "pictures": [],
        "validation_images": 300,
        "pruning": {
            "of": "teacher", "importance": "taylor", "shares": "sensitivity", "schedule": "once",
            "budget": "gflops", "asked": 0.5, "whole": 0.683, "found": 0.335,
            "rows": [{"name": name, "width": width, "left": left} for name, width, left in rows],
            "sensitivity": {
                "map": 75.5, "images": 128,
                "rows": [{"name": name, "points": found} for name, found in zip(layers, points, strict=True)],
            },
            "latency": None,
        },
    }  # fmt: skip
