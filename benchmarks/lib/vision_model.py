"""A frozen vision model for `methods.vfm` that needs no download: DINOv2's architecture, tiny, trained on drawn images.

    python -m benchmarks.lib.vision_model benchmarks/presets/cpu/teacher.yaml

It learns from labels which classes' boxes cover each patch (a sigmoid a class and patch), so that its tokens say what
is where, as those of a foundation model do; unlike them it has seen these classes with labels. Images are those of the
recipe that is given, without its zoom: of a preset's teacher, so none that its students see. One seed, one result.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from compress.config.recipe import Recipe, load_recipe
from compress.data.batch import Batch
from compress.data.loader import eval_loader, train_loader
from compress.detectors.base import MEAN, STD
from compress.manifest import fingerprint
from compress.run.data import Datasets, open_data
from compress.run.plans import data_plan

PATCH, WIDTH, LAYERS, HEADS = 8, 96, 4, 4
STEPS, BATCH, RATE, WARMUP, DECAY = 2000, 16, 1e-3, 100, 0.05
MADE = "trained.json"


def vision_model(path: Path, settings: Sequence[str] = (), *, steps: int = STEPS) -> Path:
    """Train it on the images of a recipe and save it as transformers does. Returns the folder,
    `<runs>/<name>_vision`; one that is there already, of the same images and constants, stays.

    path, settings: as `load_recipe` takes them.
    """
    recipe = load_recipe(path, [*settings, "data.scale_jitter=null"])
    folder, fabric = recipe.runs / f"{recipe.name}_vision", Fabric(accelerator="cpu", devices=1)
    data = open_data(data_plan(recipe), fabric)
    constants = [PATCH, WIDTH, LAYERS, HEADS, steps, BATCH, RATE, WARMUP, DECAY]
    identity = fingerprint({"data": data.identity, "seed": recipe.seed, "constants": constants})
    if (folder / MADE).is_file() and json.loads((folder / MADE).read_text())["identity"] == identity:
        return folder
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = _trained(recipe, data, steps)
    network.save_pretrained(folder)
    normalised = {"image_mean": [x / 255 for x in MEAN], "image_std": [x / 255 for x in STD], "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalised))
    made = {"identity": identity, "seconds": round(time.perf_counter() - started), "steps": steps}
    (folder / MADE).write_text(json.dumps(made))
    return folder


def covered(batch: Batch, grid: tuple[int, int], classes: int) -> Tensor:
    """Whether a box of a class covers the centre of a patch: float [B, h * w, K]."""
    y, x = (PATCH * (torch.arange(side) + 0.5) for side in grid)
    found = torch.zeros(len(batch.targets), *grid, classes)
    for image, target in zip(found, batch.targets, strict=True):
        for (left, top, right, bottom), label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
            image[:, :, label] += ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))
    return found.flatten(1, 2).clamp(max=1)


# --- details --------------------------------------------------------------------------------------------


def _trained(recipe: Recipe, data: Datasets, steps: int) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    size, classes = max(data.canvas), len(data.train.categories)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "patch_size": PATCH}
    network = Dinov2Model(Dinov2Config(**shape, image_size=size, layerscale_value=0.1)).train()
    head = nn.Linear(WIDTH, classes)
    nn.init.constant_(head.bias, -3.0)  # few patches have a given class
    both = nn.ModuleList([network, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, weight_decay=DECAY)
    loader = train_loader(data.train, batch_size=BATCH, seed=recipe.seed, workers=0)
    for step, batch in zip(range(steps), loader, strict=False):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * rate
        logits, truth = _logits(both, batch, classes)
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / truth.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(f"vision model: step {step + 1} of {steps}, loss {loss:.3f}", flush=True)
    print(f"vision model: {_average_precision(both.eval(), data, classes):.1f} % average precision of patches")
    return network.eval()


def _logits(both: nn.ModuleList, batch: Batch, classes: int) -> tuple[Tensor, Tensor]:
    """[B, h * w, K] of the patches, and the truth."""
    grid = (batch.images.shape[2] // PATCH, batch.images.shape[3] // PATCH)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    hidden = both[0](pixel_values=(batch.images.float() - mean) / std).last_hidden_state
    return both[1](hidden[:, 1:]), covered(batch, grid, classes)


@torch.no_grad()
def _average_precision(both: nn.Module, data: Datasets, classes: int) -> float:
    """Of the patches of the validation images, mean over classes, in percent."""
    loader = eval_loader(data.val, batch_size=BATCH, workers=0, canvas=data.canvas)
    found = [_logits(both, batch, classes) for batch in loader]
    logits, truth = (torch.cat([pair[i].flatten(0, 1) for pair in found]) for i in (0, 1))
    order = logits.argsort(0, descending=True)
    hits = truth.gather(0, order)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return float(((precision * hits).sum(0) / hits.sum(0).clamp(min=1)).mean() * 100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lib.vision_model", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    print(vision_model(given.recipe, given.set))
