"""Options of the suites: those that all have, and those that several share, each with one meaning."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.lib.measure import ALLOCATORS
from benchmarks.lib.results import FILE


def common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every suite; `benchmarks.__main__` acts on them."""
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="default: benchmarks/results/results.csv")
    group.add_argument("--label", metavar="TEXT", help="added to the names of the cases, to keep them beside others")
    group.add_argument("--notes", default="", metavar="TEXT", help="added to every row")
    group.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")


def threads(parser: argparse.ArgumentParser, default: int | None) -> None:
    parser.add_argument("--threads", type=_positive, default=default or os.cpu_count() or 1, metavar="N")


def repeats(parser: argparse.ArgumentParser, default: int | None) -> None:
    parser.add_argument("--repeats", type=_positive, default=default, metavar="N", help="timings of a case")


def seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], metavar="N,N,…", help="1 to 10 different ones")


def settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `compress run`")


def mmdet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mmdet-python",
        type=Path,
        default=os.environ.get("MMDET_PYTHON") or None,
        help="interpreter of an environment with mmdet 3.3 (default: $MMDET_PYTHON); without it we are measured alone",
    )


def allocators(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allocators", nargs="+", choices=list(ALLOCATORS), default=list(ALLOCATORS))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _seeds(text: str) -> list[int]:
    try:
        values = [int(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 0,1,2") from None
    if not 1 <= len(values) <= 10 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError("give 1 to 10 different ones")
    return values
