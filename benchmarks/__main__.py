"""The one program of the benchmarks: `python -m benchmarks` lists the suites, `python -m benchmarks NAME` runs one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.suites import SUITES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite that the first argument names; the rest are its options."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, options = (words or [""])[0], words[1:]
    if name not in SUITES:
        print("usage: python -m benchmarks NAME [options]; --help after a name tells its options\n")
        for suite, (_, question, takes) in SUITES.items():
            print(f"  {suite:14} {question} ({takes})")
        return 0 if name in ("", "-h", "--help") else 2
    module = import_module(SUITES[name][0])
    sys.argv = [f"benchmarks {name}", *options]
    return module.main() or 0


if __name__ == "__main__":
    sys.exit(main())
