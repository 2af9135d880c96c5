"""Runs the notebooks in this process and writes what they print and show into them.

`python docs/notebooks/run.py` runs all of them, each in a temporary folder; with names, those. A cell that fails is the
end. Of IPython's own syntax it knows what they use: `!compress …` and `%%writefile FILE`.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from compress import cli

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    """Run notebooks and keep their outputs."""
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                done = run(path, Path(folder), shown=sys.stdout)
            path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(path: Path, folder: Path, quicker: Mapping[str, str] | None = None, shown: Any = None) -> dict[str, Any]:
    """The notebook with its cells run in order, in `folder`, and their outputs.

    Args:
        quicker: what is run instead, as regular expressions: long trainings become short ones.
        shown: where the outputs are printed as well.

    Raises what a cell raises, and RuntimeError for a command that fails.
    """
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = {"__name__": "__main__", "_command": _command, "_save": _save}
    sys.path.insert(0, str(folder))
    try:
        with chdir(folder):
            code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
            for number, cell in enumerate(code, 1):
                text = "".join(cell["source"])
                for pattern, replacement in (quicker or {}).items():
                    text = re.sub(pattern, replacement, text)
                cell["outputs"] = _outputs(text, f"{path.name}:{number}", names, number, folder)
                cell["execution_count"] = number
                if shown is not None:
                    texts = [line for output in cell["outputs"] for line in output.get("text", [])]
                    print("".join(texts), file=shown, flush=True)
    finally:
        sys.path.remove(str(folder))
        left_over = {Path(file).stem for file in folder.glob("*.py")}
        for name in left_over & {*sys.modules}:  # modules of this notebook, not of the next
            del sys.modules[name]
    return notebook


# --- details --------------------------------------------------------------------------------------------


def _outputs(text: str, where: str, names: dict[str, Any], number: int, folder: Path) -> list[dict[str, Any]]:
    """What a cell prints, and the value of its last line, as nbformat has them."""
    tree = ast.parse(_python(text), where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            exec(compile(tree, where, "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    except Exception as error:
        error.add_note(f"{where} printed:\n{printed.getvalue()}")
        raise
    outputs: list[dict[str, Any]] = []
    said = printed.getvalue().replace(f"{folder}{os.sep}", "").replace(str(folder), ".")
    if said := re.sub(r"^\w+: \d+ of \d+\n", "", said, flags=re.MULTILINE):  # counts of a progress bar
        outputs.append({"name": "stdout", "output_type": "stream", "text": said.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data = {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": ["a picture"]}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _python(text: str) -> str:
    """A cell as Python: `!compress …` and `%%writefile FILE` become calls."""
    if file := re.match(r"%%writefile (\S+)\n", text):
        return f"_save({file[1]!r}, {text[file.end() :]!r})"
    joined = re.sub(r"^(!.*)\\\n\s*", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"^!(.*)$", lambda line: f"_command({line[1]!r})", joined, flags=re.MULTILINE)


def _command(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "compress", f"a notebook runs compress, not {words[0]}"
    try:
        cli.main(words[1:])
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise RuntimeError(f"{line} ended with {stop.code}") from None


def _save(file: str, text: str) -> None:
    Path(file).write_text(text, encoding="utf-8")
    print(f"Writing {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
