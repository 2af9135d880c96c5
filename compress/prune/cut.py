"""A detector without some of its channels.

smaller = cut(detector, graph, leaving(order, n))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from compress.detectors.base import Capability, Detector
from compress.detectors.build import model_of
from compress.prune.graph import PruningGraph
from compress.prune.groups import remove


def cut(detector: Detector, graph: PruningGraph, channels: Mapping[str, Tensor]) -> Detector:
    """A copy of `detector`, its weights inherited, without these channels of the graph's groups (by name, int64).

    Its `model` holds the widths, so that a checkpoint of it can be built again. `graph` is of this detector.
    """
    smaller = copy.deepcopy(detector)
    widths = dict(model_of(detector).widths or {}) | remove(smaller, graph.groups, channels)
    smaller.model = model_of(detector).model_copy(update={"widths": widths or None})
    smaller.set_feature_channels()
    return smaller


def shapes_of(detector: Detector) -> Detector:
    """A copy that holds no numbers, to cut and to count what it would cost; the detector itself where that depends on
    them."""
    if Capability.DENSE not in detector.capabilities and type(detector).counted is Detector.counted:
        return detector
    return copy.deepcopy(detector).to(torch.device("meta"))
