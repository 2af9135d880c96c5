"""Gathers the pages of the site, `build/site-source`, which `make docs` builds with MkDocs (mkdocs.yml).

The site is the repository's own files at the paths that they have here: README.md is its first page, and a link works
on the repository's host and on the site alike, without being rewritten.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "site-source"
GATHERED = ("*.md", "LICENSE", "docs/**/*", "benchmarks/README.md", "benchmarks/results/*", "tests/trt_rig/README.md")
LEFT_OUT = {".py", ".pyc"}


def main() -> None:
    """Write the folder anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for file in gathered(ROOT):
        target = SOURCE / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            target.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(file, target)


def gathered(root: Path) -> list[Path]:
    """The files of the site, pages and what they link to."""
    found = {file for pattern in GATHERED for file in root.glob(pattern) if file.suffix not in LEFT_OUT}
    return sorted(file for file in found if file.is_file())


def page(text: str) -> str:
    """A page as MkDocs reads it: in a table's code it shows the backslash of `\\|`, which GitHub needs."""
    return re.sub(r"^\|.*$", lambda row: re.sub(r"`[^`]*`", _bare_pipes, row[0]), text, flags=re.MULTILINE)


def _bare_pipes(code: re.Match[str]) -> str:
    return code[0].replace(r"\|", "|")


if __name__ == "__main__":
    main()
