"""Drawing dropout factors inside a kernel: Philox4x32-7, then the alias tables of `kernels.common.dropout_table`.

A tensor is seen as [B, C, S]: images, channels, positions. One Philox call serves four channels of one position:

    counter = (position, image * ceil(C / 4) + channel // 4, offset (56 bits) | group (8 bits)),  key = seed (64 bits)
    word channel % 4 of the result is the random number of the element

so that contiguous maps (positions inside: four rows of one tile) and channels_last maps (channels inside: four
neighbours of a row) both use all four words, and what an element gets depends on nothing but its place. Mode
`channel` draws for position 0 and uses that for the whole plane.

Shape letters: Q quads (groups of four channels), S positions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.dropout import Dropout, int32
from kernels.common.dropout_table import table

COMBINE = {"none": 0, "sum": 1, "mean": 2}
NOT_SPECIALIZED = ["seed_low", "seed_high", "offset_low", "offset_high"]
"""Arguments of `draw_quads` whose values change from call to call: a kernel is not compiled anew for some of them."""


def draw_arguments(dropout: Dropout | None, device: torch.device) -> dict[str, Any]:
    """The arguments that every kernel passes on to `draw_quads`; nothing is drawn without a dropout."""
    if dropout is None:
        one = dict.fromkeys(NOT_SPECIALIZED, 0)
        return one | {
            "words": None,
            "means": None,
            "variances": None,
            "groups": None,
            "per_copy": 0.0,
            "per_pair": 0.0,
            "GROUPS": 0,
            "COPIES": 0,
            "CHANNEL": False,
            "COMBINE": 0,
        }
    tables = table(dropout.rates, device)
    first = tables.groups[0]
    one_rate = len(tables.groups) == 1 and first.rate is not None
    return {
        "seed_low": int32(dropout.seed),
        "seed_high": int32(dropout.seed >> 32),
        "offset_low": int32(dropout.offset),
        "offset_high": int32(dropout.offset >> 32),
        "words": tables.words,
        "means": None if one_rate else tables.mean,
        "variances": None if one_rate else tables.variance,
        "groups": tables.header,
        "per_copy": first.per_copy,
        "per_pair": first.per_pair,
        "GROUPS": len(tables.groups),
        "COPIES": first.copies if one_rate else 0,
        "CHANNEL": dropout.mode == "channel",
        "COMBINE": COMBINE[dropout.combine],
    }


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x in one of the two layouts that kernels read, and whether it is channels_last ([B, S, C] in memory)."""
    if x.is_contiguous():
        return x, False
    if x.dim() >= 3 and x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def walk(
    B: int, C: int, S: int, element_size: int, channels_last: bool, tile: int | None = None
) -> tuple[int, dict[str, int]]:
    """Programs and block sizes of a kernel that stays at some positions and walks over channels.

    A warp loads 512 bytes of a row. A tile has four rows, one a warp, and with the four channels of a quad every thread
    has four loads a map in flight; larger tiles would need too many registers for the draws.
    """
    quads = triton.cdiv(C, 4)
    wide = 512 // element_size  # elements
    tile = tile or 4 * wide
    if channels_last:
        block_q = min(triton.next_power_of_2(quads), wide // 4)
        block_s = max(1, tile // block_q // 4)
    else:
        block_s = min(triton.next_power_of_2(S), wide)
        block_q = min(triton.next_power_of_2(quads), max(1, tile // block_s))
    steps = min(triton.cdiv(quads, block_q), 4)
    programs = B * triton.cdiv(S, block_s) * triton.cdiv(quads, block_q * steps)
    return programs, {"BLOCK_Q": block_q, "BLOCK_S": block_s, "STEPS": steps}


@triton.jit
def program_of_image(C, S, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr):
    """image (int64), first quad and first position of this program in the grid of `walk`."""
    program = tl.program_id(0)
    tiles_s = tl.cdiv(S, BLOCK_S)
    parts = tl.cdiv(tl.cdiv(C, 4), BLOCK_Q * STEPS)
    rest = program // tiles_s
    return (rest // parts).to(tl.int64), (rest % parts) * (BLOCK_Q * STEPS), (program % tiles_s) * BLOCK_S


@triton.jit
def factors(
    position,
    quad,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    words,
    means,
    variances,
    groups,
    per_copy,
    per_pair,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
    CHANNEL: tl.constexpr,
    COMBINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Factors alone: a tuple of four tiles, one tile of four times the width for channels_last; 1 without a draw."""
    if GROUPS == 0:
        f = 1.0 if CHANNELS_LAST else (1.0, 1.0, 1.0, 1.0)
    else:
        f, _ = draw_quads(
            position,
            quad.to(tl.int32),
            seed_low,
            seed_high,
            offset_low,
            offset_high,
            words,
            means,
            variances,
            groups,
            per_copy,
            per_pair,
            GROUPS,
            COPIES,
            CHANNEL,
            COMBINE,
        )
        if CHANNELS_LAST:
            f = interleave(f)
    return f


@triton.jit
def draw_quads(
    position,
    quad,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    words,
    means,
    variances,
    groups,
    per_copy,
    per_pair,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
    CHANNEL: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """Factors f (the result is f x) and v (the variance is v x^2) of four channels, as two tuples of float32 tiles.

    position, quad: int32, broadcast against each other, e.g. [1, S] and [Q, 1]. Mode `channel` gives [Q, 1] back.
    groups: int32 [GROUPS, 3]: first column, bits, copies; see `dropout_table.Group`.
    COPIES: N where all rates are equal (values by formula), else 0 (values from the tables).
    """
    if CHANNEL:
        position = tl.zeros([1, 1], tl.int32)
    a = (0.0, 0.0, 0.0, 0.0)
    v = (0.0, 0.0, 0.0, 0.0)
    drawn = 0.0
    for group in tl.static_range(GROUPS):
        start = tl.load(groups + 3 * group)
        bits = tl.load(groups + 3 * group + 1)
        copies = tl.load(groups + 3 * group + 2).to(tl.float32)
        share = copies / (drawn + copies)
        drawn += copies
        r = philox(position, quad, offset_low, offset_high + (group << 24), seed_low, seed_high)
        a0, v0 = merged(a[0], v[0], share, r[0], start, bits, words, means, variances, per_copy, per_pair, COPIES)
        a1, v1 = merged(a[1], v[1], share, r[1], start, bits, words, means, variances, per_copy, per_pair, COPIES)
        a2, v2 = merged(a[2], v[2], share, r[2], start, bits, words, means, variances, per_copy, per_pair, COPIES)
        a3, v3 = merged(a[3], v[3], share, r[3], start, bits, words, means, variances, per_copy, per_pair, COPIES)
        a = (a0, a1, a2, a3)
        v = (v0, v1, v2, v3)
    return (combined(a[0], COMBINE), combined(a[1], COMBINE), combined(a[2], COMBINE), combined(a[3], COMBINE)), v


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 (Salmon et al., SC 2011): int32 counters and keys → four uint32 words."""
    c0 = c0.to(tl.uint32, bitcast=True)
    c1 = c1.to(tl.uint32, bitcast=True)
    c2 = c2.to(tl.uint32, bitcast=True)
    c3 = c3.to(tl.uint32, bitcast=True)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(7):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def moments(random, start, bits, words, means, variances, per_copy, per_pair, COPIES: tl.constexpr):
    """Random uint32 → a and v of one group's copies, by the alias method: one table look-up, and two for the values
    where the rates differ."""
    coin_bits = (32 - bits).to(tl.uint32)
    column = (random >> coin_bits).to(tl.int32)
    coin = random & ((tl.full([], 1, tl.uint32) << coin_bits) - 1)
    word = tl.load(words + start + column).to(tl.uint32, bitcast=True)
    alias = (word & ((tl.full([], 1, tl.uint32) << bits.to(tl.uint32)) - 1)).to(tl.int32)
    outcome = tl.where(coin < (word >> bits.to(tl.uint32)), column, alias)
    if COPIES:
        kept = outcome.to(tl.float32)
        a = kept * per_copy
        v = kept * (COPIES - kept) * per_pair
    else:
        a = tl.load(means + start + outcome)
        v = tl.load(variances + start + outcome)
    return a, v


@triton.jit
def merged(a, v, share, random, start, bits, words, means, variances, per_copy, per_pair, COPIES: tl.constexpr):
    """Mean and variance of the copies before this group and of its own, which are `share` of all so far."""
    a2, v2 = moments(random, start, bits, words, means, variances, per_copy, per_pair, COPIES)
    if COPIES:  # the only group
        return a2, v2
    else:
        delta = a2 - a
        rest = 1.0 - share
        return a + share * delta, rest * v + share * v2 + share * rest * delta * delta


@triton.jit
def combined(a, COMBINE: tl.constexpr):
    """Factor of the mean of the copies → factor of the result."""
    if COMBINE == 1:
        return a + 1.0
    elif COMBINE == 2:
        return (a + 1.0) * 0.5
    else:
        return a


@triton.jit
def tile_of_program(C, S, CHANNELS_LAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """image (int64), quad and position (int32 tiles): [Q, 1] and [1, S], or [1, Q] and [S, 1] for channels_last.

    The grid is one-dimensional; tiles of positions follow each other, then quads, then images.
    """
    program = tl.program_id(0)
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles_q = tl.cdiv(tl.cdiv(C, 4), BLOCK_Q)
    position = (program % tiles_s).to(tl.int32) * BLOCK_S + tl.arange(0, BLOCK_S)
    rest = program // tiles_s
    quad = (rest % tiles_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image = (rest // tiles_q).to(tl.int64)
    if CHANNELS_LAST:
        return image, quad[None, :], position[:, None]
    else:
        return image, quad[:, None], position[None, :]


@triton.jit
def interleave(t):
    """Four tiles [S, Q] → [S, 4 * Q] with tile j at columns 4 i + j."""
    wide = tl.join(tl.join(t[0], t[2]), tl.join(t[1], t[3]))
    return tl.reshape(wide, [wide.shape[0], 4 * wide.shape[1]])


@triton.jit
def first_channel(C, S, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """First channel of the tile of this program (see `tile_of_program`)."""
    return (tl.program_id(0) // tl.cdiv(S, BLOCK_S)) % tl.cdiv(tl.cdiv(C, 4), BLOCK_Q) * (4 * BLOCK_Q)
