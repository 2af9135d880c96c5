"""A pointer: the latency benchmark is `python -m benchmarks latency` (benchmarks/suites/latency.py)."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too
    from benchmarks.__main__ import main

    sys.exit(main(["latency", *sys.argv[1:]]))
