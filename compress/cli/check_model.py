"""`compress check-model`: the conformance kit for a detector of one's own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compress.cli.exits import gate_failed, next_command
from compress.cli.options import JsonOut, need_json_place, write_results
from deploy.core.errors import UserError

commands = typer.Typer()


@commands.command("check-model")
def check_model(
    detector: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="Import path, as a recipe names it.")],
    options: Annotated[
        str | None,
        typer.Option("--options", metavar="YAML", help="Arguments of its constructor, e.g. '{width: 32}'."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", metavar="NAME|MODULE:FUNCTION", help="Handed to it as backbone.")
    ] = None,
    backbone_options: Annotated[
        str | None, typer.Option("--backbone-options", metavar="YAML", help="Arguments of a backbone of your own.")
    ] = None,
    json_out: JsonOut = None,
) -> None:
    """Check a detector of your own, in seconds: one line a check.

    Shapes, loss and gradient, export, saving and resuming, on generated images. Exit code 1 if a check fails."""
    need_json_place(json_out)
    of_model, of_backbone = _mapping(options, "--options"), _mapping(backbone_options, "--backbone-options")
    from compress.run.conformance import check_model as checks

    failed, results = [], []
    for check in checks(detector, options=of_model, backbone=backbone, backbone_options=of_backbone):
        state = "fail" if check.problem else "skip" if check.skipped else "ok"
        detail = check.problem or check.skipped
        print(f"{state:<4} {check.name}{f': {detail}' if detail else ''}")
        failed += [check.name] if check.problem else []
        results.append({"check": check.name, "state": state, "detail": detail or None})
    write_results(json_out, results)
    if failed:
        gate_failed(f"{detector}: {', '.join(failed)}")
    print(f"{detector}: fit for training, export and serving; in a recipe: {_section(detector, options)}")
    next_command("train", "RECIPE", "--set", f"student={_section(detector, options)}")


def _section(detector: str, options: str | None) -> str:
    """The student of a recipe, in YAML on one line."""
    return f"{{detector: '{detector}'{f', options: {options}' if options else ''}}}"


def _mapping(text: str | None, option: str) -> dict[str, Any] | None:
    """Raises UserError for YAML that is no mapping."""
    if text is None:
        return None
    from compress.config.yaml_document import Document

    if not text.strip().startswith("{"):
        raise UserError(f"{option}: needs a mapping, for example '{{width: 32}}', got {text!r}")
    document = Document(option)
    found = document.read(text)
    if document.problems:
        raise UserError("\n".join(document.problems))
    return found
