"""Fixed augmentations of every picture: which one comes when, and that it does not depend on who shares its batch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.data.batch import Batch
from compress.data.coco import CocoDetection
from compress.data.loader import TrainSampler, train_loader
from compress.data.transforms import train_transform
from compress.data.views import Views, different

EPOCHS = 12


@pytest.fixture
def dataset(document: dict[str, Any], save: Callable[[Any], Path], tmp_path: Path) -> CocoDetection:
    transform = train_transform((40, 64), 96, photometric=True, scale_jitter=(0.7, 1.5))
    return CocoDetection(save(document), tmp_path / "images", transform)


def epochs(dataset: CocoDetection, count: int, *, start: int = 0, **changes: Any) -> list[list[Batch]]:
    settings: dict[str, Any] = {"batch_size": 2, "seed": 5, "workers": 0, "views": Views(2, 5), "keys": True}
    loader = train_loader(dataset, **(settings | changes))
    loader.batch_sampler.set_position(start, 0)  # type: ignore[union-attr]
    batches = iter(loader)
    return [list(itertools.islice(batches, len(loader))) for _ in range(count)]


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 99), st.integers(1, 4))
def test_kinds_never_mix_and_epochs_go_through_the_views(ratios: list[float], size: int, seed: int, views: int) -> None:
    if size > len(ratios):
        return
    tall = np.array(ratios) < 1
    sampler = TrainSampler(ratios, batch_size=size, seed=seed, views=Views(views, seed))
    drawn: dict[int, list[set[int]]] = {index: [set() for _ in range(views)] for index in range(len(ratios))}
    for epoch in range(2 * views):
        batches = sampler.epoch(epoch)
        assert batches == TrainSampler(ratios, batch_size=size, seed=seed, views=Views(views, seed)).epoch(epoch)
        assert len(batches) == len(sampler) and all(len(batch) == size for batch in batches)
        assert all(len({bool(tall[index]) for index, _ in batch}) == 1 for batch in batches)
        visits: Counter[int] = Counter()
        for index, sample_seed in itertools.chain.from_iterable(batches):
            drawn[index][(epoch + visits[index]) % views].add(sample_seed)
            visits[index] += 1
        repeated = [index for index, count in visits.items() if count > 1]
        assert len(repeated) <= size, "only what fills the last batch comes twice"
    for of_views in drawn.values():
        assert all(len(found) <= 1 for found in of_views), "a view is one augmentation"
        there = [next(iter(found)) for found in of_views if found]
        assert len(set(there)) == len(there), "views differ"


def test_every_picture_comes_about_as_often() -> None:
    """Three tall ones among 17, batches of four: a batch of tall ones is filled by repeating them."""
    sampler = TrainSampler([0.5] * 3 + [1.5] * 14, batch_size=4, seed=0, views=Views(3, 0))
    seen = Counter(index for epoch in range(300) for batch in sampler.epoch(epoch) for index, _ in batch)
    assert len(seen) == 17 and min(seen.values()) > 0.75 * 300 and max(seen.values()) < 1.2 * 300


def test_what_is_seen_of_a_view_is_the_same_whoever_shares_its_batch(dataset: CocoDetection) -> None:
    """Pixels and padding, over epochs, processes, resuming and workers; its key is the same exactly then."""
    whole = epochs(dataset, EPOCHS)
    found: dict[str, torch.Tensor] = {}
    views: dict[int, set[str]] = {}
    for batch in itertools.chain.from_iterable(whole):
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert target.key is not None
            assert torch.equal(found.setdefault(target.key, image), image)
            views.setdefault(target.image_id, set()).add(target.key)
    assert len(views) == len(dataset) and {len(keys) for keys in views.values()} == {2}
    assert len(found) == 2 * len(dataset)
    assert len({batch.images.shape for batch in itertools.chain.from_iterable(whole)}) == 2, "two canvases"
    resumed = epochs(dataset, 1, start=EPOCHS - 1, workers=1)
    halves = [epochs(dataset, 1, start=EPOCHS - 1, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, again, first, second in zip(whole[-1], resumed[0], *(half[0] for half in halves), strict=True):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        keys = [[target.key for target in part.targets] for part in (batch, again, first, second)]
        assert keys[0] == keys[1] == keys[2] + keys[3]


def test_how_many_views_differ() -> None:
    """An image and its mirror image: of two views half of the pairs differ."""
    assert train_transform(64, 64).outcomes() == 2 and train_transform((60, 64), 64, flip=1.0).outcomes() == 5
    assert (different(2, 2), different(1, 2), different(5, 1)) == (1.5, 1, 1)
    assert different(8, train_transform(64, 64, photometric=True).outcomes()) == 8


def test_views_are_of_their_seed_and_the_order_is_not(dataset: CocoDetection) -> None:
    """Another order of the pictures, as training for int8 has, shows the same views."""
    sets = [
        {
            target.key
            for batch in itertools.chain.from_iterable(epochs(dataset, EPOCHS, seed=seed))
            for target in batch.targets
        }
        for seed in (5, 6)
    ]
    assert sets[0] == sets[1]
    orders = [
        [target.image_id for batch in epochs(dataset, 1, seed=seed)[0] for target in batch.targets] for seed in (5, 6)
    ]
    assert orders[0] != orders[1]
