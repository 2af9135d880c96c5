"""The program of the benchmarks.

python -m benchmarks                  the list of suites
python -m benchmarks NAME [options]   one of them; results go to benchmarks/results/results.csv
python -m benchmarks tables           tables and pictures from the results, in all documents
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.lib import options as options_of
from benchmarks.lib import results
from benchmarks.lib.age import fingerprint
from benchmarks.lib.provenance import provenance
from benchmarks.suites import SUITES
from deploy.core.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the first argument names; the rest are its options. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__.rstrip()}\n\nsuites (--help after a name tells its options):")
        for name, suite in SUITES.items():
            print(f"  {name:14} {suite.question}; {suite.takes}")
        return 0
    name, *rest = words
    try:
        if name == "tables":
            from benchmarks import tables

            return tables.main(rest)
        if name not in SUITES:
            raise UserError(f"{name}: no such suite; python -m benchmarks lists them")
        return run(name, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(name: str, arguments: list[str]) -> int:
    """Measure one suite. A case goes into the results as soon as it is measured: one that fails loses no other."""
    suite = import_module(f"benchmarks.suites.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=suite.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suite.add_options(parser)
    options_of.common(parser)
    options = parser.parse_args(arguments)
    origin = provenance(name, fingerprint(SUITES[name].measures), arguments)
    measured: list[results.Row] = []
    for case in suite.run(options):
        rows = results.stamped(case, origin, label=options.label, notes=options.notes)
        results.put(options.out, rows)
        measured += rows
        for row in rows:
            print(results.line(row), flush=True)
    missed = [row for row in measured if results.is_met(row) is False]
    for row in missed:
        print(f"MISSED: {results.line(row)}")
    if measured:
        print(f"written: {options.out}; python -m benchmarks tables brings it into the documents")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
