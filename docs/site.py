"""Gathers the pages of the site, `build/site-source`, which `make docs` builds with MkDocs (mkdocs.yml).

The site is the repository's own files at the paths that they have here: README.md is its first page, and a link works
on the repository's host and on the site alike, without being rewritten.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

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
        if file.suffix == ".ipynb":
            target.with_suffix(".md").write_text(notebook_page(file, target), encoding="utf-8")


def gathered(root: Path) -> list[Path]:
    """The files of the site, pages and what they link to."""
    found = {file for pattern in GATHERED for file in root.glob(pattern) if file.suffix not in LEFT_OUT}
    return sorted(file for file in found if file.is_file())


def page(text: str) -> str:
    """A page as MkDocs reads it: in a table's code it shows the backslash of `\\|`, which GitHub needs. Notebooks are
    pages here."""
    text = re.sub(r"^\|.*$", lambda row: re.sub(r"`[^`]*`", _bare_pipes, row[0]), text, flags=re.MULTILINE)
    return text.replace(".ipynb)", ".md)")


def notebook_page(notebook: Path, target: Path) -> str:
    """A notebook as a page, with what its cells printed; pictures become files beside `target`."""
    parts = []
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        parts.append(page(text) if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            parts.append(_output(output, target.with_name(f"{target.stem}-{number}.png")))
    title, rest = parts[0], "\n\n".join(parts[1:])
    return f'{title}\n\n<a href="{notebook.name}" download>The notebook</a>, to run it yourself.\n\n{rest}\n'


def _output(output: dict[str, Any], picture: Path) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture.write_bytes(base64.b64decode(data["image/png"]))
        return f"![what the cell above shows]({picture.name})"
    return "```text\n" + "".join(output.get("text") or data["text/plain"]).rstrip() + "\n```"


def _bare_pipes(code: re.Match[str]) -> str:
    return code[0].replace(r"\|", "|")


if __name__ == "__main__":
    main()
