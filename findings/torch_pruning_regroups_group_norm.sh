#!/usr/bin/env bash
# torch-pruning 1.6.1, a tower layer of a detection head: convolution, GroupNorm(4, 32), ReLU, convolution. All eight
# channels of its first norm group are pruned.
# Expected: three groups of eight are left, and the model gives what it gave with those channels set to zero behind the
# norm, as it does with a BatchNorm in that place.
# Happens: the norm keeps its number of groups, so 24 channels are normalised in four groups of six, each with strangers,
# by statistics that no group had; nothing is said, and check_pruning_group had agreed.
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q torch-pruning==1.6.1 torch==2.13.0 numpy
"$venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn

images, gone = torch.rand(1, 3, 16, 16), list(range(8))
errors, said = {}, []
print(f"torch-pruning {version('torch-pruning')}, torch {torch.__version__}")
for norm in (nn.BatchNorm2d(32), nn.GroupNorm(4, 32)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), norm, nn.ReLU(), nn.Conv2d(32, 2, 3, 1, 1)).eval()
    with torch.no_grad():
        for number, scale in enumerate((1, 2, 4, 8)):  # norm groups of unlike statistics
            model[0].weight[8 * number : 8 * number + 8] *= scale
        whole = model(images)
        behind_norm = model[1](model[0](images))
        behind_norm[:, gone] = 0
        masked = model[3](model[2](behind_norm))
    graph = tp.DependencyGraph().build_dependency(model, images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, gone)
        agreed = graph.check_pruning_group(group)
        group.prune()
    said += caught
    with torch.no_grad():
        error = float((model(images) - masked).abs().max())
    effect = float((whole - masked).abs().max())
    errors[type(norm)] = error
    print(f"{type(norm).__name__}: outputs off by {error:.2g}, where masking changes them by {effect:.2g};", end=" ")
    print(f"check_pruning_group: {agreed}, warnings: {len(caught)}")
left = model[1]
print(f"expected GroupNorm(3, 24), found GroupNorm({left.num_groups}, {left.num_channels})")
regrouped = left.num_groups == 4 and errors[nn.BatchNorm2d] < 1e-5 and errors[nn.GroupNorm] > 0.01 and agreed
sys.exit(0 if regrouped and not said else 1)
PYTHON
