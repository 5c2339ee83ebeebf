"""An independent oracle: the recurrence token by token, and its gradients derived by hand, in float64 NumPy.

It imports nothing of the library, keeps every state, and spends no thought on speed. All operations are
analytic (no abs, no conjugate; branches look at real parts): complex input gives complex output, and every
gradient here can be checked by complex steps. The rules are eqs. 10-11 and 20-25 of Schlag, Irie, Schmidhuber
2021; the state is [K,V]. Feature maps and norms of queries and keys are in oracle_features.py.

Reverse time at token t, with D the gradient with respect to S_t:

    dq   = S dr                          D += q dr^T                           read, r = S^T q, o = scale r
    dw   = D^T k                         dk = D w                              write, w = u
    dbeta = dw.v,  dv = beta dw                                                linear
    dbeta = dw.e,  dv = beta dw,  dk += S' dp,  D += k dp^T                    delta, e = v - p, p = S'^T k
    dg   = <D, S'>  (over K and V, or over V for each channel)   D = a D       decay

where dr = scale do and dp = -dv. Under attention_norm (eqs. 26-28) z is one more column of the state. A write
is w = [u, 1] and dw loses its last entry. A read has V + 1 sums, n and c, of which n / (c + eps) is used, 0
where c = 0:

    y = n / (c + eps),  dn = dy / (c + eps),  dc = -(dy.y) / (c + eps)

A gate of -inf is a reset: the state is 0 whatever it was, and nothing flows back through it.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from oracle_features import features

RULES = ("linear", "delta")


class Gradients(NamedTuple):
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbeta: np.ndarray | None
    dg: np.ndarray | None
    dinitial_state: np.ndarray | None


class Options(NamedTuple):
    """What holds for every token; eps is None without attention_norm."""

    rule: str
    scale: float
    eps: float | None


def forward(
    rule,
    q,
    k,
    v,
    beta=None,
    g=None,
    *,
    feature_map=None,
    qk_norm=None,
    attention_norm=False,
    eps=1e-6,
    scale=1.0,
    initial_state=None,
    cu_seqlens=None,
):
    """Return (o [B,T,H,V], final_state [N,H,K,V], or [N,H,K,V+1] with attention_norm)."""
    options = Options(rule, scale, eps if attention_norm else None)
    phi = features(feature_map, qk_norm)
    with np.errstate(all="ignore"):
        arguments = (phi.value(q), phi.value(k), v, beta, g, initial_state)
        q, k, v, beta, gate, state = _full_heads(*arguments, cu_seqlens, attention_norm)
        o = np.zeros(v.shape, state.dtype)
        for n, (b, start, end) in enumerate(_sequences(v.shape, cu_seqlens)):
            for t in range(start, end):
                token = _token(options, state[n], q[b, t], k[b, t], v[b, t], beta[b, t], gate[b, t])
                state[n], o[b, t] = token.state, token.o
    return o, state


def backward(
    rule,
    do,
    q,
    k,
    v,
    beta=None,
    g=None,
    *,
    dfinal_state=None,
    feature_map=None,
    qk_norm=None,
    attention_norm=False,
    eps=1e-6,
    scale=1.0,
    initial_state=None,
    cu_seqlens=None,
):
    """Return the gradients of sum(o * do) + sum(final_state * dfinal_state)."""
    options = Options(rule, scale, eps if attention_norm else None)
    phi = features(feature_map, qk_norm)
    inputs = (q, k, v, beta, g, initial_state)
    with np.errstate(all="ignore"):
        arguments = (phi.value(q), phi.value(k), v, beta, g, initial_state)
        q, k, v, beta, gate, state = _full_heads(*arguments, cu_seqlens, attention_norm)
        adjoint = np.zeros_like(state) if dfinal_state is None else np.array(dfinal_state, state.dtype)
        dq, dk, dv, dbeta, dgate = (np.zeros(x.shape, state.dtype) for x in (q, k, v, beta, gate))
        for n, (b, start, end) in enumerate(_sequences(v.shape, cu_seqlens)):
            tokens = []
            for t in range(start, end):
                token = _token(options, state[n], q[b, t], k[b, t], v[b, t], beta[b, t], gate[b, t])
                state[n] = token.state
                tokens.append(token)
            for t in reversed(range(start, end)):
                adjoint[n], dq[b, t], dk[b, t], dv[b, t], dbeta[b, t], dgate[b, t] = _token_backward(
                    options, adjoint[n], do[b, t], tokens.pop(), q[b, t], k[b, t], beta[b, t], gate[b, t]
                )
        q, k, v, beta, g, initial_state = inputs
        return Gradients(
            phi.vjp(_sum_groups(dq, q.shape[2]), q),
            phi.vjp(_sum_groups(dk, k.shape[2]), k),
            _sum_groups(dv, v.shape[2]),
            None if beta is None else dbeta,
            None if g is None else dgate[..., 0] if np.ndim(g) == 3 else dgate,
            None if initial_state is None else adjoint,
        )


class _Token(NamedTuple):
    """What one step of all heads computes; V is V + 1 with attention_norm, but not in o and e."""

    decayed: np.ndarray  # S' [H,K,V]
    predicted: np.ndarray  # p = S'^T k [H,V]
    e: np.ndarray  # [H,V]
    written: np.ndarray  # w [H,V]
    state: np.ndarray  # S [H,K,V]
    read: np.ndarray  # r = S^T q [H,V]
    o: np.ndarray  # [H,V]


def _token(options, state, q, k, v, beta, gate):
    """One step of all heads: q, k [H,K], v [H,V], beta [H], gate [H,1] or [H,K], state [H,K,V]."""
    decayed = _decayed(state, gate)
    predicted = np.einsum("hkv,hk->hv", decayed, k)
    e = v - _normalised(predicted, options.eps) if options.rule == "delta" else v
    written = beta[:, None] * e
    if options.eps is not None:
        written = np.concatenate([written, np.ones_like(written, shape=(len(v), 1))], axis=1)
    state = decayed + k[:, :, None] * written[:, None, :]
    read = np.einsum("hkv,hk->hv", state, q)
    return _Token(decayed, predicted, e, written, state, read, options.scale * _normalised(read, options.eps))


def _token_backward(options, adjoint, do, token, q, k, beta, gate):
    dread = _normalised_vjp(options.scale * do, token.read, options.eps)
    dq = np.einsum("hkv,hv->hk", token.state, dread)
    adjoint = adjoint + q[:, :, None] * dread[:, None, :]
    du = np.einsum("hkv,hk->hv", adjoint, k)[:, : do.shape[1]]
    dk = np.einsum("hkv,hv->hk", adjoint, token.written)
    dbeta = np.einsum("hv,hv->h", du, token.e)
    dv = beta[:, None] * du
    if options.rule == "delta":
        dpredicted = _normalised_vjp(-dv, token.predicted, options.eps)
        dk = dk + np.einsum("hkv,hv->hk", token.decayed, dpredicted)
        adjoint = adjoint + k[:, :, None] * dpredicted[:, None, :]
    dgate = np.einsum("hkv,hkv->hk", adjoint, token.decayed)
    if gate.shape[1] == 1:
        dgate = dgate.sum(axis=1, keepdims=True)
    dgate = np.where(gate == -np.inf, 0, dgate)
    return _decayed(adjoint, gate), dq, dk, dv, dbeta, dgate


def _normalised(sums, eps):
    """n / (c + eps) of sums [n, c], 0 where c = 0; the sums themselves without attention_norm."""
    if eps is None:
        return sums
    n, c = sums[:, :-1], sums[:, -1:]
    return np.where(c.real == 0, 0, n / (c + eps))


def _normalised_vjp(dy, sums, eps):
    if eps is None:
        return dy
    c = sums[:, -1:]
    dn = np.where(c.real == 0, 0, dy / (c + eps))
    dc = -np.sum(dn * _normalised(sums, eps), axis=1, keepdims=True)
    return np.concatenate([dn, dc], axis=1)


def _decayed(state, gate):
    """exp(gate) times the state, as a select where the gate is -inf."""
    reset = gate == -np.inf
    factor = np.exp(np.where(reset, 0, gate))
    return np.where(reset[:, :, None], 0, factor[:, :, None] * state)


def _full_heads(q, k, v, beta, g, initial_state, cu_seqlens, attention_norm):
    """All arguments present, in one dtype, with one head axis of size H; gates [B,T,H,1] or [B,T,H,K]."""
    heads = max(x.shape[2] for x in (q, k, v))
    rows = (*v.shape[:2], heads)
    beta = np.ones(rows) if beta is None else beta
    gate = np.zeros((*rows, 1)) if g is None else g[..., None] if np.ndim(g) == 3 else g
    n = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (n, heads, k.shape[3], v.shape[3] + bool(attention_norm))
    state = np.zeros(shape) if initial_state is None else initial_state
    dtype = np.result_type(np.float64, q, k, v, beta, gate, state)
    q, k, v = (np.repeat(x, heads // max(x.shape[2], 1), axis=2) for x in (q, k, v))
    return tuple(np.array(x, dtype) for x in (q, k, v, beta, gate, state))


def _sum_groups(x, heads):
    """The gradient of a head read by several: [B,T,H,K] -> [B,T,heads,K]."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3]).sum(axis=3)


def _sequences(shape, cu_seqlens):
    """(batch, start, end) of every sequence."""
    if cu_seqlens is None:
        return [(b, 0, shape[1]) for b in range(shape[0])]
    return [(0, int(start), int(end)) for start, end in pairwise(cu_seqlens)]
