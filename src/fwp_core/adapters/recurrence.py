"""The scans as plain functions of arrays, one token after the other, for what has no formula written by hand.

A framework that differentiates can differentiate this text any number of times: second derivatives are taken
of it. It uses only what ``torch`` and ``jax.numpy`` call by the same names, given as ``xp``, and writes
nothing in place. Per head, with z as one more column of the state S where reads are normalised::

    S'  = exp(g_t) S_{t-1}
    u_t = beta_t v_t                          linear
    u_t = beta_t (v_t - S'^T k_t)             delta
    S_t = S' + k_t u_t^T
    o_t = scale S_t^T q_t

It costs memory for all states, O(T K V), when it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..feature_maps import Parameters

Array = Any  # of the framework of xp
Loop = Callable[[Callable[[Array, Any], tuple[Array, Array]], Array, Any], tuple[Array, Array]]


class Rule(NamedTuple):
    """What holds for every token."""

    delta: bool
    features: Parameters | None = None
    qk_norm: str | None = None
    attention_norm: bool = False
    eps: float = 1e-6
    scale: float = 1.0


def scan(
    xp: Any,
    rule: Rule,
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array | None,
    initial_state: Array | None = None,
    cu_seqlens: Sequence[int] | None = None,
    loop: Loop | None = None,
) -> tuple[Array, Array]:
    """Return ``o`` [B,T,H,V] and ``final_state`` as :func:`fwp_core.delta_rule` does.

    All arrays have one dtype, that of the results. ``cu_seqlens`` are plain integers. ``loop(step, state,
    tokens)`` walks over the first axis of a tuple of arrays as ``jax.lax.scan`` does, which may be given; a
    Python loop unless it is.
    """
    loop = loop or (lambda step, state, tokens: _walk(xp, step, state, tokens))
    heads = max(x.shape[2] for x in (q, k, v))
    q, k = (_normalised_features(xp, rule, x) for x in (q, k))
    q, k, v = (_time_first(xp, _repeated(xp, x, heads)) for x in (q, k, v))
    beta, g = (None if x is None else _time_first(xp, x) for x in (beta, g))
    tokens = tuple(x for x in (q, k, v, beta, g) if x is not None)
    if initial_state is None:
        sequences = v.shape[1] if cu_seqlens is None else len(cu_seqlens) - 1
        shape = (sequences, heads, k.shape[-1], v.shape[-1] + rule.attention_norm)
        initial_state = xp.broadcast_to(xp.zeros_like(xp.sum(v[..., :0])), shape)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        given = iter(token)
        return _token(xp, rule, state, *(None if x is None else next(given) for x in (q, k, v, beta, g)))

    if cu_seqlens is None:
        final_state, o = loop(step, initial_state, tokens)
    else:
        parts = [
            loop(step, initial_state[n : n + 1], tuple(x[start:end] for x in tokens))
            for n, (start, end) in enumerate(pairwise(cu_seqlens))
        ]
        empty = (initial_state[:0], v[:0])
        final_state = xp.concat([empty[0], *(state for state, _ in parts)], axis=0)
        o = xp.concat([empty[1], *(o for _, o in parts)], axis=0)
    return xp.moveaxis(o, 0, 1), final_state


def _walk(
    xp: Any, step: Callable[..., tuple[Array, Array]], state: Array, tokens: tuple[Array, ...]
) -> tuple[Array, Array]:
    rows = []
    for t in range(tokens[0].shape[0]):
        state, o = step(state, tuple(x[t] for x in tokens))
        rows.append(o)
    return state, xp.stack(rows, axis=0) if rows else tokens[2]  # no token: v is as empty as o


def _token(
    xp: Any, rule: Rule, state: Array, q: Array, k: Array, v: Array, beta: Array | None, g: Array | None
) -> tuple[Array, Array]:
    """One token of all heads: q, k [B,H,K], v [B,H,V], beta [B,H], g [B,H] or [B,H,K], state [B,H,K,V]."""
    if g is not None:
        state = _decayed(xp, state, g[..., None] if g.ndim == 3 else g[..., None, None])
    u = v - _read(xp, rule, state, k) if rule.delta else v
    u = u if beta is None else beta[..., None] * u
    if rule.attention_norm:
        u = xp.concat([u, xp.ones_like(u[..., :1]) if u.shape[-1] else xp.ones_like(k[..., :1])], axis=-1)
    state = state + k[..., :, None] * u[..., None, :]
    return state, rule.scale * _read(xp, rule, state, q)


def _decayed(xp: Any, state: Array, gate: Array) -> Array:
    """exp(gate) times the state. A gate of -inf is a reset: 0 whatever the state was, and no gradient."""
    reset = gate == -float("inf")
    return xp.where(reset, 0.0, xp.exp(xp.where(reset, 0.0, gate)) * state)


def _read(xp: Any, rule: Rule, state: Array, key: Array) -> Array:
    """``S^T k``, which attention_norm divides by z.k + eps."""
    sums = (key[..., None, :] @ state)[..., 0, :]
    return _share(xp, sums[..., :-1], sums[..., -1:], rule.eps) if rule.attention_norm else sums


def _share(xp: Any, x: Array, total: Array, eps: float = 0.0) -> Array:
    """``x / (total + eps)``, and 0 without a gradient where the total is 0."""
    nothing = total == 0
    return xp.where(nothing, 0.0, x / xp.where(nothing, 1.0, total + eps))


# Features and norms of rows [...,K_in].


def _normalised_features(xp: Any, rule: Rule, x: Array) -> Array:
    if rule.features is not None:
        x = _MAPS[rule.features.kind](xp, rule, rule.features, x)
    return _NORMS[rule.qk_norm](xp, x)


def _positive(xp: Any, x: Array) -> Array:
    return xp.where(x <= 0, 0.0, x)


def _largest(xp: Any, x: Array) -> Array:
    return xp.amax(x, -1, keepdims=True) if x.shape[-1] else xp.sum(x, -1, keepdims=True)


def _relu(xp: Any, rule: Rule, features: Parameters, x: Array) -> Array:
    return _positive(xp, x)


def _elu1(xp: Any, rule: Rule, features: Parameters, x: Array) -> Array:
    return xp.where(x > 0, x + 1, xp.exp(xp.where(x > 0, 0.0, x)))


def _softmax(xp: Any, rule: Rule, features: Parameters, x: Array) -> Array:
    y = xp.exp(x - _largest(xp, x))
    return y / xp.sum(y, -1, keepdims=True)


def _dpfp(xp: Any, rule: Rule, features: Parameters, x: Array) -> Array:
    r = xp.concat([_positive(xp, x), _positive(xp, -x)], axis=-1)
    return xp.concat([r * xp.roll(r, j, -1) for j in range(1, features.nu + 1)], axis=-1)


def _favor(xp: Any, rule: Rule, features: Parameters, x: Array) -> Array:
    projection = features.projection
    assert projection is not None
    y = x @ xp.moveaxis(projection, 0, 1)
    exponent = xp.concat([y, -y], axis=-1)
    if rule.qk_norm is not None and features.eps == 0:
        # The norm divides by whatever all features share; without it nothing over- or underflows.
        return xp.exp(exponent - _largest(xp, exponent))
    exponent = exponent - xp.sum(x * x, -1, keepdims=True) / 2
    return (xp.exp(exponent) + features.eps) / (2 * projection.shape[0]) ** 0.5


def _sum_norm(xp: Any, x: Array) -> Array:
    return _share(xp, x, xp.sum(x, -1, keepdims=True))


def _l2_norm(xp: Any, x: Array) -> Array:
    largest = _largest(xp, abs(x))
    x = _share(xp, x, largest)  # so that no square over- or underflows
    squares = xp.sum(x * x, -1, keepdims=True)
    return _share(xp, x, xp.sqrt(xp.where(largest == 0, 1.0, squares)))


_MAPS = dict(enumerate((_relu, _elu1, _softmax, _dpfp, _favor), start=1))  # by Parameters.kind
_NORMS: dict[str | None, Callable[[Any, Array], Array]] = {
    None: lambda xp, x: x,
    "sum": _sum_norm,
    "l2": _l2_norm,
}


# Axes.


def _repeated(xp: Any, x: Array, heads: int) -> Array:
    """[B,T,h,n] -> [B,T,H,n], every head repeated over its group."""
    B, T, own, n = x.shape
    if own == heads:
        return x
    return xp.broadcast_to(x[:, :, :, None], (B, T, own, heads // own, n)).reshape((B, T, heads, n))


def _time_first(xp: Any, x: Array) -> Array:
    return xp.moveaxis(x, 1, 0)
