"""A look at some pictures before many are used."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.config.deploy import Int8
from compress.run.quantize import Quantizing
from deploy.core.errors import UserError
from deploy.core.image_folder import spread
from deploy.core.odd_pictures import LOOKED_AT, odd_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Noise, noise, 12 bits stored in 16, noise."""
    random = np.random.default_rng(0)
    for number in range(4):
        noise = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
        if number == 2:
            noise = Image.fromarray(random.integers(0, 4096, (24, 32)).astype(np.uint16))
        noise.save(tmp_path / f"{number}.png")
    return sorted(tmp_path.iterdir())


def test_the_odd_one_is_named(pictures: list[Path]) -> None:
    found = odd_pictures(pictures)
    assert found is not None
    assert found.startswith(
        f"1 of 4 images that were looked at have odd pixels, the first is {pictures[2]}: nearly one"
    )
    assert odd_pictures([pictures[0], pictures[1], pictures[3]]) is None
    assert odd_pictures([]) is None


def test_of_many_some_are_read_spread_over_all(pictures: list[Path]) -> None:
    files = [pictures[0]] * (10 * LOOKED_AT)
    files[-10] = pictures[2]
    assert str(odd_pictures(files)).startswith(f"1 of {LOOKED_AT} images")
    files[-10], files[-9] = pictures[0], pictures[2]
    assert odd_pictures(files) is None


def test_what_cannot_be_read(pictures: list[Path]) -> None:
    pictures[0].write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png: cannot be read as an image"):
        odd_pictures(pictures)
    assert str(odd_pictures(pictures, skip_unreadable=True)).startswith("1 of 4 images")


def test_calibration_names_it(pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    images = Quantizing(Int8(calibration=pictures[0].parent, images=4)).images
    assert len(images.files) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert "note: deploy.int8.calibration (--calibration): 1 of 4 images that were looked at have odd pixels" in said


@pytest.mark.parametrize(("files", "most"), [(0, 4), (3, 4), (4, 4), (7, 4), (1000, 32)])
def test_some_of_many_are_spread_over_all(files: int, most: int) -> None:
    chosen = spread(range(files), most)
    assert len(chosen) == min(files, most) and chosen == sorted(set(chosen))
    gaps = np.diff([*chosen, files])
    assert not chosen or (chosen[0] == 0 and gaps.max() - gaps.min() <= 1)
