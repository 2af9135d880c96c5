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
