#!/usr/bin/env bash
# transformers 5.24.0, D-FINE (DFineForObjectDetection) with a decoder of four layers, in training.
# Expected, as in the paper and its authors' code: every decoder layer is matched with the labels, and the box
# distributions of a layer are trained with the boxes of that layer, those of the last one too.
# Happens: the decoder gives five class scores and boxes (the first is the one before refinement) and four
# distributions. The loss zips both lists, so that distributions meet the boxes of the layer before, the class head of the
# next to last layer gets no gradient, and the last layer's distributions have no loss of their own (there is no term
# `loss_fgl`). With denoising queries that class head learns from these alone.
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 scipy==1.16.3 pillow
"$venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import DFineConfig, DFineForObjectDetection

LAYERS = 4
torch.manual_seed(0)
backbone = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "hidden_sizes": [16, 32, 64, 96],
    "stage_in_channels": [8, 16, 32, 64],
    "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [16, 32, 64, 96],
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [2] * 4,
    "out_indices": [2, 3, 4],
}
config = DFineConfig(
    backbone_config=backbone, encoder_in_channels=[32, 64, 96], encoder_hidden_dim=32, encoder_ffn_dim=64,
    encoder_attention_heads=4, d_model=32, decoder_in_channels=[32] * 3, decoder_ffn_dim=64,
    decoder_attention_heads=4, decoder_layers=LAYERS, num_queries=30, num_denoising=0, num_labels=5,
)
model = DFineForObjectDetection(config).train()
labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}]
outputs = model(torch.rand(1, 3, 96, 128), labels=labels)
outputs.loss.backward()

norms = [float(head.weight.grad.norm()) for head in model.model.decoder.class_embed]
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("scores and boxes:", outputs.intermediate_logits.shape[1], "layers; distributions:",
      outputs.intermediate_predicted_corners.shape[1])
print("gradient of the class head of each layer:", ", ".join(f"{norm:.2f}" for norm in norms))
print("terms on distributions:", ", ".join(name for name in outputs.loss_dict if "fgl" in name))
as_described = norms[LAYERS - 2] == 0 and min(norms[:2] + norms[3:]) > 0 and "loss_fgl" not in outputs.loss_dict
sys.exit(0 if as_described else 1)
PYTHON
# Seen:
# transformers 5.24.0, torch 2.14.1+cu130
# scores and boxes: 5 layers; distributions: 4
# gradient of the class head of each layer: 12.73, 14.16, 0.00, 8.22
# terms on distributions: loss_fgl_aux_0, loss_fgl_aux_1, loss_fgl_aux_2
