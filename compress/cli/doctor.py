"""`compress doctor`: what is installed and what works."""

from __future__ import annotations

import typer

from compress.cli.exits import gate_failed, next_command

commands = typer.Typer()


@commands.command()
def doctor() -> None:
    """Show what is installed and what works.

    Exit code 1 if something is broken."""
    from compress.doctor import examine, show

    if not show(examine()):
        gate_failed("something is broken; the remedies stand above")
    next_command("quickstart")
