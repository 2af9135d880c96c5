"""Groups of options: what a command is handed, and what its help shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from compress import cli
from compress.cli.groups import HIDDEN, with_groups

SEEN: list[Any] = []


@dataclass(frozen=True)
class Sizes:
    height: Annotated[int, typer.Option("--height", help="In pixels.")] = 32
    wide: Annotated[bool, typer.Option("--wide")] = False


@dataclass(frozen=True)
class Old:
    colour: Annotated[str | None, typer.Option("--colour", help="As it was.")] = None


def draw(out: str, sizes: Sizes = Sizes(), old: Annotated[Old, HIDDEN] = Old(), last: bool = False) -> None:
    """Draw."""
    SEEN.append((out, sizes, old, last))


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(with_groups(draw))
    return app


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ([], (Sizes(), Old(), False)),
        (["--height", "64", "--wide"], (Sizes(64, True), Old(), False)),
        (["--colour", "red", "--last"], (Sizes(), Old("red"), True)),
    ],
)
def test_options_reach_the_command_in_groups(app: typer.Typer, words: list[str], seen: tuple[Any, ...]) -> None:
    result = CliRunner().invoke(app, ["x.png", *words])
    assert result.exit_code == 0, result.output
    assert SEEN.pop() == ("x.png", *seen)


def test_values_are_checked_and_hidden_options_stand_in_no_help(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["x.png", "--height", "tall"]).exit_code == 2
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--height" in shown and "In pixels." in shown and "--colour" not in shown


def test_export_shows_the_short_way_and_takes_the_long_one(capsys: pytest.CaptureFixture[str]) -> None:
    """What moved to quantize and build is still taken, for scripts of the version before."""
    command = typer.main.get_command(cli.app).commands["export"]  # type: ignore[attr-defined]
    hidden = {option for p in command.params if getattr(p, "hidden", False) for option in p.opts}
    assert {"--target", "--calibration", "--max-map-drop", "--data", "--batch", "--refit", "--timing-cache"} <= hidden
    assert len([p for p in command.params if not getattr(p, "hidden", False)]) <= 18
    elsewhere = {
        option
        for name in ("quantize", "build")
        for p in typer.main.get_command(cli.app).commands[name].params  # type: ignore[attr-defined]
        for option in p.opts
    }
    assert hidden <= elsewhere
