"""D-FINE (Peng et al., ICLR 2025, arXiv 2410.13842) and RT-DETRv2 (Lv et al., arXiv 2407.17140) of the library
transformers as our detectors.

Backbone, encoder, decoder and loss are the library's; here they are run in our two halves. `features` are the maps of
the hybrid encoder, equally wide at strides 8, 16, 32 (D-FINE N: 16, 32). `predict` takes the best locations as queries
and runs the decoder: each query gives one box and a score for each class, and no suppression follows. In training the
decoder also gets noisy copies of the labels (contrastive denoising), which is why the labels are given to
`predict_in_training`.

The library's own losses (`loss_d_fine`, `loss_rt_detr`) match every layer to the labels and are normalised by the boxes
of a process; here by those of all processes. The distillation of D-FINE's last layer into the others (`loss_ddf`) has
its own normaliser, that of a process. Boxes are in shares of the network image, padding included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.data.batch import Target
from compress.detectors.base import Capability
from compress.detectors.queries import EdgeDistributions, Queries, QueryPrediction, nearest_rows, places_of
from compress.detectors.transformers.query_detector import Memory, QueryDetector
from compress.detectors.transformers.sampling import in_best_form
from compress.detectors.transformers.sizes import D_FINE, RT_DETR_V2
from deploy.core.import_path import import_object


class RealTimeDetr(QueryDetector):
    """A hybrid encoder, and a decoder of queries.

    Args:
        num_classes: K.
        network: the library's model, without the class around it that adds the loss.
    """

    matcher = "transformers.loss.loss_rt_detr:RTDetrHungarianMatcher"
    also_learned: ClassVar[Mapping[str, str]] = {}
    """What the loss takes of the decoder's output besides scores and boxes: its name → the output's."""

    def __init__(self, num_classes: int, network: Any) -> None:
        super().__init__()
        config = network.config
        levels = len(config.decoder_in_channels)
        must = {"learn_initial_query": False, "decoder_method": "default", "auxiliary_loss": True}
        self._setup(num_classes, network, {**must, "num_feature_levels": levels})
        self.strides = tuple(int(stride) for stride in config.feat_strides)
        self.feature_channels = int(config.encoder_hidden_dim)
        self.set_normalisation((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
        self._try()

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 RGB images [B, 3, H, W] → the encoder's maps, each float [B, C, h, w]."""
        network = self.network
        maps = network.backbone.model(self.normalise(images)).feature_maps
        projected = [_like_itself(project(x)) for project, x in zip(network.encoder_input_proj, maps, strict=True)]
        found: list[Tensor] = network.encoder(projected).last_hidden_state
        return [_like_itself(x) for x in found]

    def predict_in_training(self, features: list[Tensor], targets: list[Target]) -> QueryPrediction:
        """Also learns from noisy copies of the labels, for which it draws random numbers."""
        return super().predict_in_training(features, targets)

    def predict_at(self, features: list[Tensor], queries: Queries) -> list[QueryPrediction]:
        """Run the decoder on queries that begin where another model's do: one prediction a layer that says something,
        the last one last. A query takes along the features of the place that is nearest to its own: the level of the
        nearest stride, and there the location that the centre lies in."""
        queries = queries.on(self._canvas(features))
        with _unlearning(self.network.decoder_input_proj):
            memory = self._memory([x.float() for x in features])
        nearest = nearest_rows(queries.places, memory.shapes, self.strides)
        states = self.network.enc_output(_rows(self._candidates(memory)[0], nearest)).detach()
        found = self._decode(memory, states, queries.boxes.logit(eps=1e-5), None)
        return self._layers(found, queries, self._canvas(features))

    def in_half(self) -> dict[str, nn.Module]:
        """Backbone and encoder: what decides where queries look needs the digits of float32."""
        names = ("backbone.model", "encoder_input_proj", "encoder", "decoder_input_proj")
        parts = {name: self.network.get_submodule(name) for name in names}
        projections = [name for name, part in parts.items() if isinstance(part, nn.ModuleList)]
        alone = {f"{name}.{n}": part for name in projections for n, part in enumerate(parts.pop(name))}
        return parts | alone

    def _memory(self, features: list[Tensor]) -> Memory:
        projections = self.network.decoder_input_proj
        maps = [_like_itself(project(x)) for project, x in zip(projections, features, strict=True)]
        rows = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1).float()
        return Memory(rows, [(int(x.shape[2]), int(x.shape[3])) for x in maps])

    def _candidates(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """The locations [B, S, d], zero where their anchors do not lie inside of the image, and these anchors before
        the sigmoid [1, S, 4]. Through `enc_output`, a location becomes what a query takes along."""
        rows = memory.rows
        anchors, inside = self.network.generate_anchors(tuple(memory.shapes), device=rows.device, dtype=rows.dtype)
        return inside.to(rows.dtype) * rows, anchors

    def _said_of_locations(self, features: list[Tensor]) -> tuple[tuple[Tensor, Tensor], list[tuple[int, int]]]:
        with _unlearning(self.network.decoder_input_proj):
            memory = self._memory(features)
        candidates, anchors = self._candidates(memory)
        encoded = self.network.enc_output(candidates)
        boxes = (self.network.enc_bbox_head(encoded) + anchors).sigmoid()
        return (self.network.enc_score_head(encoded), boxes), memory.shapes

    def _predict(self, features: list[Tensor], truth: list[dict[str, Tensor]] | None) -> QueryPrediction:
        network, memory = self.network, self._memory(features)
        candidates, anchors = self._candidates(memory)
        ranked = network.enc_output(candidates)
        count = min(network.config.num_queries, ranked.shape[1])
        best = network.enc_score_head(ranked).amax(-1).topk(count, dim=1).indices  # [B, Q]
        # The best locations alone learn: once more through the layer, they spare the others the way back.
        encoded = network.enc_output(_rows(candidates, best)) if torch.is_grad_enabled() else _rows(ranked, best)
        start = points = network.enc_bbox_head(encoded) + _rows(anchors, best)
        states = encoded.detach()
        mask = noise = None
        if truth is not None and self.training and network.config.num_denoising > 0:
            labels, noisy, mask, noise = self._denoising(truth, count)
            if noise is not None:
                states, start = torch.cat((labels, states), 1), torch.cat((noisy, start), 1)
        found = self._decode(memory, states, start, mask)
        places = places_of(memory.shapes, self.strides, best.device)
        queries = Queries(points.sigmoid(), _rows(places, best), self._canvas(features))
        prediction = self._layers(found, queries, self._canvas(features))[-1]
        if truth is not None:
            all_logits, all_boxes = found.intermediate_logits, found.intermediate_reference_points
            prediction.learned = {
                "logits": all_logits[:, -1],
                "boxes": all_boxes[:, -1],
                "outputs_class": all_logits,
                "outputs_coord": all_boxes,
                "enc_topk_logits": network.enc_score_head(encoded),
                "enc_topk_bboxes": queries.boxes,
                "denoising_meta_values": noise,
                **{name: getattr(found, value) for name, value in self.also_learned.items()},
            }
        return prediction

    def _decode(self, memory: Memory, states: Tensor, start: Tensor, mask: Tensor | None) -> Any:
        """Run the decoder on queries with `states` [B, Q, d] that begin at `start` [B, Q, 4], before the sigmoid."""
        network = self.network
        with in_best_form(network, start.device):
            return network.decoder(
                inputs_embeds=states,
                encoder_hidden_states=memory.rows,
                encoder_attention_mask=mask,
                reference_points=start.detach(),
                spatial_shapes=torch.tensor(memory.shapes, device=memory.rows.device),
                spatial_shapes_list=memory.shapes,
            )

    def _layers(self, found: Any, queries: Queries, canvas: tuple[int, int]) -> list[QueryPrediction]:
        """What each layer says of the last Q queries: those before are noisy copies of labels."""
        logits, boxes = found.intermediate_logits, found.intermediate_reference_points
        count, layers = queries.boxes.shape[1], range(logits.shape[1])
        edges = self._edges(found, count)
        without: list[EdgeDistributions | None] = [None] * (len(layers) - len(edges))
        return [
            QueryPrediction(logits[:, layer, -count:], boxes[:, layer, -count:], queries, canvas, of_layer)
            for layer, of_layer in zip(layers, [*without, *edges], strict=True)
        ]

    def _edges(self, found: Any, count: int) -> list[EdgeDistributions]:
        """The distributions of the last layers that have some, of the last `count` queries."""
        return []

    def _matched(self, outputs: dict[str, Tensor], truth: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = import_object(self.matcher, "matcher")(self.network.config)(outputs, truth)
        return found

    def _denoising(self, truth: list[dict[str, Tensor]], queries: int) -> tuple[Any, Any, Any, Any]:
        """Noisy copies of the labels as queries, their boxes, who may attend to whom, and what the loss needs."""
        network, config = self.network, self.network.config
        make = sys.modules[type(network).__module__].get_contrastive_denoising_training_group
        found: tuple[Any, Any, Any, Any] = make(
            targets=truth,
            num_classes=config.num_labels,
            num_queries=queries,
            class_embed=network.denoising_class_embed,
            num_denoising_queries=config.num_denoising,
            label_noise_ratio=config.label_noise_ratio,
            box_noise_scale=config.box_noise_scale,
        )
        return found


class DFine(RealTimeDetr):
    """Boxes as distributions over bins, which every layer refines."""

    family = "d_fine"
    capabilities = RealTimeDetr.capabilities | {Capability.QUERY_DISTRIBUTIONS}
    library = "DFineForObjectDetection"
    sizes = D_FINE
    criterion = "transformers.loss.loss_d_fine:DFineForObjectDetectionLoss"
    also_learned: ClassVar[Mapping[str, str]] = {
        "predicted_corners": "intermediate_predicted_corners",
        "initial_reference_points": "initial_reference_points",
    }

    def _edges(self, found: Any, count: int) -> list[EdgeDistributions]:
        if torch.compiler.is_exporting():
            return []
        decoder = self.network.decoder
        weighting = sys.modules[type(self.network).__module__].weighting_function
        offsets = weighting(decoder.max_num_bins, decoder.up, decoder.reg_scale).detach()
        scale = decoder.reg_scale.detach().squeeze()
        logits = found.intermediate_predicted_corners.unflatten(-1, (4, -1))
        return [
            EdgeDistributions(logits[:, n, -count:], found.initial_reference_points[:, n, -count:], offsets, scale)
            for n in range(logits.shape[1])
        ]


class RTDetrV2(RealTimeDetr):
    """Boxes as shifts of the layer before."""

    family = "rt_detr_v2"
    library = "RTDetrV2ForObjectDetection"
    sizes = RT_DETR_V2
    criterion = "transformers.loss.loss_rt_detr:RTDetrForObjectDetectionLoss"


# --- details --------------------------------------------------------------------------------------------


@contextmanager
def _unlearning(module: nn.Module) -> Iterator[None]:
    """Normalise as ever, without taking up statistics: of a batch that came before, they would count twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _like_itself(x: Tensor) -> Tensor:
    """The same, whose gradient arrives in the memory layout of `x`. What comes back through a concatenation is a slice,
    which the backward pass of BatchNorm walks element by element, in five times the time."""
    if x.requires_grad:
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=layout))
    return x


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, Q] of x [B or 1, S, d]: [B, Q, d]."""
    B, Q = index.shape
    return x.expand(B, -1, -1).gather(1, index[..., None].expand(B, Q, x.shape[2]))
