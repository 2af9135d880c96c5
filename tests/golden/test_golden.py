"""Training gives the losses that it gave: every family with every method, see `tests.golden.curves`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.curves import FAMILIES, RTOL, curves, differences, from_text, golden_file, to_text

# PyTorch resizes 8-bit images in other roundings without AVX2: the network then sees other pixels.
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="golden curves are of processors with AVX2; without it PyTorch resizes images in other roundings",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_what_they_were(family: str, tmp_path: Path) -> None:
    problems = differences(family, curves(family, tmp_path))
    written = golden_file(family).read_text(encoding="utf-8").splitlines()[0]
    assert not problems, "\n".join([*problems, written, "python -m tests.golden.write accepts what was found"])


def test_a_difference_is_seen() -> None:
    text = golden_file("gfl").read_text(encoding="utf-8")
    golden = from_text(text)
    assert differences("gfl", golden, exact=True) == []
    assert to_text(golden) == text.partition("\n")[2]
    curve = golden["fgd"]
    assert curve is not None
    curve["fgd_fg"][3] *= 1 + 2 * RTOL
    assert len(differences("gfl", golden)) == 1
    curve["fgd_fg"][3] = float("nan")
    assert len(differences("gfl", golden)) == 1
    del curve["fgd_fg"]
    assert "terms lr, loss" in differences("gfl", golden)[0]
    assert differences("gfl", golden | {"fgd": None}) == ["gfl fgd: refused, was accepted"]
    del golden["fgd"]
    assert differences("gfl", golden) == ["gfl fgd: absent, was accepted"]
