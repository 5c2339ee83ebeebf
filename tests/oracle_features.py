"""Feature maps and norms of the oracle: the value at each row, and the vector-Jacobian product by hand.

Sources: Schlag, Irie, Schmidhuber 2021, eqs. 29 (sum), 31-32 (FAVOR+), 37 (DPFP, in the index order of the
official code). A row is the last axis. As in oracle.py all operations are analytic, so that complex steps can
check the products; NaN at a kink gives NaN there. Nothing here knows of the library.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Map(NamedTuple):
    value: Callable  # x [..., K_in] -> y [..., K]
    vjp: Callable  # dy [..., K], x [..., K_in] -> dx [..., K_in]
    before_norm: "Map | None" = None  # its rows at another scale, which a norm divides out; else itself


def features(feature_map=None, qk_norm=None):
    """The Map of queries and keys: the feature map, then the norm."""
    phi, norm = feature_map or NORMS[None], NORMS[qk_norm]
    if qk_norm and phi.before_norm:
        phi = phi.before_norm

    def value(x):
        x = x.astype(np.result_type(x, np.float64))
        with np.errstate(all="ignore"):
            return norm.value(phi.value(x))

    def vjp(dy, x):
        x, dy = (y.astype(np.result_type(y, np.float64)) for y in (x, dy))
        with np.errstate(all="ignore"):
            return phi.vjp(norm.vjp(dy, phi.value(x)), x)

    return Map(value, vjp)


# Feature maps, named as in the library.


def ReLU():
    return Map(lambda x: _where_positive(x, x), lambda dy, x: _where_positive(x, dy))


def ELU1():
    def slope(x):
        return np.where(x.real > 0, 1, np.exp(np.where(x.real > 0, 0, x)))

    return Map(lambda x: np.where(x.real > 0, x + 1, slope(x)), lambda dy, x: dy * slope(x))


def Softmax():
    def value(x):
        y = np.exp(x - np.max(x.real, axis=-1, keepdims=True, initial=-np.inf))
        return y / _sum(y)

    def vjp(dy, x):
        y = value(x)
        return y * (dy - _sum(dy * y))

    return Map(value, vjp)


def DPFP(nu=1):
    """Block j = 1..nu holds y_i y_{i-j}, with y = [r(x), r(-x)] and indices modulo 2 K_in."""

    def rectified(x):
        return np.concatenate([_where_positive(x, x), _where_positive(-x, -x)], axis=-1)

    def value(x):
        y = rectified(x)
        return np.concatenate([y * np.roll(y, j, axis=-1) for j in range(1, nu + 1)], axis=-1)

    def vjp(dphi, x):
        y, dy = rectified(x), 0
        for j, d in enumerate(np.split(dphi, nu, axis=-1), start=1):
            dy = dy + d * np.roll(y, j, axis=-1) + np.roll(d * y, -j, axis=-1)
        positive, negative = np.split(dy, 2, axis=-1)
        return _where_positive(x, positive) - _where_positive(-x, negative)

    return Map(value, vjp)


def FAVOR(projection, eps=0.0):
    """exp(+-R x - |x|^2 / 2) + eps, over sqrt(2 m), with R = projection [m,K_in].

    Before a norm, without eps, rows are taken relative to their largest feature: none underflows.
    """
    R = projection.astype(np.float64)
    root = np.sqrt(2 * len(R))

    def exponentials(x):
        half = _sum(x * x) / 2
        return np.exp(x @ R.T - half), np.exp(-x @ R.T - half)

    def value(x):
        return (np.concatenate(exponentials(x), axis=-1) + eps) / root

    def vjp(dy, x):
        plus, minus = (d * y / root for d, y in zip(np.split(dy, 2, axis=-1), exponentials(x), strict=True))
        return (plus - minus) @ R - _sum(plus + minus) * x

    def relative(x):
        largest = np.max(np.abs((x @ R.T).real), axis=-1, keepdims=True)
        return np.exp(np.concatenate([x @ R.T, -x @ R.T], axis=-1) - largest)

    def relative_vjp(dy, x):
        # Behind a norm dy is orthogonal to the row, so that the row's own scale passes no gradient.
        plus, minus = np.split(dy * relative(x), 2, axis=-1)
        return (plus - minus) @ R

    return Map(value, vjp, None if eps else Map(relative, relative_vjp))


# Norms. A row without a norm becomes zero and passes no gradient.


def _sum_norm(x):
    total = _sum(x)
    return _unless(total.real == 0, x / total)


def _sum_norm_vjp(dy, x):
    total = _sum(x)
    return _unless(total.real == 0, (dy - _sum(dy * _sum_norm(x))) / total)


def _l2_norm(x):
    zero, largest, size = _l2_size(x)
    return _unless(zero, x / largest / size)


def _l2_norm_vjp(dy, x):
    zero, largest, size = _l2_size(x)
    return _unless(zero, (dy - _l2_norm(x) * _sum(dy * _l2_norm(x))) / largest / size)


def _l2_size(x):
    """Whether x = 0, and |x| as a product of two, of which no square over- or underflows."""
    largest = np.max(np.abs(x.real), axis=-1, keepdims=True, initial=0)
    return largest == 0, largest, np.sqrt(_sum((x / largest) ** 2))


NORMS = {
    None: Map(lambda x: x, lambda dy, x: dy),
    "sum": Map(_sum_norm, _sum_norm_vjp),
    "l2": Map(_l2_norm, _l2_norm_vjp),
}


def _sum(x):
    return np.sum(x, axis=-1, keepdims=True)


def _unless(condition, y):
    return np.where(condition, 0, y)


def _where_positive(x, y):
    """y where x > 0, 0 where x <= 0, NaN where x is NaN."""
    return np.where(x.real > 0, y, np.where(x.real <= 0, 0, x))
