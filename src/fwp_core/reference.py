"""The scans in plain float64 NumPy: their specification, and a text to learn from.

Each scan is written twice. ``form="recurrence"`` walks over the tokens with a fast weight ``S`` [K,V]. It
costs O(T K V) and is what the library computes. ``form="attention"`` never builds the state: it compares each
query with all earlier keys, as attention does, in O(T^2). Both give the same numbers on finite data; that is
the point of Schlag, Irie, Schmidhuber 2021, "Linear Transformers Are Secretly Fast Weight Programmers"::

    S'  = diag(a_t) S_{t-1}            a_t = 1, or exp(g_t) with g_t one number or K numbers      decay
    u_t = beta_t v_t                                                                              linear
    u_t = beta_t (v_t - S'^T k_t)                                                                 delta
    S_t = S' + k_t u_t^T                                                                          write
    o_t = scale * S_t^T q_t                                                                       read

q and k may first pass through a feature map, and then be divided by their sum (eq. 29) or length. Attention
normalisation (eqs. 26-28) turns both reads into weighted means. It needs the sum of the keys::

    z_t = a_t z_{t-1} + k_t                                                                       accumulator

and takes ``S'^T k_t / (z'.k_t + eps)`` for what is stored, and ``o_t = scale * S_t^T q_t / (z_t.q_t + eps)``;
either is 0 where z.k or z.q is. z is written as one more column of the state, one whose value is always 1.

Shapes are the library's: q [B,T,Hq,K], k [B,T,Hk,K], v [B,T,Hv,V], beta [B,T,H], g [B,T,H] or [B,T,H,K],
states [N,H,K,V], or [N,H,K,V+1] with attention normalisation; H = max(Hq,Hk,Hv), and head h reads q head
h // (H/Hq). With a feature map, q and k come with its input size, and K is its output size. Everything is
converted to float64; complex input stays complex, so that the scans can be differentiated by complex steps.

Two rules that the paper compares with, and that the library does not compute, are here too: :func:`fwp_1991`
and :func:`fwm_rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .feature_maps import FAVOR

__all__ = ["delta_rule", "fwm_rule", "fwp_1991", "linear_attention", "softmax_attention"]

Array = npt.NDArray[Any]
Form = Literal["recurrence", "attention"]
Map = Callable[[Array], Array]


class _Tokens(NamedTuple):
    """A batch of sequences, heads before time; n is 1 (a scalar decay, or none) or K (one per channel)."""

    q: Array  # [B,H,T,K]
    k: Array  # [B,H,T,K]
    v: Array  # [B,H,T,V]
    beta: Array  # [B,H,T]
    a: Array  # [B,H,T,n], the decay exp(g)
    state: Array  # [B,H,K,V] or, with z behind S, [B,H,K,V+1], before the first token
    scale: float
    eps: float | None  # of the attention normalisation, None without it


_Scan = Callable[[_Tokens], tuple[Array, Array]]


def linear_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    beta: npt.ArrayLike | None = None,
    g: npt.ArrayLike | None = None,
    *,
    feature_map: Map | None = None,
    qk_norm: Literal["sum", "l2"] | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    form: Form = "recurrence",
) -> tuple[Array, Array]:
    """Linear attention: every token adds ``beta_t k_t v_t^T`` to the fast weight.

    As attention, with ``decay[t,s] = a_{s+1} ... a_t`` for s <= t and 0 for s > t::

        o = scale * ((Q K^T * decay) diag(beta) V + (decay from the start) Q S_0)

    With attention normalisation, each row is divided by the sum of the weights that it gives to the tokens::

        o = scale * (Q K^T * decay) diag(beta) V / ((Q K^T * decay) 1 + eps)             from S_0 = 0, z_0 = 0

    Parameters
    ----------
    q, k, v, beta, g, scale, initial_state, cu_seqlens
        As in :func:`fwp_core.linear_attention`.
    feature_map : callable, optional
        Applied to q [B,T,Hq,K_in] and k [B,T,Hk,K_in] in float64 (complex where they are); it maps the last
        axis to K features. An object of ``fwp_core.feature_maps``, or any function.
    qk_norm : {None, "sum", "l2"}
        Divide each q and k by its sum, or by its length, after the feature map; what has none becomes 0. The
        features of ``FAVOR`` with eps 0 are taken relative to the largest of the row, as in the library: the
        norm divides that out, and ``exp(-|x|^2/2)`` cannot underflow.
    attention_norm, eps
        Divide by z.k + eps and by z.q + eps. States are then [N,H,K,V+1], with z last.
    form : {"recurrence", "attention"}
        The loop over tokens, or the masked O(T^2) form. With a decay per channel the latter takes O(T^2 K)
        memory.

    Returns
    -------
    o : ndarray [B,T,H,V]
    final_state : ndarray [N,H,K,V] or [N,H,K,V+1]
    """
    scan = _choose(form, _linear_recurrence, _linear_attention)
    q, k = _features(q, k, feature_map, qk_norm)
    return _run(scan, q, k, v, beta, g, scale, eps if attention_norm else None, initial_state, cu_seqlens)


def delta_rule(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    beta: npt.ArrayLike,
    g: npt.ArrayLike | None = None,
    *,
    feature_map: Map | None = None,
    qk_norm: Literal["sum", "l2"] | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    form: Form = "recurrence",
) -> tuple[Array, Array]:
    """The delta rule: a token moves the value stored under its key towards ``v_t`` by the part ``beta_t``.

    What a token writes, ``u_t``, depends on what the earlier ones wrote, so that the attention form solves a
    unit lower triangular system for all of them at once::

        A = strictly_lower(K K^T * decay)
        (I + diag(beta) A) U = diag(beta) (V - (decay before the read) K S_0)
        o = scale * ((Q K^T * decay) U + (decay from the start) Q S_0)

    Attention normalisation divides what a key reads by z'.k + eps. The accumulator z' does not depend on
    what is written, so that the system stays linear, with C = diag(1 / (A 1 + (decay) K z_0 + eps)), and 0 in
    place of 1 / (0 + eps)::

        (I + diag(beta) C A) U = diag(beta) (V - C (decay before the read) K S_0)

    Parameters
    ----------
    q, k, v, beta, g, scale, initial_state, cu_seqlens
        As in :func:`fwp_core.delta_rule`.
    feature_map, qk_norm, attention_norm, eps
        As in :func:`linear_attention`.
    form : {"recurrence", "attention"}
        The loop over tokens, or the masked O(T^2) form (O(T^3) for the system). With a decay per channel the
        latter takes O(T^2 K) memory.

    Returns
    -------
    o : ndarray [B,T,H,V]
    final_state : ndarray [N,H,K,V] or [N,H,K,V+1]

    Raises
    ------
    TypeError
        If beta is None.
    """
    _check_beta(beta)
    scan = _choose(form, _delta_recurrence, _delta_attention)
    q, k = _features(q, k, feature_map, qk_norm)
    return _run(scan, q, k, v, beta, g, scale, eps if attention_norm else None, initial_state, cu_seqlens)


def fwm_rule(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    beta: npt.ArrayLike,
    *,
    feature_map: Map = np.tanh,
    eps: float = 1e-5,
    initial_state: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The rule of the Fast Weight Memory of Schlag, Munkhdalai and Schmidhuber (2021).

    The paper compares with it: a delta rule whose fast weight is held inside the unit ball, and whose output
    is normalised::

        S_t = P / max(1, |P|_F),     P = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
        o_t = layer_norm(S_t^T q_t)

    with tanh on q and k, or another feature map (the paper, section 6.1.2). The layer norm has no learned
    part. The original is a third-order tensor that is read three times; this is its update rule alone.

    Parameters
    ----------
    q, k, v, beta, initial_state, cu_seqlens
        As in :func:`fwp_core.delta_rule`.
    feature_map : callable
        As in :func:`linear_attention`.
    eps : float
        Added to the variance in the layer norm.

    Returns
    -------
    o : ndarray [B,T,H,V]
    final_state : ndarray [N,H,K,V]

    Raises
    ------
    TypeError
        If beta is None.
    """
    _check_beta(beta)
    q, k = _features(q, k, feature_map, None)

    def scan(tokens: _Tokens) -> tuple[Array, Array]:
        return _recurrence(tokens, _delta_write, _into_unit_ball)

    o, final_state = _run(scan, q, k, v, beta, None, 1.0, None, initial_state, cu_seqlens)
    return _layer_norm(o, eps), final_state


def fwp_1991(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    activation: Map = np.tanh,
    initial_state: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The fast weight programmer of 1991: an outer product is added to the weights, which are then squashed.

    ::

        W_t = activation(W_{t-1} + a_t b_t^T)
        y_t = W_t x_t

    (eqs. 1 to 3 of the paper). Here v is a, k is b, q is x, o is y, and the state is W transposed. Where the
    activation is the identity, this is linear attention.

    Parameters
    ----------
    q, k, v, initial_state, cu_seqlens
        As in :func:`fwp_core.linear_attention`.
    activation : callable
        Applied to the fast weight, element by element, after each write.

    Returns
    -------
    o : ndarray [B,T,H,V]
    final_state : ndarray [N,H,K,V]
    """

    def scan(tokens: _Tokens) -> tuple[Array, Array]:
        return _recurrence(tokens, _linear_write, activation)

    return _run(scan, q, k, v, None, None, 1.0, None, initial_state, cu_seqlens)


def softmax_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    scale: float | None = None,
    causal: bool = True,
) -> Array:
    """Softmax attention, what the scans are compared with: ``o = softmax(scale * Q K^T) V``.

    Parameters
    ----------
    q, k, v : array_like [B,T,Hq,K], [B,T,Hk,K], [B,T,Hv,V]
    scale : float, optional
        1 / sqrt(K) unless given.
    causal : bool
        Whether a token sees only itself and the tokens before it.

    Returns
    -------
    o : ndarray [B,T,H,V]
    """
    q, k, v = (_real_or_complex(x) for x in (q, k, v))
    heads = max(x.shape[2] for x in (q, k, v))
    q, k, v = (_heads_first(x, heads) for x in (q, k, v))
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5
    scores = scale * (q @ k.swapaxes(-1, -2))
    if causal:
        scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.real.max(axis=-1, keepdims=True, initial=-np.inf))
    o: Array = ((weights / weights.sum(axis=-1, keepdims=True)) @ v).swapaxes(1, 2)
    return o


# The recurrence: one fast weight per head, one token after the other.


def _linear_recurrence(tokens: _Tokens) -> tuple[Array, Array]:
    return _recurrence(tokens, _linear_write)


def _delta_recurrence(tokens: _Tokens) -> tuple[Array, Array]:
    return _recurrence(tokens, _delta_write)


def _linear_write(v: Array, beta: Array, stored: Array) -> Array:
    u: Array = beta * v
    return u


def _delta_write(v: Array, beta: Array, stored: Array) -> Array:
    u: Array = beta * (v - stored)
    return u


def _recurrence(
    tokens: _Tokens, write: Callable[[Array, Array, Array], Array], settle: Map = lambda state: state
) -> tuple[Array, Array]:
    """Walk over the tokens: ``write`` is what a token writes, ``settle`` what the fast weight becomes."""
    q, k, v, beta, a, state, scale, eps = tokens
    o = np.zeros(v.shape, state.dtype)
    for t in range(v.shape[2]):
        gate = a[:, :, t, :, None]
        state = np.where(gate == 0, 0, gate * state)  # a reset clears the state, even of NaN
        stored = _read(state, k[:, :, t], eps)
        u = write(v[:, :, t], beta[:, :, t, None], stored)
        state = settle(state + k[:, :, t, :, None] * _with_one(u, eps)[:, :, None, :])
        o[:, :, t] = scale * _read(state, q[:, :, t], eps)
    return o, state


def _read(state: Array, key: Array, eps: float | None) -> Array:
    """``S^T k`` for each head, normalised if eps is a number: [B,H,K,V(+1)], [B,H,K] -> [B,H,V]."""
    return _normalised((key[:, :, None, :] @ state)[:, :, 0], eps)


def _into_unit_ball(state: Array) -> Array:
    size = np.sqrt(np.sum(state**2, axis=(-2, -1), keepdims=True))
    bounded: Array = state / np.where(size.real > 1, size, 1)
    return bounded


# Normalisations.


def _normalised(read: Array, eps: float | None) -> Array:
    """What was read, or what was read except the last column, z.k, divided by that."""
    return read if eps is None else _share(read[..., :-1], read[..., -1:], eps)


def _with_one(u: Array, eps: float | None) -> Array:
    """What is written, with the 1 for the column z where there is one."""
    return u if eps is None else np.concatenate([u, np.ones((*u.shape[:-1], 1))], axis=-1)


def _share(x: Array | float, total: Array, eps: float = 0.0) -> Array:
    """``x / (total + eps)``, and 0 where the total is 0."""
    nothing = total.real == 0
    share: Array = np.where(nothing, 0, x / np.where(nothing, 1, total + eps))
    return share


def _sum_norm(x: Array) -> Array:
    return _share(x, x.sum(axis=-1, keepdims=True))


def _l2_norm(x: Array) -> Array:
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    x = _share(x, np.where(np.isinf(largest), 1, largest))  # so that no square over- or underflows
    return _share(x, np.sqrt(np.sum(x**2, axis=-1, keepdims=True)))


def _layer_norm(x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    normalised: Array = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps)
    return normalised


# The attention form: position 0 is the initial state, position t the state after token t.


def _linear_attention(tokens: _Tokens) -> tuple[Array, Array]:
    return _attend(tokens, _decay(tokens.a), tokens.beta[..., None] * tokens.v)


def _delta_attention(tokens: _Tokens) -> tuple[Array, Array]:
    _, k, v, beta, a, state, _, eps = tokens
    decay = _decay(a)
    stored_before = (decay[:, :, 1:, 0] * k) @ state
    interaction = np.tril(_scores(k, k, decay[:, :, 1:, 1:]), -1)
    rate, weight = beta[..., None], np.ones(1)
    if eps is not None:
        total = stored_before[..., -1:] + interaction.sum(axis=-1, keepdims=True)
        stored_before, weight = stored_before[..., :-1], _share(1.0, total, eps)
    system = np.eye(v.shape[2]) + rate * weight * interaction
    u = np.linalg.solve(system, rate * (v - weight * stored_before))
    return _attend(tokens, decay, u)


def _attend(tokens: _Tokens, decay: Array, u: Array) -> tuple[Array, Array]:
    """Read the writes ``u`` [B,H,T,V] and the initial state at every token, and gather the final state."""
    q, k, _, _, _, state, scale, eps = tokens
    u = _with_one(u, eps)
    scores = _scores(q, k, decay[:, :, 1:, 1:])
    o = scale * _normalised(scores @ u + (decay[:, :, 1:, 0] * q) @ state, eps)
    kept = decay[:, :, -1, 0, :, None] * state
    written = (decay[:, :, -1, 1:] * k).swapaxes(-1, -2) @ u
    return o, kept + written


def _decay(a: Array) -> Array:
    """``decay[t,s] = a_{s+1} ... a_t`` for s <= t, else 0: [B,H,T,n] -> [B,H,T+1,T+1,n].

    The products are formed directly; differences of sums of log decays would fail at g = -inf.
    """
    batch, heads, time, n = a.shape
    decay = np.zeros((batch, heads, time + 1, time + 1, n), a.dtype)
    decay[:, :, 0, 0] = 1
    for t in range(1, time + 1):
        decay[:, :, t, :t] = a[:, :, t - 1, None] * decay[:, :, t - 1, :t]
        decay[:, :, t, t] = 1
    return decay


def _scores(x: Array, y: Array, decay: Array) -> Array:
    """``X Y^T`` under the decay, which is also the causal mask: [B,H,T,K] twice -> [B,H,T,T]."""
    scores: Array
    if decay.shape[-1] == 1:
        scores = (x @ y.swapaxes(-1, -2)) * decay[..., 0]
    else:
        scores = np.einsum("bhtk,bhtsk,bhsk->bhts", x, decay, y)
    return scores


# Arguments: features, defaults, grouped heads, packed sequences.


def _choose(form: str, recurrence: _Scan, attention: _Scan) -> _Scan:
    forms = {"recurrence": recurrence, "attention": attention}
    if form not in forms:
        raise ValueError(f"form: expected 'recurrence' or 'attention', got {form!r}")
    return forms[form]


def _check_beta(beta: npt.ArrayLike | None) -> None:
    if beta is None:
        raise TypeError("beta: the delta rule needs a write strength, got None")


def _features(
    q: npt.ArrayLike, k: npt.ArrayLike, feature_map: Map | None, qk_norm: str | None
) -> tuple[Array, Array]:
    """q and k after the feature map and their normalisation."""
    if feature_map is not None and not callable(feature_map):
        raise TypeError(f"feature_map: expected a callable or None, got {feature_map!r}")
    norms: dict[str | None, Map] = {None: lambda x: x, "sum": _sum_norm, "l2": _l2_norm}
    if qk_norm not in norms:
        raise ValueError(f"qk_norm: expected None, 'sum' or 'l2', got {qk_norm!r}")
    q, k = _real_or_complex(q), _real_or_complex(k)
    if isinstance(feature_map, FAVOR) and feature_map.eps == 0 and qk_norm is not None:
        feature_map = _relative_favor(feature_map.projection)
    if feature_map is not None:
        q, k = feature_map(q), feature_map(k)
    return norms[qk_norm](q), norms[qk_norm](k)


def _relative_favor(projection: Array) -> Map:
    """FAVOR's features, each row divided by its largest, whatever the length of x."""

    def features(x: Array) -> Array:
        exponents = np.concatenate([x @ projection.T, -x @ projection.T], axis=-1)
        relative: Array = np.exp(exponents - exponents.real.max(axis=-1, keepdims=True))
        return relative

    return features


def _run(
    scan: _Scan,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    beta: npt.ArrayLike | None,
    g: npt.ArrayLike | None,
    scale: float,
    eps: float | None,
    initial_state: npt.ArrayLike | None,
    cu_seqlens: npt.ArrayLike | None,
) -> tuple[Array, Array]:
    q, k, v = (_real_or_complex(x) for x in (q, k, v))
    heads = max(x.shape[2] for x in (q, k, v))
    rows = (*v.shape[:2], heads)
    beta = np.ones(rows) if beta is None else _real_or_complex(beta)
    a = np.ones(rows) if g is None else np.exp(_real_or_complex(g))
    a = a[..., None] if a.ndim == 3 else a
    if cu_seqlens is not None and v.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected B=1 for packed sequences, got B={v.shape[0]}")
    ends = [v.shape[1]] if cu_seqlens is None else np.asarray(cu_seqlens)[1:].tolist()
    sequences = v.shape[0] if cu_seqlens is None else len(ends)
    columns = v.shape[-1] + (eps is not None)
    dims = (sequences, heads, k.shape[-1], columns)
    state = np.zeros(dims) if initial_state is None else _real_or_complex(initial_state)
    state = state.astype(np.result_type(q, k, v, beta, a, state))

    q, k, v, beta, a = (_heads_first(x, heads) for x in (q, k, v, beta, a))
    tokens = _Tokens(q, k, v, beta, a, state, scale, eps)
    if cu_seqlens is None:
        o, final_state = scan(tokens)
    else:
        o, final_state = _packed(scan, tokens, ends)
    return o.swapaxes(1, 2), final_state


def _packed(scan: _Scan, tokens: _Tokens, ends: list[int]) -> tuple[Array, Array]:
    """Run the sequences that lie one behind the other in time."""
    o = np.zeros(tokens.v.shape, tokens.state.dtype)
    final_state = np.zeros_like(tokens.state)
    start = 0
    for n, end in enumerate(ends):
        q, k, v, beta, a = (x[:, :, start:end] for x in tokens[:5])
        sequence = _Tokens(q, k, v, beta, a, tokens.state[n : n + 1], tokens.scale, tokens.eps)
        o[:, :, start:end], final_state[n : n + 1] = scan(sequence)
        start = end
    return o, final_state


def _real_or_complex(x: npt.ArrayLike) -> Array:
    values: Array = np.asarray(x)
    converted: Array = values.astype(np.result_type(values, np.float64))
    return converted


def _heads_first(x: Array, heads: int) -> Array:
    """[B,T,h,...] -> [B,H,T,...], every head repeated over its group."""
    group = heads // max(x.shape[2], 1)
    repeated: Array = np.repeat(x, group, axis=2).swapaxes(1, 2)
    return repeated
