"""A frozen vision model for `methods.vfm` without a download: transformers' ConvNeXt, tiny, trained on drawn images.

    python -m benchmarks.lib.vision_model benchmarks/presets/cpu/teacher.yaml

Its map of stride 16 learns to hold what the detector in this package (zoo:quickstart) makes of an image there: one
linear layer gives the detector's map, each channel with mean 0 and deviation 1. So its tokens say what is where, as
those of a foundation model do; unlike them, by way of a detector that knows these classes. Images are those of the
recipe that is given, without its zoom: of a preset's teacher, so none that its students see. One seed, one result.

A vision transformer in its place (DINOv2's architecture, four layers of 96) explains in 600 steps a fifth of the
variance of the detector's finest map, and from labels of patches alone it learns no classes in minutes on a core.
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
from lightning.fabric import Fabric
from torch import Tensor, nn

from compress.config.recipe import Recipe, load_recipe
from compress.data.batch import Batch
from compress.data.loader import eval_loader, train_loader
from compress.detectors.base import MEAN, STD, Detector, freeze
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.detectors.weights import state_sha256
from compress.manifest import fingerprint
from compress.run.data import Datasets, open_data
from compress.run.plans import data_plan

TEACHER, STRIDE = "zoo:quickstart", 16
SHAPE: dict[str, Any] = {"hidden_sizes": [32, 64, 128], "depths": [1, 2, 3], "num_stages": 3}
STEPS, BATCH, RATE, WARMUP, DECAY = 2000, 16, 3e-3, 50, 0.05
MADE = "trained.json"


def vision_model(path: Path, settings: Sequence[str] = ()) -> Path:
    """Train it on the images of a recipe and save it as transformers does. Returns the folder,
    `<runs>/<name>_vision`; one that is there already, of the same images and constants, stays. Its `trained.json` has
    the share of the variance of the detector's map that it explains on the validation images.

    path, settings: as `load_recipe` takes them.
    """
    recipe = load_recipe(path, [*settings, "data.scale_jitter=null"])
    folder, fabric = recipe.runs / f"{recipe.name}_vision", Fabric(accelerator="cpu", devices=1)
    data, teacher = open_data(data_plan(recipe), fabric), freeze(load_teacher_checkpoint(TEACHER)[0])
    constants = [SHAPE, STRIDE, STEPS, BATCH, RATE, WARMUP, DECAY]
    depends = {"data": data.identity, "teacher": state_sha256(teacher), "seed": recipe.seed, "constants": constants}
    identity = fingerprint(depends)
    if (folder / MADE).is_file() and json.loads((folder / MADE).read_text())["identity"] == identity:
        return folder
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network, explained = _trained(recipe, data, teacher)
    network.save_pretrained(folder)
    normalised = {"image_mean": [x / 255 for x in MEAN], "image_std": [x / 255 for x in STD], "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalised))
    seconds = round(time.perf_counter() - started)
    made = {"identity": identity, "seconds": seconds, "steps": STEPS, "explained": round(explained, 3)}
    (folder / MADE).write_text(json.dumps(made))
    return folder


# --- details --------------------------------------------------------------------------------------------


def _trained(recipe: Recipe, data: Datasets, teacher: Detector) -> tuple[Any, float]:
    from transformers import ConvNextConfig, ConvNextModel

    network = ConvNextModel(ConvNextConfig(**SHAPE, layer_scale_init_value=1.0)).train()
    both = nn.ModuleList([network, nn.Conv2d(SHAPE["hidden_sizes"][-1], teacher.feature_channels, 1)])
    optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, weight_decay=DECAY)
    loader = train_loader(data.train, batch_size=BATCH, seed=recipe.seed, workers=0)
    for step, batch in zip(range(STEPS), loader, strict=False):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = RATE * rate
        loss = _unexplained(both, teacher, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(f"vision model: step {step + 1} of {STEPS}, unexplained {loss:.3f}", flush=True)
    both.eval()
    with torch.no_grad():
        batches = eval_loader(data.val, batch_size=BATCH, workers=0, canvas=data.canvas)
        left = [float(_unexplained(both, teacher, batch)) for batch in batches]
    return network, 1 - sum(left) / len(left)


def _unexplained(both: nn.ModuleList, teacher: Detector, batch: Batch) -> Tensor:
    """Share of the variance of the teacher's map, over the batch and channels, that is not predicted."""
    with torch.no_grad():
        wanted = teacher.features(batch.images)[teacher.strides.index(STRIDE)]
        std, mean = torch.std_mean(wanted, (0, 2, 3), keepdim=True)
    colour = [torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD)]
    hidden = both[0](pixel_values=(batch.images.float() - colour[0]) / colour[1]).last_hidden_state
    return (both[1](hidden) - (wanted - mean) / std).square().mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lib.vision_model", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    print(vision_model(given.recipe, given.set))
