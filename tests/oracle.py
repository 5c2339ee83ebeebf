"""An independent oracle: the recurrence token by token, and its gradients derived by hand, in float64 NumPy.

It imports nothing of the library, keeps every state, and spends no thought on speed. All operations are
analytic (no abs, no conjugate): complex input gives complex output, and every gradient here can be checked by
complex steps. The rules are eqs. 10-11 and 20-25 of Schlag, Irie, Schmidhuber 2021; the state is [K,V].

Reverse time at token t, with D the gradient with respect to S_t:

    dq   = scale S_t do                  D += scale q do^T                     read
    du   = D^T k                         dk = D u                              write
    dbeta = du.v,  dv = beta du                                                linear
    dbeta = du.e,  dv = beta du,  dk -= S' dv,  D -= k dv^T                    delta, e = v - S'^T k
    dg   = <D, S'>  (over K and V, or over V for each channel)   D = a D       decay

A gate of -inf is a reset: the state is 0 whatever it was, and nothing flows back through it.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

RULES = ("linear", "delta")


class Gradients(NamedTuple):
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbeta: np.ndarray | None
    dg: np.ndarray | None
    dinitial_state: np.ndarray | None


def forward(rule, q, k, v, beta=None, g=None, *, scale=1.0, initial_state=None, cu_seqlens=None):
    """Return (o [B,T,H,V], final_state [N,H,K,V])."""
    q, k, v, beta, gate, state = _full_heads(q, k, v, beta, g, initial_state, cu_seqlens)
    o = np.zeros(v.shape, state.dtype)
    with np.errstate(all="ignore"):
        for n, (b, start, end) in enumerate(_sequences(v.shape, cu_seqlens)):
            for t in range(start, end):
                state[n], o[b, t], _, _, _ = _token(
                    rule, state[n], q[b, t], k[b, t], v[b, t], beta[b, t], gate[b, t], scale
                )
    return o, state


def backward(
    rule, do, q, k, v, beta=None, g=None, *, dfinal_state=None, scale=1.0, initial_state=None, cu_seqlens=None
):
    """Return the gradients of sum(o * do) + sum(final_state * dfinal_state)."""
    arguments = (q, k, v, beta, g, initial_state)
    q, k, v, beta, gate, state = _full_heads(*arguments, cu_seqlens)
    adjoint = np.zeros_like(state) if dfinal_state is None else np.array(dfinal_state, state.dtype)
    dq, dk, dv, dbeta, dgate = (np.zeros(x.shape, state.dtype) for x in (q, k, v, beta, gate))
    with np.errstate(all="ignore"):
        for n, (b, start, end) in enumerate(_sequences(v.shape, cu_seqlens)):
            kept = []
            for t in range(start, end):
                state[n], _, decayed, u, e = _token(
                    rule, state[n], q[b, t], k[b, t], v[b, t], beta[b, t], gate[b, t], scale
                )
                kept.append((state[n].copy(), decayed, u, e))
            for t in reversed(range(start, end)):
                adjoint[n], dq[b, t], dk[b, t], dv[b, t], dbeta[b, t], dgate[b, t] = _token_backward(
                    rule, adjoint[n], do[b, t], *kept.pop(), q[b, t], k[b, t], beta[b, t], gate[b, t], scale
                )
    q, k, v, beta, g, initial_state = arguments
    if g is not None and np.ndim(g) == 3:
        dgate = dgate[..., 0]
    return Gradients(
        _sum_groups(dq, q.shape[2]),
        _sum_groups(dk, k.shape[2]),
        _sum_groups(dv, v.shape[2]),
        None if beta is None else dbeta,
        None if g is None else dgate,
        None if initial_state is None else adjoint,
    )


def _token(rule, state, q, k, v, beta, gate, scale):
    """One step of all heads: q, k [H,K], v [H,V], beta [H], gate [H,1] or [H,K], state [H,K,V]."""
    decayed = _decayed(state, gate)
    e = v - np.einsum("hkv,hk->hv", decayed, k) if rule == "delta" else v
    u = beta[:, None] * e
    state = decayed + k[:, :, None] * u[:, None, :]
    return state, scale * np.einsum("hkv,hk->hv", state, q), decayed, u, e


def _token_backward(rule, adjoint, do, state, decayed, u, e, q, k, beta, gate, scale):
    dq = scale * np.einsum("hkv,hv->hk", state, do)
    adjoint = adjoint + scale * q[:, :, None] * do[:, None, :]
    du = np.einsum("hkv,hk->hv", adjoint, k)
    dk = np.einsum("hkv,hv->hk", adjoint, u)
    dbeta = np.einsum("hv,hv->h", du, e)
    dv = beta[:, None] * du
    if rule == "delta":
        dk = dk - np.einsum("hkv,hv->hk", decayed, dv)
        adjoint = adjoint - k[:, :, None] * dv[:, None, :]
    dgate = np.einsum("hkv,hkv->hk", adjoint, decayed)
    if gate.shape[1] == 1:
        dgate = dgate.sum(axis=1, keepdims=True)
    dgate = np.where(gate == -np.inf, 0, dgate)
    return _decayed(adjoint, gate), dq, dk, dv, dbeta, dgate


def _decayed(state, gate):
    """exp(gate) times the state, as a select where the gate is -inf."""
    reset = gate == -np.inf
    factor = np.exp(np.where(reset, 0, gate))
    return np.where(reset[:, :, None], 0, factor[:, :, None] * state)


def _full_heads(q, k, v, beta, g, initial_state, cu_seqlens):
    """All arguments present, in one dtype, with one head axis of size H; gates [B,T,H,1] or [B,T,H,K]."""
    heads = max(x.shape[2] for x in (q, k, v))
    rows = (*v.shape[:2], heads)
    beta = np.ones(rows) if beta is None else beta
    gate = np.zeros((*rows, 1)) if g is None else g[..., None] if np.ndim(g) == 3 else g
    n = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = np.zeros((n, heads, k.shape[3], v.shape[3])) if initial_state is None else initial_state
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
