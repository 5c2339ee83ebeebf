"""The functions of flash-linear-attention (fla 0.6) on CPU tensors: change one import.

>>> from fwp_core.compat.fla import chunk_gated_delta_rule  # doctest: +SKIP

Signatures, defaults, layouts and returns are fla's; the arithmetic is :func:`fwp_core.torch.delta_rule` and
:func:`fwp_core.torch.linear_attention`, so ``chunk_`` and ``fused_recurrent_`` functions of one name are one
computation, and all of them are differentiable. The rules that hold for every function:

- q, k are [B,T,H,K] and v is [B,T,HV,V], of one dtype, under ``torch.autocast`` too; HV is a multiple of H.
  o has their dtype, all sums and the states are float32 (float64 for float64). Gates, strengths and states
  may have another floating point dtype.
- ``scale`` is 1 / sqrt(K) unless given.
- ``initial_state`` is [N,HV,K,V], [N,HV,V,K] with ``state_v_first``; N is B, or with ``cu_seqlens`` (B = 1)
  the number of packed sequences. The final state has that shape; it is None unless ``output_final_state``.
- ``use_qk_l2norm_in_kernel`` divides rows x of q and k by sqrt(\\|x\\|^2 + 1e-6). As in fla they are rounded
  to q's dtype then, but not by ``fused_recurrent_gated_delta_rule`` and ``fused_recurrent_kda``.
- ``use_gate_in_kernel``: the log decay is -exp(A_log) softplus(g + dt_bias), or with ``lower_bound`` it is
  lower_bound sigmoid(exp(A_log) (g + dt_bias)). ``use_beta_sigmoid_in_kernel``: the strength is
  sigmoid(beta), doubled with ``allow_neg_eigval``.
- Gates of value channels (``gv``, or beta [B,T,HV,V]) make every value channel a head of its own: exact, and
  slower; together with gates of key channels in memory of B T HV K V numbers.
- What only concerns how a GPU computes has no effect: ``chunk_size``, ``chunk_indices``, ``cu_seqlens_cpu``,
  ``disable_recompute``, ``safe_gate``, ``use_graph``, ``max_num_seqs``; values that fla refuses are
  ArgumentErrors. As in fla, unknown keywords of a function that takes ``**kwargs`` have none either.
- ``cp_context`` and ``return_intermediate_states`` are UnsupportedErrors; other errors are those of
  :func:`fwp_core.delta_rule`, ValueErrors where fla has ValueErrors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core import ArgumentError, DeviceError, DTypeError, ShapeError, UnsupportedError
from ..adapters.torch import check_options, offsets
from ..adapters.torch_call import FLOATS, wide
from ..torch import delta_rule, linear_attention

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gla",
    "chunk_kda",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
]

State = Tensor | None
Result = tuple[Tensor, State]

# What fla adds to the squared length of a row, and to the sum that normalised linear attention divides by.
_NORM_EPS = 1e-6
_SUM_EPS = 1e-10
_POWERS = [2**n for n in range(32)]


# DeltaNet


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run the delta rule; beta is [B,T,HV]."""
    _refuse_head_first(kwargs)
    _check_chunk_size(kwargs, 16, 32, 64)
    heads, _, _ = _sizes(q, k, v)
    _check("beta", beta, q, heads, needed=True)
    return fused_recurrent_delta_rule(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """Run the delta rule; beta is [B,T,HV] or [B,T,HV,V], or None for 1."""
    heads, _, V = _sizes(q, k, v)
    _check("beta", beta, q, heads, (*heads, V))
    if use_qk_l2norm_in_kernel:
        q, k = _rounded_l2norm(q), _rounded_l2norm(k)
    return _run(
        "delta",
        _Inputs(q, k, v, _strength(beta, v)),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


# Gated DeltaNet


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> Result:
    """Run the gated delta rule; g and beta are [B,T,HV].

    ``use_gate_in_kernel`` and its ``A_log`` [HV], ``dt_bias`` [HV] are keywords.
    """
    state_v_first = _v_first(state_v_first, kwargs)
    _refuse(cp_context=cp_context)
    _refuse_head_first(kwargs)
    _check_chunk_size(kwargs, 16, 32, 64)
    heads, _, _ = _sizes(q, k, v)
    _check("g", g, q, heads, needed=True)
    _check("beta", beta, q, heads, needed=True)
    if use_qk_l2norm_in_kernel:
        q, k = _rounded_l2norm(q), _rounded_l2norm(k)
    return fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_gate_in_kernel=kwargs.get("use_gate_in_kernel", False),
        A_log=kwargs.get("A_log"),
        dt_bias=kwargs.get("dt_bias"),
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run the gated delta rule; all of g [B,T,HV], gk [B,T,HV,K] and gv [B,T,HV,V] that are given decay.

    beta is [B,T,HV] or [B,T,HV,V], or None for 1; A_log and dt_bias are [HV].
    """
    state_v_first = _v_first(state_v_first, kwargs)
    heads, K, V = _sizes(q, k, v)
    _check("g", g, q, heads)
    _check("gk", gk, q, (*heads, K))
    _check("gv", gv, q, (*heads, V))
    _check("beta", beta, q, heads, (*heads, V))
    if use_gate_in_kernel:
        g = _gate(g, A_log, dt_bias)
    return _run(
        "delta",
        _Inputs(q, k, v, _strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval), _sum(g, gk), gv),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        l2norm=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
    )


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


# Kimi Delta Attention


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> Result:
    """Run Kimi Delta Attention; g is [B,T,HV,K], beta [B,T,HV].

    ``A_log`` [HV] and ``dt_bias`` [HV*K] of ``use_gate_in_kernel`` are keywords.
    """
    state_v_first = _v_first(state_v_first, kwargs)
    _refuse(cp_context=cp_context, return_intermediate_states=return_intermediate_states)
    _check_chunk_size(kwargs, 32, 64)
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ArgumentError(
            f"lower_bound: expected a number in [-5, 0) with safe_gate=True, got {lower_bound}"
        )
    heads, _, _ = _sizes(q, k, v)
    _check("beta", beta, q, heads, needed=True)
    if use_qk_l2norm_in_kernel:
        q, k = _rounded_l2norm(q), _rounded_l2norm(k)
    return fused_recurrent_kda(
        q,
        k,
        v,
        g,
        beta,
        kwargs.get("A_log"),
        kwargs.get("dt_bias"),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run Kimi Delta Attention; g is [B,T,HV,K], beta [B,T,HV] or [B,T,HV,V], A_log [HV], dt_bias [HV*K]."""
    state_v_first = _v_first(state_v_first, kwargs)
    heads, K, V = _sizes(q, k, v)
    _check("g", g, q, (*heads, K), needed=True)
    _check("beta", beta, q, heads, (*heads, V), needed=True)
    if use_gate_in_kernel:
        g = _gate(g, A_log, dt_bias, lower_bound)
    return _run(
        "delta",
        _Inputs(q, k, v, _strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval), g),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        l2norm=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
    )


# Linear attention


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[State, State] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | tuple[State, Tensor]]:
    """Run linear attention; see :func:`fused_recurrent_linear_attn` about ``normalize``."""
    return fused_recurrent_linear_attn(
        q, k, v, scale, initial_state, output_final_state, normalize=normalize, cu_seqlens=cu_seqlens
    )


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[State, State] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | tuple[State, Tensor]]:
    """Run linear attention.

    ``normalize`` divides o by scale q.z + 1e-10, z the sum of the keys so far (o is 0 where q.z = 0); the
    first state may then be a pair of S and z [N,1,HV,K], and the last is one, of which z is always there.
    """
    (_, _, HV), K, V = _sizes(q, k, v)
    if not normalize:
        if isinstance(initial_state, tuple):
            raise ArgumentError("initial_state: expected a tensor with normalize=False, got a tuple")
        return _run(
            "linear",
            _Inputs(q, k, v),
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
        )
    first = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    if len(first) != 2:
        raise ArgumentError(f"initial_state: expected a tensor or two in a tuple, got {len(first)} of them")
    cu_seqlens = _integers(cu_seqlens, q)
    N = _sequences(q, cu_seqlens)
    _check("initial_state", first[0], q, (N, HV, K, V))
    _check("initial_state[1]", first[1], q, (N, 1, HV, K))
    scale = _scale(scale, K)
    if not scale > 0:
        raise ArgumentError(f"scale: expected a positive number with normalize=True, got {scale}")
    o, joined = _run(
        "linear",
        _Inputs(q, k, v),
        scale=1.0,
        initial_state=_with_key_sum(*first, k, v),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        attention_norm=True,
        eps=_SUM_EPS / scale,
    )
    assert joined is not None
    state, z = joined[..., :-1], joined[..., -1].unsqueeze(1)
    return o, (state.contiguous() if output_final_state else None, z.contiguous())


# Linear attention with decay: one gate per head, fixed ones, one per channel


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run linear attention with decay g [B,T,HV], g_gamma [HV], or the sum of both."""
    _refuse_head_first(kwargs)
    _check_chunk_size(kwargs)
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        g,
        g_gamma,
        scale,
        initial_state,
        output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run linear attention with decay g [B,T,HV], g_gamma [HV], or the sum of both."""
    state_v_first = _v_first(state_v_first, kwargs)
    heads, _, _ = _sizes(q, k, v)
    _check("g", g, q, heads)
    _check("g_gamma", g_gamma, q, heads[2:])
    if g_gamma is not None:
        g = _sum(g_gamma.expand(*q.shape[:2], -1), g)
    return _run(
        "linear",
        _Inputs(q, k, v, g=g),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        state_v_first=state_v_first,
    )


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run retention: head h decays by 1 - 2^(-5-h)."""
    _refuse_head_first(kwargs)
    _check_chunk_size(kwargs)
    return fused_recurrent_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run retention: head h decays by 1 - 2^(-5-h)."""
    state_v_first = _v_first(state_v_first, kwargs)
    (_, _, HV), _, _ = _sizes(q, k, v)
    heads = torch.arange(HV, dtype=wide(q), device=q.device)
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        None,
        torch.log1p(-(2.0 ** (-5.0 - heads))),
        scale,
        initial_state,
        output_final_state,
        reverse,
        state_v_first,
        cu_seqlens,
    )


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:
    """Run gated linear attention with decay g [B,T,HV,K]."""
    heads, K, _ = _sizes(q, k, v)
    _check("g", g, q, (*heads, K), needed=True)
    return fused_recurrent_gla(
        q,
        k,
        v,
        g,
        None,
        scale,
        initial_state,
        output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Run gated linear attention with decays gk [B,T,HV,K] of keys' and gv [B,T,HV,V] of values' channels."""
    state_v_first = _v_first(state_v_first, kwargs)
    heads, K, V = _sizes(q, k, v)
    _check("gk", gk, q, (*heads, K))
    _check("gv", gv, q, (*heads, V))
    return _run(
        "linear",
        _Inputs(q, k, v, g=gk, gv=gv),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        state_v_first=state_v_first,
    )


# What all of them are.


class _Inputs(NamedTuple):
    """What has a time axis."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None = None  # [B,T,H], or [B,T,H,V]
    g: Tensor | None = None  # [B,T,H] or [B,T,H,K]
    gv: Tensor | None = None  # [B,T,H,V]


_RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"delta": delta_rule, "linear": linear_attention}

# (inputs, initial_state, cu_seqlens) -> (o, final_state)
_Scan = Callable[[_Inputs, State, Tensor | None], tuple[Tensor, Tensor]]


def _run(
    rule: str,
    x: _Inputs,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    l2norm: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    **options: Any,
) -> Result:
    """Bring fla's arguments into the library's form, run the rule, and bring the results back."""
    dtype = x.v.dtype
    cu_seqlens = _integers(cu_seqlens, x.q)
    state = _state(x, initial_state, cu_seqlens, state_v_first, options.get("attention_norm", False))
    if l2norm:
        x = x._replace(q=_l2norm(x.q), k=_l2norm(x.k), v=x.v.to(wide(x.v)))
    options["scale"] = _scale(scale, x.k.shape[3])

    scan: _Scan = partial(_scan, rule, options)
    if x.gv is not None or (x.beta is not None and x.beta.ndim == 4):
        scan = partial(_scan_value_channels, scan)
    if reverse:
        scan = partial(_scan_reversed, scan)
    o, final_state = scan(x, state, cu_seqlens)

    o = o.to(dtype)
    if not output_final_state:
        return o, None
    return o, (final_state.transpose(-1, -2) if state_v_first else final_state).contiguous()


def _scan(
    rule: str, options: Mapping[str, Any], x: _Inputs, state: State, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    accepted = (x.q.dtype, wide(x.q))
    gates = (t if t is None or t.dtype in accepted else t.to(wide(x.q)) for t in (x.beta, x.g))
    device = x.q.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return _RULES[rule](x.q, x.k, x.v, *gates, initial_state=state, cu_seqlens=cu_seqlens, **options)


def _scan_reversed(scan: _Scan, x: _Inputs, state: State, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """From the last token to the first: time is turned around, of packed sequences their order with it."""
    x = _Inputs._make(t if t is None else t.flip(1) for t in x)
    if cu_seqlens is None:
        o, final_state = scan(x, state, None)
        return o.flip(1), final_state
    o, final_state = scan(x, state if state is None else state.flip(0), x.q.shape[1] - cu_seqlens.flip(0))
    return o.flip(1), final_state.flip(0)


def _scan_value_channels(
    scan: _Scan, x: _Inputs, state: State, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gates and strengths that differ between value channels: V heads of one channel for each head.

    Value channels never meet, and neighbouring heads share queries and keys, so this is exact.
    """
    H, V = x.v.shape[2:]

    def each(t: State) -> State:
        """[B,T,H,...] as [B,T,H*V,...], the same for every channel of a head."""
        return t if t is None else t.repeat_interleave(V, 2)

    beta = x.beta.flatten(2) if x.beta is not None and x.beta.ndim == 4 else each(x.beta)
    g = _sum(None if x.gv is None else x.gv.flatten(2), each(x.g))
    inputs = _Inputs(x.q, x.k, x.v.flatten(2).unsqueeze(3), beta, g)
    if state is not None:
        state = state.transpose(2, 3).flatten(1, 2).unsqueeze(3)
    o, final_state = scan(inputs, state, cu_seqlens)
    N, _, K, _ = final_state.shape
    return o.reshape(x.v.shape), final_state.reshape(N, H, V, K).transpose(2, 3)


def _state(x: _Inputs, state: State, cu_seqlens: Tensor | None, v_first: bool, with_sum: bool) -> State:
    """The initial state [N,H,K,V], in the dtype of sums."""
    if state is None:
        return None
    K, V = x.k.shape[3], x.v.shape[3] + with_sum
    shape = (_sequences(x.q, cu_seqlens), x.v.shape[2], *((V, K) if v_first else (K, V)))
    _check("initial_state", state, x.q, shape)
    state = state.to(wide(x.q))
    return state.transpose(-1, -2) if v_first else state


def _integers(cu_seqlens: Any, q: Tensor) -> Tensor | None:
    """A tensor, whatever the integers came as."""
    if cu_seqlens is None:
        return None
    found = offsets(cu_seqlens, q)
    return (found if isinstance(found, Tensor) else torch.tensor(found, device="cpu")).long()


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _scale(scale: Any, K: int) -> float:
    if scale is None:
        usual: float = float(K or 1) ** -0.5
        return usual
    check_options(None, None, scale)
    if isinstance(scale, str) or not hasattr(scale, "__float__"):
        raise DTypeError(f"scale: expected a number, got {type(scale).__name__}")
    return float(scale)


def _sizes(q: Any, k: Any, v: Any) -> tuple[tuple[int, int, int], int, int]:
    """(B, T, HV), K and V of inputs that fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, q)
        if x.ndim != 4:
            raise ShapeError(f"{name}: expected shape (B, T, H, size), got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise DTypeError(f"{name}: expected dtype {q.dtype}, as q has, got {x.dtype}")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if k.shape != q.shape:
        raise ShapeError(f"k: expected shape {tuple(q.shape)}, as q has, got {tuple(k.shape)}")
    if v.shape[:2] != q.shape[:2] or (HV != H and (H * HV == 0 or HV % H)):
        shape = f"({B}, {T}, HV, V), HV a multiple of H={H}"
        raise ShapeError(f"v: expected shape {shape}, got {tuple(v.shape)}")
    return (B, T, HV), K, V


def _check_tensor(name: str, x: Any, q: Tensor) -> None:
    """That x is a tensor of a dtype that is computed with, where q is."""
    if not isinstance(x, Tensor):
        raise DTypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise DTypeError(f"{name}: expected dtype float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.device != q.device:
        raise DeviceError(f"{name}: expected a tensor on {q.device}, as q is, got one on {x.device}")


def _check(name: str, x: Any, q: Tensor, *shapes: tuple[int, ...], needed: bool = False) -> None:
    """That x is a tensor of one of these shapes, where q is, or None unless it is needed."""
    if x is None and not needed:
        return
    _check_tensor(name, x, q)
    if x.shape not in shapes:
        raise ShapeError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")


def _check_elements(name: str, x: Any, q: Tensor, count: int) -> None:
    """That x is None, or a tensor of that many elements: fla reads its memory, and asks for no shape."""
    if x is None:
        return
    _check_tensor(name, x, q)
    if x.numel() != count:
        raise ShapeError(f"{name}: expected {count} elements, got shape {tuple(x.shape)}")


def _l2norm(x: Tensor) -> Tensor:
    x = x.to(wide(x))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.div(x, torch.hypot(length, torch.full_like(length, _NORM_EPS**0.5)))


def _rounded_l2norm(x: Tensor) -> Tensor:
    return _l2norm(x).to(x.dtype)


def _sum(gate: State, other: State) -> State:
    """Of gates [B,T,H] and others, which may be [B,T,H,K]; an absent one is 0."""
    if gate is None or other is None:
        return other if gate is None else gate
    gate = gate if gate.ndim == other.ndim else gate.unsqueeze(-1)
    return gate.to(wide(gate)) + other.to(wide(other))


def _gate(g: State, A_log: State, dt_bias: State, lower_bound: float | None = None) -> Tensor:
    """The log decay of a raw gate [B,T,H] or [B,T,H,K]."""
    if g is None:
        raise ArgumentError("g: expected a tensor with use_gate_in_kernel=True, got None")
    if A_log is None and lower_bound is None:
        raise ArgumentError("A_log: expected a tensor with use_gate_in_kernel=True, got None")
    _check_elements("A_log", A_log, g, g.shape[2])
    _check_elements("dt_bias", dt_bias, g, math.prod(g.shape[2:]))
    x = g.to(wide(g))
    if dt_bias is not None:
        x = x + dt_bias.to(x.dtype).reshape(g.shape[2:])
    rate = None if A_log is None else A_log.to(x.dtype).exp().reshape(-1, *[1] * (g.ndim - 3))
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(x if rate is None else rate * x)
    assert rate is not None
    return -rate * F.softplus(x)


def _strength(beta: State, v: Tensor, sigmoid: bool = False, doubled: bool = False) -> Tensor:
    if doubled and not sigmoid:
        raise ArgumentError("allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True with it, got False")
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    if not sigmoid:
        return beta
    beta = torch.sigmoid(beta.to(wide(beta)))
    return 2 * beta if doubled else beta


def _with_key_sum(state: State, z: State, k: Tensor, v: Tensor) -> State:
    """S [N,HV,K,V] and z [N,1,HV,K] as the state [N,HV,K,V+1] of normalised attention."""
    if z is None:
        return state if state is None else F.pad(state.to(wide(k)), (0, 1))
    z = z.to(wide(k)).squeeze(1).unsqueeze(3)
    if state is None:
        return F.pad(z, (v.shape[-1], 0))
    return torch.cat([state.to(z.dtype), z], -1)


# Keywords, and values that are none of fla's.


def _v_first(state_v_first: bool, keywords: Mapping[str, Any]) -> bool:
    """Whether states are [V,K], by the older name of the option as well."""
    if "transpose_state_layout" not in keywords:
        return state_v_first
    if state_v_first:
        raise ArgumentError("transpose_state_layout: expected it or state_v_first, got both")
    message = "transpose_state_layout is deprecated and renamed to state_v_first"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return bool(keywords["transpose_state_layout"])


def _refuse_head_first(keywords: Mapping[str, Any]) -> None:
    if keywords.get("head_first"):
        raise DeprecationWarning("head_first: expected [B,T,H,...] inputs without it, got True")


def _check_chunk_size(keywords: Mapping[str, Any], *sizes: int) -> None:
    """That it is one of fla's: of these, or any power of 2."""
    size = keywords.get("chunk_size")
    if size is None or size in (sizes or _POWERS):
        return
    expected = f"one of {', '.join(map(str, sizes))}" if sizes else "a power of 2"
    raise ArgumentError(f"chunk_size: expected {expected}, got {size!r}")


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value:
            raise UnsupportedError(f"{name}: expected None or False on a CPU, got {value!r}")
