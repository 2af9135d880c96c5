"""Age of figures: whether one is older than the code that it measures.

A suite names the files that it measures. Their fingerprint is stored with every row and compared with that of the
files as they are: a figure ages with the code, and neither with comments, docstrings, formatting and imports nor with
moves of files or of functions between them.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.lib.results import ROOT, Row
from deploy.core.errors import UserError

OF_THIS_CODE, OLDER, UNKNOWN = "of the code as it is", "older than the code", "older than the code, or of unknown age"


def age(rows: Iterable[Row], fingerprint: str) -> str:
    """One of the three, of rows that are shown together: the worst."""
    codes = {row.code for row in rows}
    if "" in codes:
        return UNKNOWN
    return OF_THIS_CODE if codes == {fingerprint} else OLDER


def fingerprint(globs: Iterable[str], root: Path = ROOT) -> str:
    """16 hexadecimal digits of all files that match. Raises UserError for a pattern without a file.

    Python counts by its top-level statements, in any order; other files by their words.
    """
    paths: set[Path] = set()
    for glob in globs:
        found = {path for path in root.glob(glob) if path.is_file() and "__pycache__" not in path.parts}
        if not found:
            raise UserError(f"{glob}: no file has this name; correct benchmarks/suites/__init__.py")
        paths |= found
    pieces = [piece for path in paths for piece in _pieces(path)]
    return hashlib.sha256("\n".join(sorted(pieces)).encode()).hexdigest()[:16]


def _pieces(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [hashlib.sha256(" ".join(text.split()).encode()).hexdigest()]
    return [_hash(node) for node in ast.parse(text).body if not isinstance(node, ast.Import | ast.ImportFrom)]


def _hash(node: ast.AST) -> str:
    return hashlib.sha256("".join(_words(node)).encode()).hexdigest()


def _words(node: ast.AST) -> Iterator[str]:
    """A syntax tree as text that every version of Python writes alike: without positions, empty fields, imports and
    texts that are statements (docstrings)."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        if name in ("ctx", "kind", "type_comment") or value is None or value == []:
            continue
        yield f" {name}="
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _words(part)
            else:
                yield f"{part!r},"
    yield ")"
