#!/usr/bin/env bash
# torch-pruning 1.6.1, GroupTaylorImportance (GroupHessianImportance does the same), two convolutions on maps of two
# sizes, read by a shared convolution, and the first one's map, flattened, by a linear layer: the neck of a Faster R-CNN
# with its two stages.
# Expected: each channel gets what it is worth in all layers that lose it, as GroupMagnitudeImportance counts it.
# Happens: channels get the worth of others. On its way back through the flattening, the list of the second
# convolution's channels passes through a set and comes out in some other order, each still with the channel of the
# group that it belongs to; these importances then sort one of the two lists and not the other.
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q torch-pruning==1.6.1 torch==2.13.0 numpy
"$venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn

C, SIDE = 16, 2
torch.manual_seed(0)


class TwoStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, C, 3, 1, 1), nn.Conv2d(3, C, 3, 2, 1)
        self.proposals, self.classes = nn.Conv2d(C, 2, 1), nn.Linear(C * SIDE**2, 4)

    def forward(self, x):
        fine, coarse = self.fine(x), self.coarse(x)
        pooled = nn.functional.adaptive_avg_pool2d(fine, SIDE).flatten(1)
        return self.proposals(fine), self.proposals(coarse), self.classes(pooled)


model = TwoStages().eval()
images = torch.rand(1, 3, 16, 16)
sum(x.square().mean() for x in model(images)).backward()


def expected(value):
    """Per channel, over the two layers that make it and the two that read it, by definition."""
    fine, coarse, proposals, classes = (
        value(layer.weight, layer.weight.grad).detach()
        for layer in (model.fine, model.coarse, model.proposals, model.classes)
    )
    sums = fine.sum((1, 2, 3)) + coarse.sum((1, 2, 3)) + proposals.sum((0, 2, 3)) + classes.view(4, C, -1).sum((0, 2))
    return sums / sums.mean()


def found(score):
    graph = tp.DependencyGraph().build_dependency(model, images)
    return score(graph.get_pruning_group(model.fine, tp.prune_conv_out_channels, list(range(C))))


print(f"torch-pruning {version('torch-pruning')}, torch {torch.__version__}")
right = {}
for name, value in (
    ("GroupMagnitudeImportance", lambda w, g: w**2),
    ("GroupTaylorImportance", lambda w, g: (w * g).abs()),
    ("GroupHessianImportance", lambda w, g: w**2 * g),
):
    wanted, got = expected(value), found(getattr(tp.importance, name)())
    right[name] = torch.allclose(wanted, got, rtol=1e-4)
    agree = int(torch.isclose(wanted, got, rtol=1e-4).sum())
    print(f"{name}: {agree} of {C} channels as expected; least important: found {got.argsort()[:4].tolist()}", end=", ")
    print(f"expected {wanted.argsort()[:4].tolist()}")
mixed = not right["GroupTaylorImportance"] and not right["GroupHessianImportance"]
sys.exit(0 if right["GroupMagnitudeImportance"] and mixed else 1)
PYTHON
