"""Batches as the data package hands them to a detector: uint8 images and one `Target` an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deploy.core.card import PAD_COLOR

STRIDE = 32
"""Batches are padded to a multiple of this, so that every pyramid level up to P5 divides them exactly."""


_TENSORS = ("boxes", "labels", "ignore", "scores", "uncertain", "unlabeled_classes")  # of a target; some may be None


@dataclass(frozen=True)
class ImageSize:
    """Sizes of one image, each (height, width) in pixels: `network`, of its valid area in the padded batch, and
    `original`, of its file."""

    network: tuple[int, int]
    original: tuple[int, int]


@dataclass
class Target:
    """The labels of one image. Boxes are in pixels of the network image (after resize and flip).

    Padding is only added right and below, so boxes need no shift between image and batch.
    """

    boxes: Tensor
    """float32 [n, 4], xyxy."""
    labels: Tensor
    """int64 [n], 0-based and contiguous."""
    ignore: Tensor
    """bool [n]; True = no target of the losses (crowd regions, objects cut to a rest). Its locations are background,
    as in mmdet's GFL; evaluation does not count detections there."""
    scores: Tensor | None
    """float32 [n], how sure a teacher was, if training is to weight pseudo labels by it; else None."""
    image_id: int
    size: tuple[int, int]
    """(height, width) of the valid area in the padded batch."""
    original_size: tuple[int, int]
    """(height, width) of the image file."""
    uncertain: Tensor | None = None
    """bool [n]; True = a region of pseudo labels where something may be, also set in `ignore`: what lies in it is not
    trained as background. None: there is none."""
    unlabeled_classes: Tensor | None = None
    """int64 [k], labels that no teacher looked for in this image: neither there nor absent. None: none."""
    key: str | None = None
    """What `compress.data.views.picture_key` calls the network image, where it was asked for."""

    @property
    def image_size(self) -> ImageSize:
        """The two sizes, as decoding takes them."""
        return ImageSize(self.size, self.original_size)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Target:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Any) -> Target:
        there: dict[str, Any] = {name: x for name in _TENSORS if (x := getattr(self, name)) is not None}
        return replace(self, **{name: function(x) for name, x in there.items()})

    # A tensor crosses from a worker through one file descriptor each: slow, and many images exhaust the
    # limit. As numpy arrays these few numbers travel inside the pickle itself.
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in _TENSORS:
            if state[name] is not None:
                state[name] = state[name].cpu().numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _TENSORS:
            if state[name] is not None:
                state[name] = torch.from_numpy(state[name])
        self.__dict__.update(state)


@dataclass
class Batch:
    """Images of one step with their targets."""

    images: Tensor
    """uint8 [B, 3, H, W] RGB, padded right and below with `PAD_COLOR`; H and W are multiples of 32.

    Channels last in memory as it leaves the loader, contiguous after `to`.
    """
    targets: list[Target]

    @property
    def sizes(self) -> list[ImageSize]:
        """Sizes of every image."""
        return [target.image_size for target in self.targets]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        # Reordering 2.5 MB costs a worker more than resizing it; a GPU does not notice.
        return Batch(
            self.images.to(device, non_blocking=non_blocking).contiguous(),
            [target.to(device, non_blocking) for target in self.targets],
        )

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's pinning thread."""
        return Batch(self.images.pin_memory(), [target.pin_memory() for target in self.targets])


def collate(samples: Sequence[tuple[Tensor, Target]], canvas: tuple[int, int] | None = None) -> Batch:
    """A batch of images uint8 [3, h, w] of any sizes, see `pad_images`, and their targets."""
    return Batch(pad_images([image for image, _ in samples], canvas), [target for _, target in samples])


def pad_images(images: Sequence[Tensor], canvas: tuple[int, int] | None = None) -> Tensor:
    """Pad images uint8 [3, h, w] to one common size with `PAD_COLOR`: uint8 [B, 3, H, W].

    canvas: (height, width) of that size; None: the smallest one of multiples of 32 that holds them.

    Every pixel is written once, straight into the batch's memory, which is channels-last because decoders
    and the resize kernel make such images.
    """
    shape = (len(images), 3, *(canvas or smallest_canvas([(image.shape[1], image.shape[2]) for image in images])))
    batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    if torch.utils.data.get_worker_info() is not None:
        batch.share_memory_()  # before it is filled: else the way to the main process copies every pixel
    pad = torch.tensor(PAD_COLOR, dtype=torch.uint8).view(3, 1, 1)
    for slot, image in zip(batch, images, strict=True):
        h, w = image.shape[1:]
        slot[:, :h, :w] = image
        slot[:, h:] = pad
        slot[:, :h, w:] = pad
    return batch


def smallest_canvas(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width), multiples of 32, that hold images of all these sizes."""
    height, width = (-(-max(sides) // STRIDE) * STRIDE for sides in zip(*sizes, strict=True))
    return height, width
