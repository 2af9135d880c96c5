"""UET: teaching with uncertainty (Yi et al., arXiv 2406.06999), a wrapper around any other method.

    U = (1/N) sum_k Dropout_k(F_T),   Dropout_k(F) = F * m_k / (1 - p_k),   p_k = p_start + (k - 1) * p_step
    target of the host method:   F_T + U  (`combine: sum`, the published formula)   or   (F_T + U) / 2  (`mean`)

F_T are the teacher's pyramid maps [B, C, h, w]; m_k are Bernoulli masks over elements or channels, drawn anew for
every sample, level and step, on a functional path: the teacher stays in eval mode. Everything here is constant.
E[U] = F_T, so `sum` asks the student for maps of twice the teacher's scale. A student that inherits the teacher's
head, or shares its width, then needs an adapter (`adapter: always` of the host), or `mean`.

For hosts that compare logits (they need no feature maps) the teacher's head runs on (F_T + U) / 2, whatever
`combine` is: adding logits would halve the temperature.

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
from kernels.mc_dropout import Dropout, mc_dropout

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
    """

    def __init__(
        self,
        host: Method,
        *,
        rates: tuple[float, ...],
        combine: Literal["sum", "mean"] = "mean",
        mode: Literal["elementwise", "channel"] = "elementwise",
        certainty: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.host = host
        self.needs = host.needs | {Capability.FEATURES}
        self.on_logits = Capability.FEATURES not in host.needs
        self.rates = rates
        self.combine = combine
        self.mode = mode
        self.certainty = certainty
        self.seed = seed
        self.passes = 0
        self._observed: dict[str, Tensor] = {}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.host(student, self.sample(teacher), batch)

    @torch.no_grad()
    def sample(self, teacher: Outputs) -> Outputs:
        """The teacher's outputs with the uncertain target in place of the plain one; one draw."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        observes = self.passes % OBSERVE_EVERY == 0
        maps, weights = [], []
        for level, x in enumerate(teacher.features):
            stream = (self.passes * 65536 + rank) * len(teacher.features) + level
            dropout = Dropout(self.rates, self.seed, stream, self.mode, "mean" if self.on_logits else self.combine)
            target, variance = mc_dropout(x, dropout, variance=self.certainty or observes)
            maps.append(target)
            if variance is not None:
                scatter = variance.float().mean(1)  # [B, h, w]
                self._observed[f"variance_p{level + 3}"] = scatter.mean()
                weight = 1 / (1 + scatter / scatter.mean().clamp(min=torch.finfo(torch.float32).tiny))
                weights.append(weight / weight.mean())
        self.passes += 1
        features, prediction = maps, teacher.prediction
        if self.on_logits:
            features, prediction = teacher.features, teacher.detector.predict([x.float() for x in maps])
        return Outputs(features, prediction, teacher.detector, certainty=weights if self.certainty else None)

    def observations(self) -> dict[str, Tensor]:
        """Mean MC-dropout variance of each level, as of the last recorded pass."""
        return self._observed

    def get_extra_state(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]
