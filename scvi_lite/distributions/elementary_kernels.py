"""exp and log of single floats, which the compiler can apply to many numbers at once.

They are polynomials: coefficients interpolate (exp(r) - 1 - r) / r² and (log(1 + f) - f) / f² at Chebyshev nodes;
relative errors stay below 3e-7. Their halves are computed side by side, so that a processor need not wait for each sum.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

F, INT, U = np.float32, np.int32, np.uint64


def _wide(context):
    """Called in a function: compile it for the widest vectors of the machine; LLVM takes half of them by itself."""

    def mark(context, builder, signature, arguments):
        # llvmlite knows no attributes of LLVM that have a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return numba.types.none(), mark


wide: Any = intrinsic(_wide)


@numba.njit(fastmath={"contract"})
def exp(x):
    """exp(x) of a float32: 2^k times a polynomial on [-log(2)/2, log(2)/2]."""
    x = min(max(x, F(-87)), F(88))
    k = np.rint(x * F(1.4426950408889634))
    r = x - k * F(0.693359375) + k * F(2.12194440e-4)
    rr = r * r
    p = (F(0.00139262) * r + F(0.00836317)) * rr + (F(0.04166655) * r + F(0.16666577))
    p = p * r + F(0.5)
    return (p * rr + (r + F(1))) * INT((INT(k) + INT(127)) << INT(23)).view(F)


@numba.njit(fastmath={"contract"})
def log1p(r):
    """log(1 + r) of a float32 r >= 0: 1 + r is 2^k (1 + f) with |f| <= 1/3; k = 0 keeps every digit of a small r."""
    k = exponent(r + F(1))
    power = INT((INT(127) - k) << INT(23)).view(F)
    return log_polynomial((power - F(1)) + r * power) + F(k) * F(0.6931471805599453)


@numba.njit(fastmath={"contract"})
def log(u):
    """log(u) of a float32."""
    k = exponent(u)
    return log_polynomial(u * INT((INT(127) - k) << INT(23)).view(F) - F(1)) + F(k) * F(0.6931471805599453)


@numba.njit
def exponent(u):
    """The k for which u / 2^k lies between 2/3 and 4/3, from the bits of a float32."""
    return INT((F(u * F(1.5)).view(INT) >> INT(23)) - INT(127))


@numba.njit(fastmath={"contract"})
def log_polynomial(f):
    """log(1 + f) for -1/3 <= f <= 1/3."""
    ff = f * f
    high = (F(0.13425749) * f - F(0.15040764)) * ff + (F(0.14118310) * f - F(0.16483018))
    low = (F(0.20003780) * f - F(0.25004146)) * ff + (F(0.33333320) * f - F(0.49999986))
    return (high * (ff * ff) + low) * ff + f
