#!/usr/bin/env bash
# torch-pruning 1.6.1, GroupHessianImportance, squared gradients accumulated over two samples as its docstring says.
# Expected: weight^2 times the mean of both samples' squared gradients, whatever their order.
# Happens: only the last sample counts, and the order of the samples turns the ranking of the channels around: squared
# gradients are kept by parameter, but whether there are any yet is asked by the parameter's name, which is never there.
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

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
images = torch.rand(2, 3, 8, 8)
first, last = model[0].weight, model[2].weight


def loss(sample):
    """Each sample is about an output of its own."""
    return model(images[sample : sample + 1])[:, sample].square().mean()


def found(samples):
    score = tp.importance.GroupHessianImportance()
    for sample in samples:
        model.zero_grad()
        loss(sample).backward()
        score.accumulate_grad(model)
    graph = tp.DependencyGraph().build_dependency(model, images[:1])
    return score(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0, 1, 2, 3]))


def expected(samples):
    gradients = [torch.autograd.grad(loss(sample), (first, last)) for sample in samples]
    fisher = [sum(g[i] ** 2 for g in gradients) / len(gradients) for i in (0, 1)]
    values = (first**2 * fisher[0]).sum((1, 2, 3)) + (last**2 * fisher[1]).sum((0, 2, 3))
    return (values / values.mean()).detach()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4)


print(f"torch-pruning {version('torch-pruning')}, torch {torch.__version__}, channels of the first layer")
for samples in ((0, 1), (1, 0)):
    print(f"samples {samples}: found {found(samples).numpy().round(3)}, expected {expected(samples).numpy().round(3)}")
print(f"sample 1 alone: expected {expected((1,)).numpy().round(3)}")
last_alone = all(close(found(samples), expected(samples[-1:])) for samples in ((0, 1), (1, 0)))
print(f"found is the expected importance of the last sample alone: {last_alone}")
sys.exit(0 if last_alone and not close(found((0, 1)), expected((0, 1))) else 1)
PYTHON
