#!/usr/bin/env bash
# transformers 5.24.0, RF-DETR (RfDetrDinov2Backbone) with attention in windows, on an image that is not square.
# Expected: the patches go into windows and come back in their order, as for a square image; the image processor of the
# same library, by default, gives images that are not square (short side 800, long side at most 1333).
# Happens: the grid of h x w patches is read as (windows, w / windows, windows, h / windows), with height and width
# exchanged, and put together as what it is. Windows are no rectangles, and most features of the map stand at other
# places than their patches. The authors' package takes square images alone.
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 pillow
"$venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import RfDetrDinov2Config
from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone

config = RfDetrDinov2Config(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=128, patch_size=16, num_windows=2,
    out_features=["stage2"],
)
model = RfDetrDinov2Backbone(config).eval()


def moved(height: int, width: int) -> float:
    """Share of the patches that come back at another place."""
    h, w = height // 16, width // 16
    numbers = torch.arange(h * w, dtype=torch.float32)
    tokens = torch.cat((torch.tensor([-1.0]), numbers)).view(1, -1, 1).expand(1, -1, 32)
    windows = model.embeddings.window_partition(tokens, height, width)
    back = model.window_unpartition(windows[:, 1:], height, width).reshape(h * w, -1)[:, 0]
    return float((back != numbers).float().mean())


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
sizes = [(128, 128), (96, 128), (64, 192)]
shares = [moved(*size) for size in sizes]
for (height, width), share in zip(sizes, shares):
    print(f"{height} x {width}: {share:.0%} of the patches come back at another place")
sys.exit(0 if shares[0] == 0 and min(shares[1:]) > 0.5 else 1)
PYTHON
# Seen:
# transformers 5.24.0, torch 2.14.1+cu130
# 128 x 128: 0% of the patches come back at another place
# 96 x 128: 75% of the patches come back at another place
# 64 x 192: 67% of the patches come back at another place
