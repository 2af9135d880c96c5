"""Figures as text, for the page and the terminal. A dash is what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any


def figure(value: float | None, digits: int) -> str:
    """`12.5`; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """`+1.2`, `−1.2`, or `0.0` without a sign."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def lower(title: str) -> str:
    """`pruned, labels alone`: a title within a sentence."""
    return title[:1].lower() + title[1:]


def percent(share: float, digits: int = 0) -> str:
    """`49 %` for 0.49, which no line break divides."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def ratio(big: float, small: float) -> str:
    """Say how much smaller, or larger, the second is."""
    return f"{big / small:.1f}× smaller" if big >= small else f"{small / big:.1f}× larger"


def milliseconds(value: float | None) -> str:
    """`1.23 ms`, `12.3 ms`; a dash for None."""
    return "–" if value is None else f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"


def date(text: str) -> str:
    """`11 February 2026, 10:24 UTC` from ISO 8601; any other text as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment.day} {moment:%B %Y, %H:%M %Z}".rstrip()


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) rows of a nested mapping; a list is one row."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{key}.")
        elif isinstance(item, list | tuple):
            yield prefix + str(key), ", ".join(str(i) for i in item) or "none"
        else:
            yield (
                prefix + str(key),
                "none" if item is None else "yes" if item is True else "no" if item is False else str(item),
            )
