"""The scans as operators of torch, which torch.compile and torch.export put into their graphs as they are.

Operators take tensors, numbers and strings only: a feature map goes in as its parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..feature_maps import Parameters
from .torch_call import Call

_OPTIONS = (
    "Tensor? cu_seqlens, str rule, int map_kind, int map_nu, float map_eps, Tensor? projection, "
    "str? qk_norm, bool attention_norm, float eps, float scale"
)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g, Tensor? initial_state"


def _call(
    cu_seqlens: Tensor | None,
    rule: str,
    map_kind: int,
    map_nu: int,
    map_eps: float,
    projection: Tensor | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
) -> Call:
    feature_map = _core.FeatureMap(map_kind, map_nu, map_eps, projection) if map_kind else None
    lengths = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    return Call(rule, feature_map, qk_norm, attention_norm, eps, scale, lengths)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = arguments[:6], arguments[6:]
    o, final_state, _ = _call(*options).forward(inputs)
    return o, final_state


def _backward(do: Tensor | None, dfinal_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    inputs, options = arguments[:6], arguments[6:]
    return list(_call(*options).backward(do, dfinal_state, None, inputs))


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    (q, k, v), cu_seqlens = arguments[:3], arguments[6]
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    K = Parameters(*arguments[8:12]).dim(q.shape[3])
    columns = v.shape[3] + arguments[13]
    state_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    o = v.new_empty((v.shape[0], v.shape[1], heads, v.shape[3]))
    return o, v.new_empty((sequences, heads, K, columns), dtype=state_dtype)


def _backward_shapes(do: Tensor | None, dfinal_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments[:6] if x is not None]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    cu_seqlens, projection = inputs[6], inputs[11]
    ctx.save_for_backward(*inputs[:6], cu_seqlens, projection)
    ctx.options = inputs[7:11], inputs[12:]


def _gradients(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    *inputs, cu_seqlens, projection = ctx.saved_tensors
    before, after = ctx.options
    if do is None and dfinal_state is None:
        return (None,) * 16
    gradients = iter(scan_backward(do, dfinal_state, *inputs, cu_seqlens, *before, projection, *after))
    return *(None if x is None else next(gradients) for x in inputs), *(None,) * 10


scan = torch.library.custom_op(
    "fwp_core::scan", _forward, mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
scan_backward = torch.library.custom_op(
    "fwp_core::scan_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? do, Tensor? dfinal_state, {_INPUTS}, {_OPTIONS}) -> Tensor[]",
)
scan.register_fake(_forward_shapes)
scan_backward.register_fake(_backward_shapes)
scan.register_autograd(_gradients, setup_context=_save)
