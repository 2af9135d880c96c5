"""UET: teaching with uncertainty (Yi et al., arXiv 2406.06999), a wrapper around any other method.

    U = (1/N) sum_k Dropout_k(F_T),   Dropout_k(F) = F * m_k / (1 - p_k),   p_k = p_start + (k - 1) * p_step
    target of the host method:   F_T + U  (`combine: sum`, the published formula)   or   (F_T + U) / 2  (`mean`)

F_T are the teacher's pyramid maps [B, C, h, w]; m_k are Bernoulli masks over elements or channels, drawn anew for
every sample, level and step, on a functional path: the teacher stays in eval mode. Everything here is constant.
E[U] = F_T, so `sum` asks the student for maps of twice the teacher's scale. A student that inherits the teacher's
head, or shares its width, then needs an adapter (`adapter: always` of the host), or `mean`.

For base methods that compare logits (they need no feature maps) or queries, the teacher's head or decoder runs on
(F_T + U) / 2, whatever `combine` is: adding logits would halve the temperature.

Formula and residual are reported in summaries of the paper; N = 5, and 0.15 / 0.05 as start and step of the rate
over the samples are our reading of one ambiguous sentence. The logit variant and `certainty` are our definition.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import Method, Outputs
from kernels.common.rows import CHUNK
from kernels.ops.mc_dropout import Dropout, mc_dropout

OBSERVE_EVERY = 10  # forward passes between records of the variance


class UET(Method):
    """Let `host` learn from Monte Carlo dropout samples of the teacher.

    Args:
        host: any other method.
        rates: dropout rate of every sample, each in [0, 1).
        combine: target from F and U, see above.
        mode: drop single elements, or whole channels of an image.
        certainty: weigh each location by 1 / (1 + v / mean v), v the variance over the samples, mean over channels,
            normalised to mean 1 a level (`Outputs.certainty`).
        seed: of the masks. The draw of a forward pass depends on (seed, process, number of passes so far, level).
        compiled: on the PyTorch path, draw through torch.compile. The draws are the same.
    """

    def __init__(
        self,
        host: Method,
        *,
        rates: tuple[float, ...],
        combine: Literal["sum", "mean"],
        mode: Literal["elementwise", "channel"],
        certainty: bool,
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.host = host
        self.needs = host.needs | {Capability.FEATURES}
        self.on_logits = Capability.FEATURES not in host.needs or Capability.QUERIES in host.needs
        self.rates = rates
        self.combine = combine
        self.mode = mode
        self.certainty = certainty
        self.seed = seed
        self.compiled = compiled
        self.passes = 0
        self._observed: dict[str, Tensor] = {}

    @property
    def looks_at(self) -> frozenset[Capability]:
        """The maps; the predictions of a host that compares logits are drawn from them."""
        maps = frozenset({Capability.FEATURES})
        return maps if self.on_logits else maps | self.host.looks_at

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.host(student, self.sample(teacher), batch)

    @torch.no_grad()
    def sample(self, teacher: Outputs) -> Outputs:
        """The teacher's outputs with the uncertain target in place of the plain one; one draw."""
        maps, variances = self._draw(teacher.features)
        weights = []
        for level, variance in enumerate(variances):
            scatter = variance.float().mean(1)  # [B, h, w]
            octave = teacher.detector.strides[level].bit_length() - 1  # P3 has stride 8
            self._observed[f"variance_p{octave}"] = scatter.mean()
            weight = 1 / (1 + scatter / scatter.mean().clamp(min=torch.finfo(torch.float32).tiny))
            weights.append(weight / weight.mean())
        features, prediction = maps, teacher.prediction
        if self.on_logits:
            prediction = teacher.detector.predict([x.float() for x in maps])
        if Capability.FEATURES not in self.host.needs:
            features = teacher.features
        return Outputs(features, prediction, teacher.detector, certainty=weights if self.certainty else None)

    def _draw(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Targets of all levels, and their variances (none in most passes). One draw."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        stream = (self.passes * 65536 + rank) * len(features)
        variance = self.certainty or self.passes % OBSERVE_EVERY == 0
        combine = "mean" if self.on_logits else self.combine
        how = {"variance": variance, "compiled": self.compiled}
        self.passes += 1
        sizes = [x.shape[2] * x.shape[3] for x in features]
        if self.mode == "elementwise" and sum(x.numel() for x in features) <= CHUNK and len(features) > 1:
            # Small maps: one operator over all levels, since calls cost more than arithmetic.
            joined = torch.cat([x.flatten(2) for x in features], 2)
            drawn = mc_dropout(joined, Dropout(self.rates, self.seed, stream, self.mode, combine), **how)
            parts = [[] if y is None else y.split(sizes, 2) for y in drawn]
            targets, variances = ([y.view_as(x) for y, x in zip(ys, features, strict=False)] for ys in parts)
            return targets, variances
        pairs = [
            mc_dropout(x, Dropout(self.rates, self.seed, stream + level, self.mode, combine), **how)
            for level, x in enumerate(features)
        ]
        return [target for target, _ in pairs], [v for _, v in pairs if v is not None]

    def observations(self) -> dict[str, Tensor]:
        """Mean MC-dropout variance of each level, as of the last recorded pass."""
        return self._observed

    def get_extra_state(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]
