"""Frozen vision foundation models of the library transformers: images in, a map of patch tokens out.

Any model that `AutoModel` opens and whose `last_hidden_state` is either tokens [B, P + N, d], P of them (class and
register tokens) before the N = h·w patch tokens, or a map [B, d, h, w]: DINOv2 with and without registers, DINOv3, ViT
and their kind; ConvNeXt, whose `patch` is a location of its last stage. A model is tried on one small image as it
is loaded, so that another kind is refused by name before a training begins.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.detectors.base import MEAN, STD
from compress.detectors.transformers.load import configuration, imported, line_of, located, options_of, quiet
from compress.detectors.weights import state_sha256
from deploy.core.errors import UserError

Channels = tuple[float, ...]
TRIED = (2, 3)  # patches; unequal sides, so that a model of one size and one of other axes are found out
UNUSED_PARTS = ("pooler", "mask_token")
"""Of these, which classifiers and self-supervision use, a folder may lack the weights: no token depends on them."""


@dataclass
class VisionModel:
    """A frozen model. It is no module, so nothing that owns one trains it, keeps it in a checkpoint or shares it.

    network: of transformers, in eval mode. patch: pixels between neighbouring tokens. width: d of a token.
    mean, std: of its pictures, RGB, 0..255. keywords: of its forward pass, besides the pixels.
    """

    network: Any
    patch: int
    mean: Channels
    std: Channels
    keywords: dict[str, Any]
    width: int = 0

    @torch.no_grad()
    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens of images that are brought to the size at which there are `grid` of them.

        Args:
            images: [B, 3, H, W] RGB, 0..255. Resized bilinearly, with antialiasing where they shrink.
            grid: (h, w), of the same aspect as the images.

        Returns:
            Float32 [B, d, h, w], without class and register tokens. Computed in the precision of an autocast around
            the call; the network moves to the images' device.
        """
        if next(self.network.parameters()).device != images.device:
            self.network.to(images.device)
        size = (grid[0] * self.patch, grid[1] * self.patch)
        pixels = images.float()
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        hidden = self.network(pixel_values=(pixels - mean) / std, **self.keywords).last_hidden_state.float()
        if hidden.dim() == 3:
            hidden = hidden[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        assert hidden.shape[2:] == grid, hidden.shape
        return hidden.contiguous()

    def identity(self) -> dict[str, Any]:
        """Identify all that the tokens depend on, as JSON."""
        config = self.network.config
        return {
            "kind": config.model_type,
            "config": options_of(config),
            "weights": state_sha256(self.network),
            "mean": list(self.mean),
            "std": list(self.std),
        }


def load_vision_model(key: str, name: str) -> VisionModel:
    """The model in a folder of `save_pretrained`, or of the Hub, in float32 on the CPU.

    Pictures are normalised as its `preprocessor_config.json` says; without one, as for ImageNet.

    Args:
        key: of the setting, for errors. name: the folder or the Hub's name.

    Raises UserError where it cannot be had, lacks weights, or gives no map of patch tokens.
    """
    transformers = imported("vision models")
    source, where = located(key, name)
    config = configuration(source, where)
    patch = _patch(config, where)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # parts that nothing looks at may begin at random: always the same
        try:
            network, found = transformers.AutoModel.from_pretrained(
                source, config=config, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:
            raise UserError(f"{where}: transformers cannot load it: {line_of(error)}") from error
    lost = sorted(key for key in found["missing_keys"] if not any(part in key for part in UNUSED_PARTS))
    if lost:
        raise UserError(f"{where}: its weights do not fit its configuration: the first that is missing is {lost[0]}")
    network.requires_grad_(False).eval()
    keywords = {"interpolate_pos_encoding": True} if _interpolates_if_told(network) else {}
    model = VisionModel(network, patch, *_normalisation(source), keywords)
    try:
        tried = model.tokens(torch.zeros(1, 3, TRIED[0] * patch, TRIED[1] * patch), TRIED)
    except Exception as error:  # a text model, a detector, one of a single size
        raise UserError(
            f"{where}: a {config.model_type} gives no map of patch tokens: {type(error).__name__}: {line_of(error)}"
        ) from error
    model.width = tried.shape[1]
    return model


# --- details --------------------------------------------------------------------------------------------


def _patch(config: Any, where: str) -> int:
    """Pixels between tokens: the patch of the first stage, doubled by each one after it."""
    stages = len(getattr(config, "depths", ()))
    patch: Any = getattr(config, "patch_size", 4 if stages else None)  # DINOv3's ConvNeXt does not say its stem
    sides = set(patch) if isinstance(patch, (list, tuple)) else {patch}
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise UserError(
            f"{where}: is a {config.model_type}, not a vision model with square patches; take one as DINOv2, DINOv3 or "
            "ViT"
        )
    first: int = sides.pop()
    return first << max(stages - 1, 0)


def _interpolates_if_told(network: Any) -> bool:
    """Whether position embeddings fit other sizes of the image only when the call says so, as in ViT."""
    return "interpolate_pos_encoding" in inspect.signature(network.forward).parameters


def _normalisation(source: str) -> tuple[Channels, Channels]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        with quiet():
            found, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:  # there is none
        return MEAN, STD
    unit = 1 / found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0
    if not found.get("do_normalize", True):
        return (0.0,) * 3, (unit,) * 3
    mean, std = (found.get(f"image_{name}") for name in ("mean", "std"))
    if mean is None or std is None:
        return MEAN, STD
    return tuple(unit * value for value in mean), tuple(unit * value for value in std)
