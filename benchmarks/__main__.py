"""Every benchmark of speed, one after the other: `python -m benchmarks [--mmdet-python PATH]`.

`distill_gain`, which trains, is not among them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--mmdet-python",
    default=os.environ.get("MMDET_PYTHON"),
    help="interpreter of an environment with mmdet 3.3 (default: $MMDET_PYTHON)",
)
args = parser.parse_args()
peer = ["--mmdet-python", args.mmdet_python] if args.mmdet_python else []
failed = [
    name
    for name, options in {"vs_mmdet": peer, "data_path": peer, "latency": []}.items()
    if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options]).returncode
]
if failed:
    sys.exit(f"error: failed: {', '.join(failed)}")
