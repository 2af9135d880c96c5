"""Cards that lie beside their files are read with those files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.core.card import card_beside, write_card_beside
from deploy.core.errors import UserError
from tests.helpers.tiny_onnx import CARD


@pytest.fixture
def net(tmp_path: Path) -> tuple[Path, Path]:
    """A file, its weights, and the card of both."""
    path, weights = tmp_path / "net.param", tmp_path / "net.bin"
    path.write_bytes(b"layers")
    weights.write_bytes(b"weights")
    write_card_beside(CARD, path, weights)
    return path, weights


def test_it_is_read_back(net: tuple[Path, Path]) -> None:
    path, weights = net
    assert card_beside(path, weights) == card_beside(path) == CARD


@pytest.mark.parametrize("which", [0, 1])
def test_another_file_is_refused(net: tuple[Path, Path], which: int) -> None:
    """Such as that of another training, whose classes have other numbers."""
    net[which].write_bytes(b"others")
    with pytest.raises(UserError, match=rf"^{net[which]}: is not the file that {net[0]}.json was written with; bring"):
        card_beside(*net)


def test_they_may_have_another_name_together(net: tuple[Path, Path], tmp_path: Path) -> None:
    path, weights = (file.rename(file.with_stem("other")) for file in net)
    (tmp_path / "net.param.json").rename(tmp_path / "other.param.json")
    assert card_beside(path, weights) == CARD


def test_one_that_was_written_by_hand_names_no_file(net: tuple[Path, Path]) -> None:
    card = Path(f"{net[0]}.json")
    card.write_text(CARD.model_dump_json())
    net[1].write_bytes(b"others")
    assert card_beside(*net) == CARD


def test_what_is_no_card(net: tuple[Path, Path]) -> None:
    card = Path(f"{net[0]}.json")
    for text, message in (("{", "bad model card: not JSON"), ("[1]", "bad model card"), ("", "no model card")):
        card.write_text(text)
        with pytest.raises(UserError, match=rf"^{card}: {message}"):
            card_beside(*net)
    card.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        card_beside(*net)
    card.unlink()
    with pytest.raises(UserError, match=r"no such file; it is the card of net.param"):
        card_beside(*net)
