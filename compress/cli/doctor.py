"""`compress doctor`: what is installed and what works."""

from __future__ import annotations

from dataclasses import asdict

import typer

from compress.cli.exits import gate_failed, next_command
from compress.cli.options import JsonOut, need_json_place, write_results
from deploy.core import interrupts

commands = typer.Typer()


@commands.command()
def doctor(json_out: JsonOut = None) -> None:
    """Show what is installed and what works.

    Exit code 1 if something is broken."""
    need_json_place(json_out)
    from compress.doctor import examine, show

    findings = examine()
    interrupts.check()  # a library that is imported may swallow one
    write_results(json_out, [asdict(finding) for finding in findings])
    if not show(findings):
        gate_failed("something is broken; the remedies stand above")
    next_command("quickstart")
