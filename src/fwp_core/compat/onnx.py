"""The operator LinearAttention of ONNX, operator set 27: four update rules, packed heads, grouped queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import ops
from .._core import ArgumentError, DTypeError, FwpError, ShapeError

__all__ = ["linear_attention"]

Array = NDArray[Any]


class _Rule(NamedTuple):
    """What an update rule needs, and forbids otherwise."""

    decay: bool
    beta: bool


UpdateRule = Literal["linear", "gated", "delta", "gated_delta"]
_RULES: dict[str, _Rule] = {
    "linear": _Rule(decay=False, beta=False),
    "gated": _Rule(decay=True, beta=False),
    "delta": _Rule(decay=False, beta=True),
    "gated_delta": _Rule(decay=True, beta=True),
}
_STATE_DTYPES = ("float32", "float64", "float16", "bfloat16")
# What the operator calls the arguments of fwp_core.delta_rule.
_NAMES = {"q": "query", "k": "key", "v": "value", "g": "decay", "initial_state": "past_state"}


def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    past_state: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    update_rule: UpdateRule = "gated_delta",
    scale: float = 0.0,
    chunk_size: int = 64,
) -> tuple[Array, Array]:
    """Compute LinearAttention of ONNX: inputs by position, attributes by name, as the operator has them.

    With Hq = ``q_num_heads``, H = ``kv_num_heads``, and heads packed into the last axis:

    Parameters
    ----------
    query : ndarray [B,T,Hq*K]
        float32, float16 or bfloat16, as all but the state; float64 is computed as such.
    key, value : ndarray [B,T,H*K], [B,T,H*V]
        Hq is a multiple of H: Hq/H neighbouring heads of queries read the fast weight of one head.
    past_state : ndarray [B,H,K,V], optional
        Fast weights to start from; zeros if None.
    decay : ndarray [B,T,H] or [B,T,H*K]
        Log decay; for "gated" and "gated_delta", which need it.
    beta : ndarray [B,T,H] or [B,T,1]
        Write strengths; for "delta" and "gated_delta", which need it.
    update_rule : "linear", "gated", "delta" or "gated_delta"
    scale : float
        Factor of the output; 0 means 1 / sqrt(K).
    chunk_size : int
        Has no effect, as the operator allows.

    Returns
    -------
    output : ndarray [B,T,Hq*V]
        Of the dtype of query.
    present_state : ndarray [B,H,K,V]
        Of the dtype of past_state, or else of query.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, MemoryError, KeyboardInterrupt
        As :func:`fwp_core.delta_rule`.

    Notes
    -----
    Results are those of :func:`fwp_core.delta_rule` and :func:`fwp_core.linear_attention`. Where Hq > H, each
    of the Hq heads has a fast weight of its own while it runs: Hq/H times the work and memory of the states.
    """
    decayed, delta = _checked_rule(update_rule, decay, beta)
    group = _group_size(q_num_heads, kv_num_heads)
    q = _unpacked("query", query, q_num_heads)
    k = _unpacked("key", key, kv_num_heads)
    v = _unpacked("value", value, kv_num_heads)
    _check_sizes(q, k, v)
    g = _gate("decay", decay, k, (1, k.shape[3])) if decayed else None
    strength = _gate("beta", beta, k, (1,), shared=True) if delta else None
    state = _state(past_state, k, v)

    def per_query_head(x: Any, axis: int) -> Any:
        return x if x is None or group == 1 else np.repeat(x, group, axis)

    rule = ops.delta_rule if delta else ops.linear_attention
    with _names_of_the_operator():
        o, final_state = rule(
            q,
            k,
            v,
            per_query_head(strength, 2),
            per_query_head(g, 2),
            scale=scale or max(k.shape[3], 1) ** -0.5,
            initial_state=per_query_head(state, 1),
        )
    output = o.reshape(*query.shape[:2], q_num_heads * v.shape[3])
    present_dtype = query.dtype if past_state is None else past_state.dtype
    # Where heads of queries share a state, a copy: one of all heads would be kept alive.
    return output, final_state[:, ::group].astype(present_dtype, copy=group > 1)


@contextmanager
def _names_of_the_operator() -> Iterator[None]:
    """Errors name the inputs as the operator does."""
    try:
        yield
    except FwpError as error:
        name, colon, problem = str(error).partition(":")
        raise type(error)(_NAMES.get(name, name) + colon + problem) from None


def _checked_rule(name: str, decay: Array | None, beta: Array | None) -> _Rule:
    if not isinstance(name, str) or name not in _RULES:
        raise ArgumentError(f"update_rule: expected one of {', '.join(_RULES)}, got {name!r}")
    rule = _RULES[name]
    for argument, given, needed in (("decay", decay, rule.decay), ("beta", beta, rule.beta)):
        if (given is not None) != needed:
            expected, got = ("an array", "None") if needed else ("None", "an array")
            raise ArgumentError(f"{argument}: expected {expected} with update_rule {name!r}, got {got}")
    return rule


def _group_size(q_num_heads: int, kv_num_heads: int) -> int:
    _check_integers(q_num_heads=q_num_heads, kv_num_heads=kv_num_heads)
    if kv_num_heads < 1 or q_num_heads < 1 or q_num_heads % kv_num_heads:
        raise ArgumentError(
            f"q_num_heads: expected a positive multiple of kv_num_heads={kv_num_heads}, got {q_num_heads}"
        )
    return q_num_heads // kv_num_heads


def _check_integers(**numbers: object) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise DTypeError(f"{name}: expected an integer, got {type(number).__name__}")


def _unpacked(name: str, x: Array, heads: int) -> Array:
    """[B,T,heads*D] as [B,T,heads,D], without a copy where that is possible."""
    if type(x) is not np.ndarray:
        raise _not_an_array(name, x)
    if x.ndim != 3 or x.shape[2] % heads:
        raise ShapeError(f"{name}: expected shape (B, T, {heads} * D), got {x.shape}")
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def _not_an_array(name: str, x: object) -> DTypeError:
    subclass = ", no subclass" if isinstance(x, np.ndarray) else ""
    return DTypeError(f"{name}: expected a NumPy array{subclass}, got {type(x).__name__}")


def _check_sizes(q: Array, k: Array, v: Array) -> None:
    """Of the unpacked inputs: errors tell the shapes of the packed ones."""
    B, T, _, K = q.shape
    H = k.shape[2]
    if k.shape != (B, T, H, K):
        raise ShapeError(f"key: expected shape {(B, T, H * K)}, got {(*k.shape[:2], H * k.shape[3])}")
    if v.shape[:2] != (B, T):
        raise ShapeError(f"value: expected shape ({B}, {T}, {H} * D), got {(*v.shape[:2], H * v.shape[3])}")


def _gate(name: str, x: Array | None, k: Array, sizes: tuple[int, ...], shared: bool = False) -> Array:
    """[B,T,H] or, of the larger size, [B,T,H,K]; one for all heads becomes one each."""
    B, T, H, _ = k.shape
    expected = [(B, T, H * size) for size in sizes] + ([(B, T, 1)] if shared else [])
    if type(x) is not np.ndarray:
        raise _not_an_array(name, x)
    if x.shape not in expected:
        raise ShapeError(f"{name}: expected shape {' or '.join(map(str, expected))}, got {x.shape}")
    if x.shape[2] == H or shared:
        return np.broadcast_to(x, (B, T, H))
    return x.reshape(k.shape)


def _state(past_state: Array | None, k: Array, v: Array) -> Array | None:
    """In the precision of sums."""
    if past_state is None:
        return None
    if type(past_state) is not np.ndarray:
        raise _not_an_array("past_state", past_state)
    if past_state.dtype.name not in _STATE_DTYPES:
        raise DTypeError(
            f"past_state: expected dtype float32, float64, float16 or bfloat16, got {past_state.dtype}"
        )
    expected = (k.shape[0], *k.shape[2:], v.shape[3])
    if past_state.shape != expected:
        raise ShapeError(f"past_state: expected shape {expected}, got {past_state.shape}")
    return past_state.astype(np.float64 if k.dtype == np.float64 else np.float32, copy=False)
