"""Long lists are cut at ten, with a count."""

from __future__ import annotations

from deploy.core.shown import counted, first_of_each, some


def test_ten_are_named_and_the_others_counted() -> None:
    assert some([]) == "" and some(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert some(range(13)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more"


def test_every_kind_has_its_ten() -> None:
    """In their order; the count of a kind stands where its last one would."""
    items = [("odd", "even")[number % 2 == 0] + f" {number}" for number in range(24)] + ["rare"]
    lines = first_of_each(items, lambda item: item.split()[0], lambda item, count: f"{count} more like {item}")
    assert lines == [*items[:20], "2 more like even 22", "2 more like odd 23", "rare"]


def test_a_number_with_its_noun() -> None:
    words = [
        counted(number, word) for number, word in ((1, "class"), (0, "class"), (2, "box"), (1, "image"), (3, "image"))
    ]
    assert words == ["1 class", "0 classes", "2 boxes", "1 image", "3 images"]
