"""How much of a long list people are shown: the first few, and how many more there are. One rule for all commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

MOST = 10
Item = TypeVar("Item")


def some(words: Iterable[object]) -> str:
    """`a, b, c`, of more than ten `a, b, … and 4 more`."""
    listed = [str(word) for word in words]
    more = len(listed) - MOST
    return ", ".join(listed[:MOST]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, word: str) -> str:
    """`1 class`, `3 classes`: a number with its noun, which is regular."""
    ending = "" if number == 1 else "es" if word.endswith(("s", "x")) else "s"
    return f"{number} {word}{ending}"


def first_of_each(
    items: Sequence[Item], kind: Callable[[Item], Hashable], more: Callable[[Item, int], str]
) -> list[str]:
    """A line an item; of a kind at most ten, and then the line `more` of its last item and of how many are left out."""
    total, shown, lines = Counter(map(kind, items)), Counter[Hashable](), []
    for item in items:
        of = kind(item)
        shown[of] += 1
        if shown[of] <= MOST:
            lines.append(str(item))
        if shown[of] == total[of] > MOST:
            lines.append(more(item, total[of] - MOST))
    return lines
