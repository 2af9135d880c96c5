"""LW-DETR (Chen et al., arXiv 2406.03459) and RF-DETR (Robinson et al., arXiv 2511.09554) of the library
transformers as our detectors.

Both are a plain vision transformer, most layers of which attend within windows, a projector, and a decoder of queries.
`features` are the projector's maps, equally wide: one of stride 16, or strides 8 and 32 (LW-DETR large and xlarge).
`predict` starts a query, whose content is learned, at each of the best locations, and runs the decoder once: its layers
do not move the boxes that the next one looks at. In training there are several groups of queries, which share the
decoder and do not see each other (Group DETR); inference takes the first.

An image is padded below and on the right with the mean colour to what the windows need. transformers 5.24 divides an
image into RF-DETR's windows as if it was square, and mixes the locations of any other; here windows are rectangles.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.detectors.base import NO_PROBABILITY
from compress.detectors.queries import Queries, QueryPrediction, places_of
from compress.detectors.transformers.query_detector import Memory, QueryDetector
from compress.detectors.transformers.sampling import in_best_form
from compress.detectors.transformers.sizes import LW_DETR, RF_DETR
from deploy.core.errors import UserError
from deploy.core.import_path import import_object


class LwDetr(QueryDetector):
    """A plain vision transformer, a projector, and a decoder of groups of queries.

    Args:
        num_classes: K.
        network: the library's model with its heads.
    """

    family = "lw_detr"
    library = "LwDetrForObjectDetection"
    sizes = LW_DETR
    criterion = "transformers.loss.loss_lw_detr:LwDetrForObjectDetectionLoss"
    matcher = "transformers.loss.loss_lw_detr:LwDetrHungarianMatcher"
    reduces = True
    smooth: ClassVar[bool] = False
    """Positions are resized with a filter that is wider where they become fewer."""

    def __init__(self, num_classes: int, network: Any) -> None:
        super().__init__()
        self._setup(num_classes, network, {"auxiliary_loss": True})
        config, vit = network.config, network.config.backbone_config
        self.patch = int(vit.patch_size)
        self.windows = self._windows_a_side()
        self.strides = tuple(int(self.patch / scale) for scale in self._scales())
        if not self.strides:
            raise UserError("options.projector_scale_factors: say which maps there are, such as [1.0]")
        self.block = math.lcm(self.patch * self.windows, *self.strides)
        self.feature_channels = int(config.d_model)
        self.positions_at: tuple[tuple[int, int], Tensor] | None = None
        self._leave_out_what_nothing_uses()
        self.set_normalisation()
        self._try()

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 RGB images [B, 3, H, W] → the projector's maps, each float [B, C, h, w], of the padded image."""
        x = self.normalise(images)
        below, right = (-side % self.block for side in x.shape[2:])
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        maps = self.network.model.backbone.projector(self._vit(x))
        return list(maps) if isinstance(maps, (list, tuple)) else [maps]

    def predict_at(self, features: list[Tensor], queries: Queries) -> list[QueryPrediction]:
        """Run the decoder on queries that begin where another model's do: one prediction a layer, the last one last.
        Their contents are those of the first group, in its order: the first query gets that of the best location."""
        queries = queries.on(self._canvas(features))
        memory = _memory([x.float() for x in features])
        content = self.network.model.query_feat.weight[: self.network.config.num_queries]
        slots = torch.arange(queries.boxes.shape[1], device=content.device) % len(content)
        with _one_group(self.network.config):
            hidden = self._decode(memory, content[slots], queries.boxes)
        logits, boxes = self._heads(hidden, queries.boxes)
        canvas = self._canvas(features)
        return [QueryPrediction(a, b, queries, canvas) for a, b in zip(logits, boxes, strict=True)]

    def in_half(self) -> dict[str, nn.Module]:
        """Vision transformer and projector: what decides where queries look needs the digits of float32."""
        vit = self.network.model.backbone.backbone
        layers = {f"layer.{n}": layer for n, layer in enumerate(vit.encoder.layer)}
        return layers | self._ends_in_half() | {"projector": self.network.model.backbone.projector}

    @torch.no_grad()
    def prepare_export(self, size: tuple[int, int]) -> None:
        """Resize the positions beforehand: not every runtime can as torch does."""
        height, width = (math.ceil(side / self.block) * self.block // self.patch for side in size)
        self.positions_at = (height, width), self._resized_positions(height, width).clone()

    def _windows_a_side(self) -> int:
        return int(self.network.config.backbone_config.num_windows_side)

    def _scales(self) -> Sequence[float]:
        """How many times finer than the patches each map is."""
        found: Sequence[float] = self.network.config.projector_scale_factors
        return found

    def _leave_out_what_nothing_uses(self) -> None:
        """Layers behind the last map that is used do not learn; processes that train together want to know."""
        vit = self.network.model.backbone.backbone
        for layer in vit.encoder.layer[max(vit.config.out_indices) :]:
            layer.requires_grad_(False)

    def _vit(self, x: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] of the layers that go out, for x [B, 3, H, W]."""
        vit = self.network.model.backbone.backbone
        height, width = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens, maps = self._tokens(x, height, width), []
        for index, layer in enumerate(vit.encoder.layer[: max(vit.config.out_indices)], 1):
            tokens = layer(tokens)
            if index in vit.config.out_indices:
                maps.append(_joined(self._locations(tokens), self.windows, height, width))
        return maps

    def _tokens(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens [B * windows, T, C] of images, window by window."""
        rows = self._patches()(x)
        positions = self._positions(height, width)
        return _windowed(rows if positions is None else rows + positions, self.windows)

    def _patches(self) -> nn.Module:
        found: nn.Module = self.network.model.backbone.backbone.embeddings.projection
        return found

    def _locations(self, tokens: Tensor) -> Tensor:
        """What goes out of a layer's tokens [B * windows, T, C]: a row for each location of the window."""
        return tokens

    def _ends_in_half(self) -> dict[str, nn.Module]:
        return {"patches": self._patches()}

    def _positions(self, height: int, width: int) -> Tensor | None:
        """What is added to the patches, [1, C, h, w]."""
        if self.network.model.backbone.backbone.embeddings.position_embeddings is None:
            return None
        if torch.compiler.is_exporting() and self.positions_at is not None:
            size, positions = self.positions_at
            assert size == (height, width), f"prepared for {size} patches, exported with {(height, width)}"
            return positions
        return self._resized_positions(height, width)

    def _resized_positions(self, height: int, width: int) -> Tensor:
        table = self.network.model.backbone.backbone.embeddings.position_embeddings[:, 1:]
        side = math.isqrt(table.shape[1])
        grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        if (height, width) == (side, side):
            return grid
        return F.interpolate(grid, (height, width), mode="bicubic", align_corners=False, antialias=self.smooth)

    def _predict(self, features: list[Tensor], truth: list[dict[str, Tensor]] | None) -> QueryPrediction:
        model, config, memory = self.network.model, self.network.config, _memory(features)
        groups = config.group_detr if self.training else 1
        count = min(config.num_queries, memory.rows.shape[1])
        first = [self._first(group, memory, count) for group in range(groups)]
        points, scores, best = zip(*first, strict=True)
        shifts = model.reference_point_embed.weight.unflatten(0, (-1, config.num_queries))[:groups, :count]
        content = model.query_feat.weight.unflatten(0, (-1, config.num_queries))[:groups, :count]
        start = self._refined(torch.cat(points, 1).detach(), shifts.flatten(0, 1))
        hidden = self._decode(memory, content.flatten(0, 1), start)
        logits, boxes = self._heads(hidden if truth is not None else hidden[-1:], start)
        places = places_of(memory.shapes, self.strides, start.device).expand(start.shape[0], -1, -1)
        rows = best[0].expand(-1, -1, 3)
        queries = Queries(start[:, :count], places.gather(1, rows), self._canvas(features))
        prediction = QueryPrediction(logits[-1][:, :count], boxes[-1][:, :count], queries, self._canvas(features))
        if truth is not None and self.training:
            prediction.learned = {
                "logits": logits[-1],
                "boxes": boxes[-1],
                "outputs_class": logits,
                "outputs_coord": boxes,
                "enc_outputs_class": torch.cat(scores, 1),
                "enc_outputs_coord": torch.cat(points, 1),
            }
        return prediction

    def _first(self, group: int, memory: Memory, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the maps say to a group of queries: boxes [B, Q, 4], logits [B, Q, K] and rows [B, Q, 1] of the best
        `count` locations."""
        anchors, encoded, logits, inside = self._encoded(group, memory)
        scores = logits.amax(-1)
        if inside is not None:
            scores = scores.masked_fill(~inside[..., 0], NO_PROBABILITY)
        best = scores.topk(count, dim=1).indices[..., None]
        states = encoded.gather(1, best.expand(-1, -1, encoded.shape[2]))
        around = anchors.expand(best.shape[0], -1, -1).gather(1, best.expand(-1, -1, 4))
        boxes = self._refined(around, self.network.model.enc_out_bbox_embed[group](states))
        return boxes, logits.gather(1, best.expand(-1, -1, logits.shape[2])), best

    def _encoded(self, group: int, memory: Memory) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of all locations the anchors [1, S, 4], what a group makes of the maps [B, S, d], its logits [B, S, K], and
        whether they lie far enough inside (see `_anchors`)."""
        model, rows = self.network.model, memory.rows
        anchors, inside = _anchors(memory.shapes, rows.device)
        if inside is not None:
            anchors, rows = anchors * inside, rows * inside
        encoded = model.enc_output_norm[group](model.enc_output[group](rows))
        return anchors, encoded, model.enc_out_class_embed[group](encoded), inside

    def _said_of_locations(self, features: list[Tensor]) -> tuple[tuple[Tensor, Tensor], list[tuple[int, int]]]:
        memory = _memory(features)
        anchors, encoded, logits, _ = self._encoded(0, memory)
        boxes = self._refined(anchors, self.network.model.enc_out_bbox_embed[0](encoded))
        return (logits, boxes), memory.shapes

    def _decode(self, memory: Memory, content: Tensor, start: Tensor) -> Tensor:
        """Run the decoder on queries with `content` [Q, d] that look at `start` [B, Q, 4]: [layers, B, Q, d]."""
        rows = memory.rows
        with in_best_form(self.network, rows.device):
            found = self.network.model.decoder(
                inputs_embeds=content[None].expand(rows.shape[0], -1, -1),
                reference_points=start,
                spatial_shapes=torch.tensor(memory.shapes, device=rows.device),
                spatial_shapes_list=memory.shapes,
                valid_ratios=rows.new_ones(rows.shape[0], len(memory.shapes), 2),
                encoder_hidden_states=rows,
            )
        hidden: Tensor = found.intermediate_hidden_states
        return hidden

    def _heads(self, hidden: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [layers, B, Q, K] and boxes [layers, B, Q, 4] of what the layers found."""
        return self.network.class_embed(hidden), self._refined(start[None], self.network.bbox_embed(hidden))

    def _refined(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        found: Tensor = sys.modules[type(self.network).__module__].refine_bboxes(boxes, deltas)
        return found

    def _matched(self, outputs: dict[str, Tensor], truth: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        config = self.network.config
        matcher = import_object(self.matcher, "matcher")(config.class_cost, config.bbox_cost, config.giou_cost)
        found: list[tuple[Tensor, Tensor]] = matcher(outputs, truth, 1)
        return found

    def _weight(self, kind: str) -> float | None:
        config = self.network.config
        weights = {"ce": config.class_loss_coefficient, "bbox": config.bbox_loss_coefficient}
        weights["giou"] = config.giou_loss_coefficient
        return weights.get(kind.removeprefix("loss_"))


class RfDetr(LwDetr):
    """The same with DINOv2 as the vision transformer, whose windows each have a token for the whole image."""

    family = "rf_detr"
    library = "RfDetrForObjectDetection"
    sizes = RF_DETR
    smooth = True

    def _windows_a_side(self) -> int:
        return int(self.network.config.backbone_config.num_windows)

    def _scales(self) -> Sequence[float]:
        return (1.0,)

    def _leave_out_what_nothing_uses(self) -> None:
        super()._leave_out_what_nothing_uses()
        mask = self.network.model.backbone.backbone.embeddings.mask_token
        if mask is not None:
            mask.requires_grad_(False)

    def _tokens(self, x: Tensor, height: int, width: int) -> Tensor:
        embeddings = self.network.model.backbone.backbone.embeddings
        windows = super()._tokens(x, height, width)
        whole = embeddings.cls_token + embeddings.position_embeddings[:, :1]
        tokens: Tensor = embeddings.dropout(torch.cat((whole.expand(windows.shape[0], -1, -1), windows), 1))
        return tokens

    def _patches(self) -> nn.Module:
        found: nn.Module = self.network.model.backbone.backbone.embeddings.patch_embeddings.projection
        return found

    def _locations(self, tokens: Tensor) -> Tensor:
        vit = self.network.model.backbone.backbone
        return (vit.layernorm(tokens) if vit.config.apply_layernorm else tokens)[:, 1:]

    def _ends_in_half(self) -> dict[str, nn.Module]:
        return {**super()._ends_in_half(), "layernorm": self.network.model.backbone.backbone.layernorm}


# --- details --------------------------------------------------------------------------------------------


def _windowed(maps: Tensor, windows: int) -> Tensor:
    """Maps [B, C, h, w] → rows of each window [B * windows², h * w / windows², C]."""
    rows = maps.unflatten(2, (windows, -1)).unflatten(4, (windows, -1))  # [B, C, windows, h', windows, w']
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def _joined(rows: Tensor, windows: int, height: int, width: int) -> Tensor:
    """The reverse: → [B, C, height, width]."""
    rows = rows.reshape(-1, windows, windows, height // windows, width // windows, rows.shape[-1])
    return rows.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _memory(features: list[Tensor]) -> Memory:
    rows = torch.cat([x.flatten(2).transpose(1, 2) for x in features], 1).float()
    return Memory(rows, [(int(x.shape[2]), int(x.shape[3])) for x in features])


def _anchors(shapes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A box around each location, [1, S, 4], a 20th of the image wide and high at the first level and twice as much at
    each further one; and which lie far enough inside, bool [1, S, 1], None where all do."""
    levels = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        side = torch.full_like(rows, 0.05 * 2.0**level)
        levels.append(torch.stack((columns, rows, side, side), -1).flatten(0, 1))
    anchors = torch.cat(levels)[None]
    if all(0.5 / side > 0.01 for shape in shapes for side in shape):
        return anchors, None
    return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)


@contextlib.contextmanager
def _one_group(config: Any) -> Iterator[None]:
    """The decoder in training takes its queries for one group."""
    groups, config.group_detr = config.group_detr, 1
    try:
        yield
    finally:
        config.group_detr = groups
