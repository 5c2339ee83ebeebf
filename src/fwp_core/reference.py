"""The scans in plain float64 NumPy: their specification, and a text to learn from.

Each scan is written twice. ``form="recurrence"`` walks over the tokens with a fast weight ``S`` [K,V]. It
costs O(T K V) and is what the library computes. ``form="attention"`` never builds the state: it compares each
query with all earlier keys, as attention does, in O(T^2). Both give the same numbers on finite data; that is
the point of Schlag, Irie, Schmidhuber 2021, "Linear Transformers Are Secretly Fast Weight Programmers".

    S'  = diag(a_t) S_{t-1}            a_t = 1, or exp(g_t) with g_t one number or K numbers      decay
    u_t = beta_t v_t                                                                              linear
    u_t = beta_t (v_t - S'^T k_t)                                                                 delta
    S_t = S' + k_t u_t^T                                                                          write
    o_t = scale * S_t^T q_t                                                                       read

Shapes are the library's: q [B,T,Hq,K], k [B,T,Hk,K], v [B,T,Hv,V], beta [B,T,H], g [B,T,H] or [B,T,H,K],
states [N,H,K,V]; H = max(Hq,Hk,Hv), and head h reads q head h // (H/Hq). Everything is converted to float64;
complex input stays complex, so that the scans can be differentiated by complex steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["delta_rule", "linear_attention", "softmax_attention"]

Array = npt.NDArray[Any]
Form = Literal["recurrence", "attention"]


class _Tokens(NamedTuple):
    """A batch of sequences, heads before time; n is 1 (a scalar decay, or none) or K (one per channel)."""

    q: Array  # [B,H,T,K]
    k: Array  # [B,H,T,K]
    v: Array  # [B,H,T,V]
    beta: Array  # [B,H,T]
    a: Array  # [B,H,T,n], the decay exp(g)
    state: Array  # [B,H,K,V], before the first token
    scale: float


_Scan = Callable[[_Tokens], tuple[Array, Array]]


def linear_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    beta: npt.ArrayLike | None = None,
    g: npt.ArrayLike | None = None,
    *,
    scale: float = 1.0,
    initial_state: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    form: Form = "recurrence",
) -> tuple[Array, Array]:
    """Linear attention: every token adds ``beta_t k_t v_t^T`` to the fast weight.

    As attention, with ``decay[t,s] = a_{s+1} ... a_t`` for s <= t and 0 for s > t::

        o = scale * ((Q K^T * decay) diag(beta) V + (decay from the start) Q S_0)

    Parameters
    ----------
    q, k, v, beta, g, scale, initial_state, cu_seqlens
        As in :func:`fwp_core.linear_attention`.
    form : {"recurrence", "attention"}
        The loop over tokens, or the masked O(T^2) form. With a decay per channel the latter takes O(T^2 K)
        memory.

    Returns
    -------
    o : ndarray [B,T,H,V]
    final_state : ndarray [N,H,K,V]
    """
    scan = _choose(form, _linear_recurrence, _linear_attention)
    return _run(scan, q, k, v, beta, g, scale, initial_state, cu_seqlens)


def delta_rule(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    beta: npt.ArrayLike,
    g: npt.ArrayLike | None = None,
    *,
    scale: float = 1.0,
    initial_state: npt.ArrayLike | None = None,
    cu_seqlens: npt.ArrayLike | None = None,
    form: Form = "recurrence",
) -> tuple[Array, Array]:
    """The delta rule: a token moves the value stored under its key towards ``v_t`` by the part ``beta_t``.

    What a token writes, ``u_t``, depends on what the earlier ones wrote, so that the attention form solves a
    unit lower triangular system for all of them at once::

        (I + diag(beta) strictly_lower(K K^T * decay)) U = diag(beta) (V - (decay before the read) K S_0)
        o = scale * ((Q K^T * decay) U + (decay from the start) Q S_0)

    Parameters
    ----------
    q, k, v, beta, g, scale, initial_state, cu_seqlens
        As in :func:`fwp_core.delta_rule`.
    form : {"recurrence", "attention"}
        The loop over tokens, or the masked O(T^2) form (O(T^3) for the system). With a decay per channel the
        latter takes O(T^2 K) memory.

    Returns
    -------
    o : ndarray [B,T,H,V]
    final_state : ndarray [N,H,K,V]

    Raises
    ------
    TypeError
        If beta is None.
    """
    if beta is None:
        raise TypeError("beta: the delta rule needs a write strength, got None")
    scan = _choose(form, _delta_recurrence, _delta_attention)
    return _run(scan, q, k, v, beta, g, scale, initial_state, cu_seqlens)


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
    return _recurrence(tokens, lambda v, beta, stored: beta * v)


def _delta_recurrence(tokens: _Tokens) -> tuple[Array, Array]:
    return _recurrence(tokens, lambda v, beta, stored: beta * (v - stored))


def _recurrence(tokens: _Tokens, write: Callable[[Array, Array, Array], Array]) -> tuple[Array, Array]:
    q, k, v, beta, a, state, scale = tokens
    o = np.zeros(v.shape, state.dtype)
    for t in range(v.shape[2]):
        gate = a[:, :, t, :, None]
        state = np.where(gate == 0, 0, gate * state)  # a reset clears the state, even of NaN
        stored = _read(state, k[:, :, t])
        u = write(v[:, :, t], beta[:, :, t, None], stored)
        state = state + k[:, :, t, :, None] * u[:, :, None, :]
        o[:, :, t] = scale * _read(state, q[:, :, t])
    return o, state


def _read(state: Array, key: Array) -> Array:
    """``S^T k`` for each head: [B,H,K,V], [B,H,K] -> [B,H,V]."""
    stored: Array = (key[:, :, None, :] @ state)[:, :, 0]
    return stored


# The attention form: position 0 is the initial state, position t the state after token t.


def _linear_attention(tokens: _Tokens) -> tuple[Array, Array]:
    return _attend(tokens, _decay(tokens.a), tokens.beta[..., None] * tokens.v)


def _delta_attention(tokens: _Tokens) -> tuple[Array, Array]:
    _, k, v, beta, a, state, _ = tokens
    decay = _decay(a)
    stored_before = (decay[:, :, 1:, 0] * k) @ state
    interaction = np.tril(_scores(k, k, decay[:, :, 1:, 1:]), -1)
    system = np.eye(v.shape[2]) + beta[..., None] * interaction
    u = np.linalg.solve(system, beta[..., None] * (v - stored_before))
    return _attend(tokens, decay, u)


def _attend(tokens: _Tokens, decay: Array, u: Array) -> tuple[Array, Array]:
    """Read the writes ``u`` [B,H,T,V] and the initial state at every token, and gather the final state."""
    q, k, _, _, _, state, scale = tokens
    scores = _scores(q, k, decay[:, :, 1:, 1:])
    o = scale * (scores @ u + (decay[:, :, 1:, 0] * q) @ state)
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


# Arguments: defaults, grouped heads, packed sequences.


def _choose(form: str, recurrence: _Scan, attention: _Scan) -> _Scan:
    forms = {"recurrence": recurrence, "attention": attention}
    if form not in forms:
        raise ValueError(f"form: expected 'recurrence' or 'attention', got {form!r}")
    return forms[form]


def _run(
    scan: _Scan,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    beta: npt.ArrayLike | None,
    g: npt.ArrayLike | None,
    scale: float,
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
    dims = (sequences, heads, k.shape[-1], v.shape[-1])
    state = np.zeros(dims) if initial_state is None else _real_or_complex(initial_state)
    state = state.astype(np.result_type(q, k, v, beta, a, state))

    q, k, v, beta, a = (_heads_first(x, heads) for x in (q, k, v, beta, a))
    tokens = _Tokens(q, k, v, beta, a, state, scale)
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
        sequence = _Tokens(q, k, v, beta, a, tokens.state[n : n + 1], tokens.scale)
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
