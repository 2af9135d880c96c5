"""Settings of the distillation methods, as a recipe writes them under `methods`.

What they mean, with equations and published values, stands in the modules of `compress.distill`, one a method.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from compress.config.base import Fraction, ImportPath, Options, Positive, Settings, Weight, added_later, broken_rule
from compress.config.messages import did_you_mean
from deploy.core.import_path import is_import_path

Above = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Term(Settings):
    """Settings that every method has: how much it counts, and when."""

    needs_teacher: ClassVar[bool] = True
    """Whether it learns from the recipe's teacher."""

    weight: Weight | Literal["auto"] = 1.0
    """Multiplies all terms of the method; 0 is bit-identical to plain training. auto: as much as makes its gradient
    norm `ratio` times that of the detection loss."""
    ratio: Above | None = None
    """weight auto: wanted gradient norm at the student's pyramid, relative to the detection loss; null: 1."""
    stop_epoch: Positive | None = None
    """The method ends with this many epochs; null: with the training."""
    decay: Literal["none", "linear"] = "none"
    """linear: the weight falls to zero by the end (or by stop_epoch)."""

    @model_validator(mode="after")
    def _ratio_is_automatic(self) -> Term:
        if self.ratio is not None and self.weight != "auto":
            raise broken_rule("ratio", "only applies with weight: auto")
        return self

    def constants(self) -> dict[str, Any]:
        """The method's own settings, by the names of its constructor."""
        return self.model_dump(exclude=set(Term.model_fields))


class Adapted(Term):
    """A method on feature maps."""

    adapter: Literal["auto", "always"] = "auto"
    """1×1 convolutions on the student's maps; auto: only where the widths differ."""
    levels: Annotated[int, Field(ge=1, le=5)] = 5
    """How many levels of the pyramid to compare, from the finest on."""


class Bckd(Term):
    """Bridging Cross-task Protocol Inconsistency (arXiv 2308.14286): logits and boxes of a dense head."""

    cls_weight: Weight = 1.0
    """Weight of the binary classification term."""
    loc_weight: Weight = 4.0
    """Weight of the box (GIoU) term."""
    beta: Above = 1.0
    """Exponent of |teacher - student| in the classification term."""


class Fgd(Adapted):
    """Focal and Global Distillation (arXiv 2111.11837): attention-weighted feature maps, objects and background apart.

    The defaults are the authors' for GFL and RetinaNet.
    """

    temperature: Above = 0.5
    """Temperature of the attention softmax."""
    alpha: Weight = 1e-3
    """Weight of the object term."""
    beta: Weight = 5e-4
    """Weight of the background term."""
    gamma: Weight = 5e-4
    """Weight of the attention term."""
    relation: Weight = 5e-6
    """Weight of the global relation term (lambda in the paper)."""
    box_norm: Literal["img", "batch"] = "img"
    """What boxes are divided by before they are drawn on a map: the image's size (as published) or the padded
    batch's (where the boxes really are)."""


class Pkd(Adapted):
    """Pearson Knowledge Distillation (arXiv 2207.02039): feature maps standardised channel by channel."""

    loss_weight: Weight = 6.0
    """The authors' constant: 6 for GFL and Faster R-CNN, 10 for RetinaNet."""


class Cwd(Adapted):
    """Channel-wise Distillation (arXiv 2011.13256): softmax over the locations of each channel."""

    on: Literal["features", "logits"] = "features"
    """Pyramid maps, or the class logits."""
    temperature: Above = 1.0
    """Temperature of the softmax."""
    loss_weight: Weight | None = None
    """The authors' constant; null: 10 on features, 5 on logits."""

    @model_validator(mode="after")
    def _logits_have_no_adapter(self) -> Cwd:
        if self.on == "logits" and self.adapter == "always":
            raise broken_rule("adapter", "logits are compared as they are, without an adapter; leave it out")
        return self

    def constants(self) -> dict[str, Any]:
        published = 10.0 if self.on == "features" else 5.0
        return super().constants() | {"loss_weight": published if self.loss_weight is None else self.loss_weight}


class Mgd(Adapted):
    """Masked Generative Distillation (arXiv 2205.01529): masked student maps, completed, resemble the teacher's."""

    alpha: Weight = 2e-5
    """Weight: 2e-5 for one-stage, 5e-7 for two-stage detectors."""
    masked: Rate = 0.65
    """Share of the locations that are masked."""


class Gi(Adapted):
    """General Instance imitation (arXiv 2103.02340): features where teacher and student disagree most."""

    loss_weight: Weight = 2.0
    """The authors' constant."""
    topk: Positive = 10
    """Locations kept a level and image."""
    nms_threshold: Fraction = 0.3
    """IoU above which disagreements count as one."""
    pool_batch: bool = False
    """Choose among all images of a batch together, as the authors' code does."""


class Tid(Adapted):
    """Task Integration Distillation (arXiv 2404.01699), project definition: regions by how well both models do both
    tasks."""

    thr_pos: Fraction = 0.5
    """IoU from which a predicted box is good."""
    thr_neg: Fraction = 0.4
    """IoU up to which it is bad."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.025
    """Share of an image's locations that count as positive by class score."""
    iou_scores: tuple[Weight, Weight, Weight] = (2.0, 1.5, 0.4)
    """Score of a box that is good, between, bad."""
    class_scores: tuple[Weight, Weight, Weight] = (2.0, 1.5, 0.4)
    """Score of a location in the top share with the right class, with a wrong class, and of all others."""
    key_score: Weight = 3.0
    """Locations where the teacher's product of both scores reaches this are key."""
    lambdas: tuple[Weight, Weight, Weight] = (4.0, 2.0, 0.5)
    """Weights of the regions of high, middle and low value."""

    @model_validator(mode="after")
    def _bad_boxes_are_worse_than_good_ones(self) -> Tid:
        if self.thr_neg > self.thr_pos:
            raise broken_rule("thr_neg", f"{self.thr_neg:g} is more than thr_pos, {self.thr_pos:g}")
        return self


class Ld(Term):
    """Localization Distillation (arXiv 2102.12252): the distributions of the box sides, also in the valuable region
    around the positives."""

    main: Weight = 0.25
    """Weight of the term at positives."""
    vlr: Weight = 0.25
    """Weight of the term in the valuable localization region."""
    classification: Weight = 10.0
    """Weight of the class term at positives."""
    temperature: Above = 10.0
    """Temperature of the box distributions."""
    classification_temperature: Above = 2.0
    """Temperature of the classes."""
    vlr_overlap: Literal["iof", "diou"] = "iof"
    """Overlap that bounds the region: the authors' code divides by the anchor's area, the paper by the union."""
    vlr_floor: Fraction = 0.25
    """The region begins at this share of the assignment's IoU threshold."""
    normalise: Literal["official", "positives"] = "official"
    """official: constants, so that the term grows with the images of a process; positives: their number."""

    @model_validator(mode="after")
    def _says_something(self) -> Ld:
        if not (self.main or self.vlr or self.classification):
            raise broken_rule("", "main, vlr and classification are all 0; leave the method out")
        return self


class Crosskd(Term):
    """CrossKD (arXiv 2306.11369): the student's head features go through the rest of the teacher's head."""

    cls_weight: Weight = 1.0
    """Weight of the class term."""
    reg_weight: Weight = 4.0
    """Weight of the term on the box distributions."""
    giou_weight: Weight = 0.0
    """Weight of a GIoU term on the boxes."""

    @model_validator(mode="after")
    def _says_something(self) -> Crosskd:
        if not (self.cls_weight or self.reg_weight or self.giou_weight):
            raise broken_rule("", "all three weights are 0; leave the method out")
        return self


class Dkd(Term):
    """Decoupled Knowledge Distillation (arXiv 2203.08679) for sigmoid heads, project definition: target class and the
    rest weighted apart, at positives."""

    alpha: Weight = 1.0
    """Weight of the target class."""
    beta: Weight = 8.0
    """Weight of the other classes."""
    temperature: Above = 1.0
    """Temperature of both models' logits."""


class KdDetr(Term):
    """Query distillation in the form of KD-DETR (arXiv 2211.08071): the student's decoder also runs on the teacher's
    queries, and what both say of one query is compared. For d_fine, rt_detr_v2 and their like, of any two kinds."""

    cls_weight: Weight = 1.0
    """Weight of the class term."""
    l1_weight: Weight = 5.0
    """Weight of the L1 distance of boxes."""
    giou_weight: Weight = 2.0
    """Weight of the GIoU term."""
    classes: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: scores of a query as one distribution over classes, as published; of a single class it says nothing.
    sigmoid: each class by itself, as these detectors are trained."""
    temperature: Above = 10.0
    """Temperature of the softmax."""
    random_queries: Annotated[int, Field(ge=0)] = 0
    """Queries that begin at random boxes, for both models, besides the teacher's own."""

    @model_validator(mode="after")
    def _says_something(self) -> KdDetr:
        if not (self.cls_weight or self.l1_weight or self.giou_weight):
            raise broken_rule("", "all three weights are 0; leave the method out")
        return self


class Ddf(Term):
    """Decoupled distillation of D-FINE's box distributions (arXiv 2410.13842), from a D-FINE teacher instead of the
    student's own last layer."""

    loss_weight: Weight = 1.5
    """The authors' constant."""
    temperature: Above = 5.0
    """Temperature of the distributions."""


class Vfm(Term):
    """Alignment with a vision foundation model (as RT-DETRv4, arXiv 2510.25257): a map of the student points where the
    patch tokens of a frozen vision model point. Needs no teacher."""

    needs_teacher: ClassVar[bool] = False

    model: Annotated[str, Field(min_length=1)]
    """The frozen model: a folder of `save_pretrained`, or a name on the Hub (owner/name); DINOv2, DINOv3, ViT and every
    other vision backbone of transformers with patch tokens."""
    stride: Positive = 32
    """Which map of the student is aligned, by its stride in pixels."""
    tokens_per_side: Annotated[int, Field(ge=1, le=4)] = 2
    """Patch tokens along each side of a location of that map, of which the mean is taken; it decides at which size the
    model sees the image. 2: as published (patches of 16 on stride 32 see it as it is); 1 costs a quarter."""
    loss_weight: Weight = 5.0
    """The authors' constant: 5 for S and M, 15 for L, 20 for X."""


class Uet(Settings):
    """Teaching with Uncertainty (arXiv 2406.06999): other methods learn from Monte Carlo dropout samples of the
    teacher's features."""

    of: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """The method, or the methods, to wrap, as they are called here."""
    samples: Annotated[int, Field(ge=1, le=64)] = 5
    """Dropout samples, N."""
    p_start: Rate = 0.15
    """Dropout rate of the first sample."""
    p_step: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Added to the rate from sample to sample; 0: all alike."""
    combine: Literal["sum", "mean"] = "mean"
    """Target: F + U as published, or (F + U) / 2, which keeps the scale of the teacher's maps."""
    mode: Literal["elementwise", "channel"] = "elementwise"
    """What is dropped: single elements or whole channels."""
    certainty: bool = False
    """Weigh locations by how little the samples scatter there."""

    @property
    def base_methods(self) -> tuple[str, ...]:
        """Names of the wrapped methods."""
        return (self.of,) if isinstance(self.of, str) else self.of

    @property
    def rates(self) -> tuple[float, ...]:
        """Dropout rate of every sample."""
        return tuple(self.p_start + k * self.p_step for k in range(self.samples))

    def constants(self) -> dict[str, Any]:
        """The arguments of the wrapper, besides the method that it wraps."""
        return {"rates": self.rates, "combine": self.combine, "mode": self.mode, "certainty": self.certainty}

    @model_validator(mode="after")
    def _rules(self) -> Uet:
        if self.rates[-1] >= 1:
            raise broken_rule(
                "p_step",
                f"sample {self.samples} would have the rate {self.rates[-1]:g}; rates stay below 1: lower p_step, "
                "p_start or samples",
            )
        if self.certainty and (self.samples == 1 or self.rates[-1] == 0):
            raise broken_rule("certainty", "needs samples that differ: two or more, with a dropout rate above 0")
        if len(set(self.base_methods)) < len(self.base_methods):
            raise broken_rule("of", "names a method twice")
        return self


class OwnMethod(Term):
    """A method of your own: `package.module:Name: {options: {...}}`."""

    options: Options | None = added_later()
    """Arguments of its class, besides student and teacher."""


def name_of(key: str) -> str:
    """Name of a method in logs and checkpoints: its key; for an import path, the name behind the colon."""
    return key.rpartition(":")[2].replace(".", "_")


class Methods(Settings):
    """Distillation methods; those given add up. Write `bckd: {}` for a method with its defaults, and the import path
    of its class for a method of your own."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[ImportPath, OwnMethod] = Field(init=False)

    bckd: Bckd | None = None
    """BCKD."""
    fgd: Fgd | None = None
    """FGD."""
    pkd: Pkd | None = None
    """PKD."""
    cwd: Cwd | None = None
    """CWD."""
    mgd: Mgd | None = None
    """MGD."""
    gi: Gi | None = None
    """GI imitation."""
    tid: Tid | None = None
    """TID."""
    ld: Ld | None = None
    """LD."""
    crosskd: Crosskd | None = None
    """CrossKD."""
    dkd: Dkd | None = None
    """DKD."""
    kd_detr: KdDetr | None = added_later()
    """KD-DETR's form of query distillation."""
    ddf: Ddf | None = added_later()
    """DDF."""
    vfm: Vfm | None = added_later()
    """VFM alignment."""
    uet: Uet | None = None
    """UET, around methods given above."""

    def enabled(self) -> dict[str, Term]:
        """The methods that are given, by name or import path, without the wrapper UET."""
        terms = {name: getattr(self, name) for name in type(self).model_fields if name != "uet"}
        return {name: term for name, term in terms.items() if term is not None} | self.own

    @property
    def end_early(self) -> bool:
        """Whether one ends before the training; its adapters get no gradient from then on."""
        return any(term.stop_epoch is not None for term in self.enabled().values())

    def of_teacher(self) -> dict[str, Term]:
        """Those of them that learn from the recipe's teacher."""
        return {name: term for name, term in self.enabled().items() if term.needs_teacher}

    @property
    def own(self) -> dict[str, OwnMethod]:
        """Methods of the user's, by import path."""
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _rules(self) -> Methods:
        for base in self.uet.base_methods if self.uet is not None else ():
            if base not in self.enabled():
                raise broken_rule("uet.of", self._no_base_method(base))
            if base not in self.of_teacher():
                raise broken_rule("uet.of", f"{base} learns from no teacher, whose maps uet samples; leave it out")
        names: dict[str, str] = {}
        for path in self.own:
            name = name_of(path)
            if name in type(self).model_fields or names.setdefault(name, path) != path:
                raise broken_rule((path,), f"another method is already called {name}; give the class another name")
        return self

    def _no_base_method(self, base: str) -> str:
        known = [*self.enabled(), *(name for name in type(self).model_fields if name != "uet")]
        if base in known or is_import_path(base):
            return f"{base} is not among the methods; add `{base}: {{}}`"
        return f"{base!r} is not one of {', '.join(dict.fromkeys(known))}{did_you_mean(base, known) or ''}"
