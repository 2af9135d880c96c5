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

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import box_convert

from compress.data.batch import Target
from compress.detectors.assign import Assignment
from compress.detectors.base import (
    Capability,
    Detector,
    Reduce,
    Targets,
    pad_targets,
    refuse_pseudo_labels,
)
from compress.detectors.queries import EdgeDistributions, Queries, QueryPrediction
from compress.detectors.transformers.load import fresh, loaded, options_of
from compress.detectors.transformers.sampling import in_exportable_form
from compress.detectors.transformers.sizes import D_FINE, RT_DETR_V2
from deploy.core.errors import UserError
from deploy.core.import_path import import_object


@dataclass
class QueryTargets(Targets):
    """Ground truth as the library's losses take it: `class_labels` and `boxes` (centre, width and height in shares of
    the network image) of each image. Its assignment is empty: the losses match. `factor` makes their normaliser that of
    all processes."""

    truth: list[dict[str, Tensor]]
    factor: Tensor


class RealTimeDetr(Detector):
    """A hybrid encoder, and a decoder of queries.

    Args:
        num_classes: K.
        network: the library's model, without the class around it that adds the loss.

    options: the library's configuration, as far as it is not its default, without what num_classes says.
    renewed: class layers that began anew, because what was loaded has other classes.
    """

    capabilities = frozenset({Capability.FEATURES, Capability.BOXES, Capability.QUERIES})
    has_nms = False
    prunable = (
        "its layers are a library's, with attention, whose channels hang together in ways that were not looked at"
    )
    library: ClassVar[str]
    """Name of the library's class with the loss."""
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Published configurations, by name."""
    criterion: ClassVar[str]
    """Import path of the library's loss."""
    matcher: ClassVar[str] = "transformers.loss.loss_rt_detr:RTDetrHungarianMatcher"
    """Import path of the matching that it uses."""
    also_learned: ClassVar[Mapping[str, str]] = {}
    """What the loss takes of the decoder's output besides scores and boxes: its name → the output's."""

    def __init__(self, num_classes: int, network: Any) -> None:
        super().__init__()
        config = network.config
        for key, wanted in (
            ("learn_initial_query", False),
            ("decoder_method", "default"),
            ("auxiliary_loss", True),
            ("num_feature_levels", len(config.decoder_in_channels)),
        ):
            if getattr(config, key) != wanted:
                raise UserError(f"options.{key}: must be {wanted} here, is {getattr(config, key)}")
        self.num_classes = num_classes
        self.network = network
        self.strides = tuple(int(stride) for stride in config.feat_strides)
        self.feature_channels = int(config.encoder_hidden_dim)
        self.options = options_of(config)
        self.renewed: tuple[str, ...] = getattr(network, "renewed", ())
        self.set_normalisation((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
        self._try()

    @classmethod
    def build(cls, num_classes: int, *, size: str | None, options: Mapping[str, Any], init: str | None) -> RealTimeDetr:
        """Make one.

        Args:
            size: one of `sizes`; None: the library's default configuration.
            options: values of the library's configuration in the place of these.
            init: a folder or Hub name, whose configuration and weights are taken in the place of `size`'s; class
                layers of another number of classes begin anew.

        Raises UserError for an option that is unknown or does not fit, and for weights that do not.
        """
        if init is not None:
            return cls(num_classes, loaded(cls.library, init, num_classes, options))
        given = {**({} if size is None else cls.sizes[size]), **options}
        return cls(num_classes, fresh(cls.library, num_classes, given))

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 RGB images [B, 3, H, W] → the encoder's maps, each float [B, C, h, w]."""
        network = self.network
        maps = network.backbone.model(self.normalise(images)).feature_maps
        projected = [project(x) for project, x in zip(network.encoder_input_proj, maps, strict=True)]
        found: list[Tensor] = network.encoder(projected).last_hidden_state
        return found

    def predict(self, features: list[Tensor]) -> QueryPrediction:
        return self._predict(features, None)

    def predict_in_training(self, features: list[Tensor], targets: list[Target]) -> QueryPrediction:
        """Also learns from noisy copies of the labels, for which it draws random numbers."""
        canvas = self._canvas(features)
        return self._predict(features, [_truth(target, canvas, features[0].device) for target in targets])

    def predict_at(self, features: list[Tensor], queries: Queries) -> list[QueryPrediction]:
        """Run the decoder on queries that begin where another model's do: one prediction a layer that says something,
        the last one last. A query takes along the features of the place that is nearest to its own: the level of the
        nearest stride, and there the location that the centre lies in."""
        with _unlearning(self.network.decoder_input_proj):
            memory = self._memory([x.float() for x in features])
        encoded, _, _ = self._encoded(memory)
        rows = _nearest(queries.places, memory.shapes, self.strides)[..., None]
        states = encoded.gather(1, rows.expand(-1, -1, encoded.shape[2])).detach()
        found = self._decode(memory, states, queries.boxes.logit(eps=1e-5), None)
        return self._layers(found, queries, self._canvas(features))

    @torch.no_grad()
    def match_queries(self, prediction: QueryPrediction, targets: list[Target]) -> list[tuple[Tensor, Tensor]]:
        """The library's matching: of each image the queries int64 [n] and the objects int64 [n] of `truth`."""
        truth = self.truth(prediction, targets)
        matcher = import_object(self.matcher, "matcher")(self.network.config)
        found: list[tuple[Tensor, Tensor]] = matcher(
            {"logits": prediction.logits, "pred_boxes": prediction.boxes.clamp(0, 1)}, truth
        )
        return found

    def truth(self, prediction: QueryPrediction, targets: list[Target]) -> list[dict[str, Tensor]]:
        """Ground truth as `QueryTargets.truth`, on the prediction's device."""
        return [_truth(target, prediction.canvas, prediction.logits.device) for target in targets]

    @torch.no_grad()
    def assign(self, prediction: QueryPrediction, targets: list[Target], reduce: Reduce | None = None) -> QueryTargets:
        """Ground truth alone: what it is matched to, the losses find.

        Raises UserError for pseudo labels with weights, uncertain regions or unlabeled classes.
        """
        refuse_pseudo_labels(self.family, targets)
        device = prediction.logits.device
        boxes, labels, mask = pad_targets(targets, device)
        truth = self.truth(prediction, targets)
        own = torch.tensor(float(sum(len(t["boxes"]) for t in truth)), device=device)
        world, factor = 1, torch.ones((), device=device)
        if reduce is not None:
            world = dist.get_world_size()
            factor = own.clamp(min=1) * world / reduce(own.clone()).clamp(min=1)
        B, L = len(targets), len(self.strides)
        nothing = torch.zeros(B, 0, dtype=torch.bool, device=device)
        none = torch.zeros(B, dtype=torch.int64, device=device)
        assignment = Assignment(nothing.long(), nothing, torch.where(mask, 0.0, torch.nan), none)
        one, of_levels = torch.ones((), device=device), torch.zeros(L, device=device)
        return QueryTargets(boxes, labels, assignment, one, of_levels, world, None, None, truth, factor)

    def loss(self, prediction: QueryPrediction, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """The library's terms, each summed over the layers. Only of `predict_in_training`."""
        assert isinstance(targets, QueryTargets) and prediction.learned, "as they are in training"
        learned = dict(prediction.learned)
        logits, boxes = learned.pop("logits"), learned.pop("boxes")
        _, terms, _ = import_object(self.criterion, "criterion")(
            logits, targets.truth, logits.device, boxes, self.network.config, **learned
        )
        found: dict[str, Tensor] = {}
        for name, value in terms.items():
            kind = re.sub(r"_(aux|dn)_\d+$", "", name)
            found[kind] = found.get(kind, 0) + (value if kind == "loss_ddf" else value * targets.factor)
        return found

    def decode_boxes(self, prediction: Any) -> Tensor:
        """Boxes [B, Q, 4] xyxy in pixels of the network image, not clipped."""
        height, width = prediction.canvas
        x, y, w, h = prediction.boxes.unbind(-1)
        return torch.stack(((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), -1)

    def in_half(self) -> dict[str, nn.Module]:
        """Backbone and encoder: what decides where queries look needs the digits of float32."""
        names = ("backbone.model", "encoder_input_proj", "encoder", "decoder_input_proj")
        parts = {name: self.network.get_submodule(name) for name in names}
        projections = [name for name, part in parts.items() if isinstance(part, nn.ModuleList)]
        alone = {f"{name}.{n}": part for name in projections for n, part in enumerate(parts.pop(name))}
        return parts | alone

    @torch.no_grad()
    def _try(self) -> None:
        """Raise UserError where the parts do not go together, or the maps have other strides than the configuration
        says."""
        side = 2 * self.strides[-1]
        was_training = self.training
        self.eval()  # so that no statistics move
        device = next(self.parameters()).device
        try:
            maps = self.features(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
            found = [side // int(x.shape[2]) for x in maps]
            self.predict(maps)
        except Exception as error:  # whatever a layer says of numbers that do not go together
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"options: the layers do not fit together ({reason})") from error
        finally:
            self.train(was_training)
        if found != list(self.strides):
            raise UserError(f"options.feat_strides: are {list(self.strides)}, and the maps have strides {found}")

    def _canvas(self, features: list[Tensor]) -> tuple[int, int]:
        height, width = features[0].shape[2:]
        return int(height) * self.strides[0], int(width) * self.strides[0]

    def _memory(self, features: list[Tensor]) -> _Memory:
        maps = [project(x) for project, x in zip(self.network.decoder_input_proj, features, strict=True)]
        rows = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1).float()
        return _Memory(rows, [(int(x.shape[2]), int(x.shape[3])) for x in maps])

    def _encoded(self, memory: _Memory) -> tuple[Tensor, Tensor, Tensor]:
        """What queries take along of each location [B, S, d], the locations' anchors before the sigmoid [1, S, 4], and
        whether these lie inside of the image [1, S, 1]."""
        network, rows = self.network, memory.rows
        anchors, inside = network.generate_anchors(tuple(memory.shapes), device=rows.device, dtype=rows.dtype)
        return network.enc_output(inside.to(rows.dtype) * rows), anchors, inside

    def _predict(self, features: list[Tensor], truth: list[dict[str, Tensor]] | None) -> QueryPrediction:
        network, memory = self.network, self._memory(features)
        encoded, anchors, _ = self._encoded(memory)
        logits = network.enc_score_head(encoded)
        boxes = network.enc_bbox_head(encoded) + anchors
        count = min(network.config.num_queries, encoded.shape[1])
        best = logits.amax(-1).topk(count, dim=1).indices[..., None]  # [B, Q, 1]
        points = boxes.gather(1, best.expand(-1, -1, 4))
        start = points
        states = encoded.gather(1, best.expand(-1, -1, encoded.shape[2])).detach()
        mask = noise = None
        if truth is not None and self.training and network.config.num_denoising > 0:
            labels, noisy, mask, noise = self._denoising(truth, count)
            if noise is not None:
                states, start = torch.cat((labels, states), 1), torch.cat((noisy, start), 1)
        found = self._decode(memory, states, start, mask)
        places = _places(memory.shapes, self.strides, best.device).expand(best.shape[0], -1, -1)
        queries = Queries(points.sigmoid(), places.gather(1, best.expand(-1, -1, 3)))
        prediction = self._layers(found, queries, self._canvas(features))[-1]
        if truth is not None:
            all_logits, all_boxes = found.intermediate_logits, found.intermediate_reference_points
            prediction.learned = {
                "logits": all_logits[:, -1],
                "boxes": all_boxes[:, -1],
                "outputs_class": all_logits,
                "outputs_coord": all_boxes,
                "enc_topk_logits": logits.gather(1, best.expand(-1, -1, logits.shape[2])),
                "enc_topk_bboxes": queries.boxes,
                "denoising_meta_values": noise,
                **{name: getattr(found, value) for name, value in self.also_learned.items()},
            }
        return prediction

    def _decode(self, memory: _Memory, states: Tensor, start: Tensor, mask: Tensor | None) -> Any:
        """Run the decoder on queries with `states` [B, Q, d] that begin at `start` [B, Q, 4], before the sigmoid."""
        network = self.network
        with in_exportable_form(network) if torch.compiler.is_exporting() else nullcontext():
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


@dataclass(frozen=True)
class _Memory:
    """What the decoder looks at: rows [B, S, d] of all locations, level behind level, and (h, w) of each level."""

    rows: Tensor
    shapes: list[tuple[int, int]]


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


def _places(shapes: list[tuple[int, int]], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """`Queries.places` of all locations, [1, S, 3]."""
    levels = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack((columns, rows, torch.full_like(rows, stride)), -1).flatten(0, 1))
    return torch.cat(levels)[None]


def _nearest(places: Tensor, shapes: list[tuple[int, int]], strides: tuple[int, ...]) -> Tensor:
    """Rows of the locations nearest to places [B, Q, 3]: int64 [B, Q]."""
    device = places.device
    octaves = torch.tensor(strides, device=device).log2()
    level = (places[..., 2, None].log2() - octaves).abs().argmin(-1)  # [B, Q]
    heights, widths = (torch.tensor(sides, device=device)[level] for sides in zip(*shapes, strict=True))
    sizes = torch.tensor([h * w for h, w in shapes], device=device)
    x = torch.minimum((places[..., 0] * widths).long().clamp(min=0), widths - 1)
    y = torch.minimum((places[..., 1] * heights).long().clamp(min=0), heights - 1)
    return (sizes.cumsum(0) - sizes)[level] + y * widths + x


def _truth(target: Target, canvas: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    there = ~target.ignore
    height, width = canvas
    boxes = box_convert(target.boxes[there].to(device).float(), "xyxy", "cxcywh")
    boxes = boxes / boxes.new_tensor([width, height, width, height])
    return {"class_labels": target.labels[there].to(device), "boxes": boxes}
