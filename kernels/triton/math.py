"""Device functions that several kernels share. All arguments are float32 tensors of any one shape.

exp is the hardware's (2 ulp); the two polynomials below were fitted for the least relative error and stand within
2.1e-7 of log1p(e) / e and atan(r) / r on [0, 1]. They need neither the special function unit nor a branch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in 0..1, relative error 2.1e-7."""
    p = 0.00523269144 * e - 0.0295052275
    p = p * e + 0.0782259334
    p = p * e - 0.136632442
    p = p * e + 0.19106006
    p = p * e - 0.24842982
    p = p * e + 0.333190968
    p = p * e - 0.499994931
    p = p * e + 0.99999997
    return p * e


@triton.jit
def atan_unit(r):
    """atan(r) for r in 0..1, relative error 1.6e-7."""
    s = r * r
    p = 0.00284988822 * s - 0.0160686234
    p = p * s + 0.0426915102
    p = p * s - 0.0750429378
    p = p * s + 0.106409337
    p = p * s - 0.142036444
    p = p * s + 0.199926194
    p = p * s - 0.333330733
    p = p * s + 0.999999985
    return p * r


@triton.jit
def power(x, exponent, EXPONENT: tl.constexpr):
    """x^exponent for x >= 0 and exponent > 0; EXPONENT is 1 or 2 where it is that, else 0."""
    if EXPONENT == 1:
        return x
    elif EXPONENT == 2:
        return x * x
    else:
        return tl.exp2(exponent * tl.log2(x))  # x = 0: 2^-inf = 0


@triton.jit
def power_slope(x, exponent, EXPONENT: tl.constexpr):
    """Derivative of `power`, 0 at x = 0 (where it may be infinite) unless EXPONENT is 1."""
    if EXPONENT == 1:
        return tl.full(x.shape, 1.0, tl.float32)
    elif EXPONENT == 2:
        return 2.0 * x
    else:
        return tl.where(x > 0, exponent * tl.exp2((exponent - 1.0) * tl.log2(x)), 0.0)


def unit(size: int) -> int:
    """The largest of 16, 8, 4, 2, 1 that divides `size`. A kernel that is given `size // unit` and the constexpr
    `unit` can see how its rows are aligned, and loads them 16 bytes at a time."""
    return next(u for u in (16, 8, 4, 2, 1) if size % u == 0)


def special_exponent(exponent: float) -> int:
    """EXPONENT of `power`."""
    return int(exponent) if exponent in (1.0, 2.0) else 0
