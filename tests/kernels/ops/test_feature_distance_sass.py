"""What the kernels of mc_dropout, feature_distance and attention_stats compile to: maps move 16 bytes an access, and
nothing is spilled. Loads of 32 and 64 bits are look-ups in the tables of the draw, and weights."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.kernel_sass import Build, by_targets, inspect

SCALARS = {
    **dict.fromkeys(("seed_low", "seed_high", "offset_low", "offset_high", "c_units", "s_units"), "i32"),
    **{"per_copy": "fp32", "per_pair": "fp32", "C_UNIT": 16, "S_UNIT": 8, "CHANNEL": False, "COMBINE": 0},
}
NO_DRAW = {"words": None, "means": None, "variances": None, "groups": None, "GROUPS": 0, "COPIES": 0}
EQUAL = {**NO_DRAW, "words": "*i32", "groups": "*i32", "GROUPS": 1, "COPIES": 10}
DIFFERENT = {**EQUAL, "means": "*fp32", "variances": "*fp32", "COPIES": 0}
TENSORS = {  # of every kernel: maps in the dtype of the build, then float32
    ("mc_dropout", "_forward_kernel"): (("x", "out", "var"), ()),
    ("mc_dropout", "_backward_kernel"): (("x", "grad_out", "grad_var", "grad"), ()),
    ("feature_distance", "_forward_kernel"): (("student", "teacher"), ("spatial", "channel", "partial")),
    ("feature_distance", "_backward_kernel"): (
        ("student", "teacher", "written"),
        ("spatial", "channel", "grad", "by_position", "by_channel"),
    ),
    ("attention_stats", "_forward_kernel"): (("x",), ("by_position", "by_channel")),
    ("attention_stats", "_backward_kernel"): (("x", "grad"), ("grad_spatial", "grad_channel")),
}
WRITTEN = {"out", "var", "grad", "written"}


def build(operator: str, kernel: str, dtype: str, draw: dict[str, Any], channels_last: bool = False) -> Build:
    """Compile as the launcher calls it for a map of 256 channels and 4200 positions."""
    maps, others = TENSORS[operator, kernel]
    wide = 128 if dtype == "*fp32" else 256  # positions of a warp's load
    blocks: dict[str, Any] = {"CHANNELS_LAST": channels_last}
    if operator == "mc_dropout":
        blocks |= {"BLOCK_Q": 32, "BLOCK_S": 16} if channels_last else {"BLOCK_Q": 1, "BLOCK_S": 4 * wide}
    else:
        blocks |= {"BLOCK_Q": wide // 4, "BLOCK_S": 4} if channels_last else {"BLOCK_Q": 4, "BLOCK_S": wide}
        blocks["STEPS"] = 4 if not channels_last or wide == 128 else 1
    if operator == "feature_distance":
        blocks |= {"B": "i32", "WEIGHTS": 2} | ({"MEANS": True} if kernel == "_backward_kernel" else {})
    tensors = dict.fromkeys(maps, dtype) | dict.fromkeys(others, "*fp32")
    arguments = {**SCALARS, **draw, **blocks, **tensors}
    pointers = tuple(n for n, kind in arguments.items() if isinstance(kind, str) and kind.startswith("*"))
    return Build(f"kernels.triton.{operator}", kernel, arguments, aligned=pointers)


def check(builds: list[Build], targets: tuple[int, ...]) -> None:
    for result in inspect(builds, targets):
        operator, kernel = result.build.module.rpartition(".")[2], result.build.kernel
        maps, _ = TENSORS[operator, kernel]
        assert result.local == 0 and result.local_instructions == 0, str(result)
        assert result.registers <= 168, str(result)  # three blocks of 128 threads fit a multiprocessor
        # With positions inside a program has a tile for each of the four channels of a quad: every map is read by at
        # least one wide instruction a lane. With channels inside the quads lie in one tile. Written by nothing else.
        lanes = 1 if result.build.arguments["CHANNELS_LAST"] else 4
        assert result.loads.get(128, 0) >= lanes * len([name for name in maps if name not in WRITTEN]), str(result)
        if WRITTEN & set(maps):
            assert set(result.stores) == {128}, str(result)


@pytest.mark.slow
def test_all_kernels_of_one_target() -> None:
    builds = [build(*name, "*bf16", DIFFERENT) for name in TENSORS]
    builds += [build("mc_dropout", "_forward_kernel", "*fp32", EQUAL)]
    builds += [build("feature_distance", "_backward_kernel", "*bf16", DIFFERENT, channels_last=True)]
    check(builds, (90,))


@by_targets
def test_every_target(targets: tuple[int, ...]) -> None:
    builds = [build(*name, "*fp32", EQUAL) for name in TENSORS]
    builds += [build(*name, "*bf16", EQUAL, channels_last=True) for name in TENSORS if name[0] != "attention_stats"]
    check(builds, targets)
