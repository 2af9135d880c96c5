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
from compress.data.loader import TrainSampler, eval_loader, train_loader
from compress.data.transforms import eval_transform, train_transform
from deploy.core.errors import LocalUserError, UserError

Save = Callable[[Any], Path]


@pytest.fixture
def dataset(document: dict[str, Any], save: Save, tmp_path: Path) -> CocoDetection:
    transform = train_transform((40, 64), 96, photometric=True, scale_jitter=(0.7, 1.5))
    return CocoDetection(save(document), tmp_path / "images", transform)


def take(
    dataset: CocoDetection, count: int, *, workers: int, at: tuple[int, int] = (0, 0), **kwargs: Any
) -> list[Batch]:
    loader = train_loader(dataset, **{"batch_size": 2, "seed": 5, **kwargs}, workers=workers)
    loader.batch_sampler.set_position(*at)  # type: ignore[union-attr]
    return list(itertools.islice(iter(loader), count))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert torch.equal(one.images, two.images)
        for x, y in zip(one.targets, two.targets, strict=True):
            assert (x.image_id, x.size, x.original_size) == (y.image_id, y.size, y.original_size)
            for name in ("boxes", "labels", "ignore"):
                assert torch.equal(getattr(x, name), getattr(y, name))


def test_continues_bit_exactly_with_any_worker_count(dataset: CocoDetection) -> None:
    """Seven images, batches of two: three steps an epoch. The second run starts where the first stopped."""
    whole = take(dataset, 8, workers=0)
    for workers in (0, 1, 2):
        torch.manual_seed(1234 + workers)  # the global state plays no part
        assert_same(whole[4:], take(dataset, 4, workers=workers, at=(1, 1)))
    assert_same(whole, take(dataset, 8, workers=2))
    assert not torch.equal(whole[0].images, take(dataset, 1, workers=0, seed=6)[0].images)


def test_loading_leaves_the_global_random_state_alone(dataset: CocoDetection) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(dataset, 4, workers=0)
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_out_the_batches_of_one_rank(dataset: CocoDetection) -> None:
    whole = take(dataset, 6, workers=0, batch_size=4)
    parts = [take(dataset, 6, workers=0, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        images = [
            *zip(first.images, first.targets, strict=True),
            *zip(second.images, second.targets, strict=True),
        ]
        assert len(images) == 4
        for image, target, (part, part_target) in zip(batch.images, batch.targets, images, strict=True):
            h, w = target.size
            assert target.image_id == part_target.image_id and torch.equal(target.boxes, part_target.boxes)
            assert torch.equal(image[:, :h, :w], part[:, :h, :w])


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_epochs_of_the_sampler(ratios: list[float], batch_size: int, seed: int, group: bool) -> None:
    if batch_size > len(ratios):
        with pytest.raises(UserError, match="more than"):
            TrainSampler(ratios, batch_size=batch_size, seed=seed)
        return
    sampler = TrainSampler(ratios, batch_size=batch_size, seed=seed, group_aspect=group)
    batches = sampler.epoch(3)
    assert len(batches) == len(sampler) == len(ratios) // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    indices = [index for batch in batches for index, _ in batch]
    assert len(set(indices)) == len(indices)
    tall = np.array(ratios) < 1
    mixed = sum(len({bool(tall[index]) for index, _ in batch}) > 1 for batch in batches)
    assert not group or mixed <= 1
    assert batches == TrainSampler(ratios, batch_size=batch_size, seed=seed, group_aspect=group).epoch(3)


def test_epochs_differ_and_use_every_image() -> None:
    sampler = TrainSampler([1.5] * 11, batch_size=4, seed=0)
    seen = Counter(index for epoch in range(40) for batch in sampler.epoch(epoch) for index, _ in batch)
    assert set(seen) == set(range(11)) and min(seen.values()) > 15
    assert sampler.epoch(0) != sampler.epoch(1)
    seeds = [seed for epoch in range(40) for batch in sampler.epoch(epoch) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_position_may_pass_the_end_of_the_epoch() -> None:
    sampler = TrainSampler([1.5] * 11, batch_size=4, seed=0)
    stream = list(itertools.islice(iter(sampler), 9))
    sampler.set_position(1, 3)
    assert list(itertools.islice(iter(sampler), 4)) == stream[5:9]


def test_batch_size_must_divide() -> None:
    with pytest.raises(UserError, match="multiple"):
        TrainSampler([1.0] * 10, batch_size=3, seed=0, world_size=2)


def test_eval_loader_gives_every_image_once(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    dataset = CocoDetection(save(document), tmp_path / "images", eval_transform(64, 96))
    seen: list[int] = []
    for rank in (0, 1):
        loader = eval_loader(dataset, batch_size=2, workers=1, rank=rank, world_size=2)
        seen += [target.image_id for batch in loader for target in batch.targets]
        assert len(list(loader)) == len(loader)  # a second pass with the same workers
    assert sorted(seen) == sorted(dataset.image_ids)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_line_from_any_process(dataset: CocoDetection, workers: int) -> None:
    (dataset.folder / "3.png").write_bytes(b"not an image")
    with pytest.raises(LocalUserError, match=r"3\.png: cannot be read as an image: .*\(image id 13 of ") as caught:
        take(dataset, 6, workers=workers)
    assert "\n" not in str(caught.value)
