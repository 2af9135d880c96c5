"""A look at some of many pictures before they are used: what is odd about those that can be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deploy.core.errors import UserError
from deploy.core.image import load_image, pixel_doubt
from deploy.core.image_folder import spread

LOOKED_AT = 32


def odd_pictures(
    files: Sequence[Path], read: Callable[[int], np.ndarray] | None = None, *, skip_unreadable: bool = False
) -> str | None:
    """One line about pictures with odd pixels (`pixel_doubt`) among up to 32 of `files`, spread evenly; None: no such.

    read: gives the pixels uint8 [h, w, 3] of the file at a place of the list; None: `load_image`.

    Raises UserError for one that cannot be read, unless `skip_unreadable`.
    """
    looked_at, found = spread(range(len(files)), LOOKED_AT), []
    for index in looked_at:
        try:
            doubt = pixel_doubt(load_image(files[index]) if read is None else read(index))
        except UserError:
            if not skip_unreadable:
                raise
            continue
        if doubt is not None:
            found.append(f"{files[index]}: {doubt}")
    if not found:
        return None
    return f"{len(found)} of {len(looked_at)} images that were looked at have odd pixels, the first is {found[0]}"
