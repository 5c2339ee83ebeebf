"""Scans and steps as operators of torch, which torch.compile and torch.export put into their graphs.

Operators take tensors, numbers and strings only: a feature map goes in as its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _core
from ..feature_maps import Parameters
from .torch_autograd import Fold, refuse_batched, refuse_forward_mode
from .torch_call import KERNELS, STEPS, Call, Inputs, no_gradient, repeated, wide

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? g"
_OPTIONS = (
    "str rule, int map_kind, int map_nu, float map_eps, Tensor? projection, "
    "str? qk_norm, bool attention_norm, float eps, float scale"
)
_SCAN = f"{_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, {_OPTIONS}"


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, call = _parse(arguments)
    o, final_state, _ = call.forward(inputs)
    return o, final_state


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    _refuse_tangents()
    _check_shapes(*arguments)
    (q, k, v), cu_seqlens, options = arguments[:3], arguments[6], arguments[7:]
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    state = (sequences, heads, Parameters(*options[1:5]).dim(q.shape[3]), v.shape[3] + options[6])
    return v.new_empty((*v.shape[:2], heads, v.shape[3])), v.new_empty(state, dtype=wide(v))


def _check_shapes(*arguments: Any) -> None:
    """Make the checks of a call without its values, where sizes are known."""
    if _known(*arguments):
        arrays, options, last = _described(arguments)
        KERNELS[arguments[7]][0](*arrays, *options, *last, None, None, False)


def _check_backward_shapes(do: Tensor | None, dfinal_state: Tensor | None, *arguments: Any) -> None:
    if _known(do, dfinal_state, *arguments):
        arrays, options, last = _described(arguments)
        do = no_gradient(arguments[:6]) if do is None else do
        incoming = _abstract(do), *arrays, _abstract(dfinal_state), None
        KERNELS[arguments[7]][1](*incoming, *options, *last, None)


def _described(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays of a scan without memory; its options; its initial state, and offsets that are good."""
    *arrays, initial_state = map(_abstract, arguments[:6])
    cu_seqlens, (_, kind, nu, map_eps, projection, *options) = arguments[6], arguments[7:]
    offsets = None
    if cu_seqlens is not None:
        offsets = [0, *[arguments[0].shape[1]] * cu_seqlens.shape[0]][: cu_seqlens.shape[0]]
    feature_map = _feature_map(kind, nu, map_eps, _abstract(projection))
    return arrays, (feature_map, *options), (initial_state, offsets)


def _known(*arguments: Any) -> bool:
    """Whether all sizes are, and nobody compiles, who would wrap an error: compiled programs check again."""
    sizes = (size for x in arguments if isinstance(x, Tensor) for size in x.shape)
    return torch._guards.TracingContext.try_get() is None and all(type(size) is int for size in sizes)


def _abstract(x: Tensor | None) -> _core.AbstractArray | None:
    return x if x is None else _core.AbstractArray(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def _backward(do: Tensor | None, dfinal_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    inputs, call = _parse(arguments)
    gradients = call.backward(no_gradient(inputs) if do is None else do, dfinal_state, None, inputs)
    return [x for x in gradients if x is not None]


def _backward_shapes(do: Tensor | None, dfinal_state: Tensor | None, *arguments: Any) -> list[Tensor]:
    _refuse_tangents()
    _check_backward_shapes(do, dfinal_state, *arguments)
    return [x.new_empty(x.shape) for x in arguments[:6] if x is not None]


def _step(*arguments: Any) -> Tensor:
    _refuse_tangents()
    inputs, state, indices, (rule, *parameters) = arguments[:5], *arguments[5:7], arguments[7:]
    feature_map = _feature_map(*parameters[:4])
    o: Tensor = STEPS[rule](*inputs, state, indices, feature_map, *parameters[4:], None)
    return o


def _step_shapes(*arguments: Any) -> Tensor:
    inputs, indices = arguments[:6], arguments[6]
    rule, kind, nu, map_eps, projection, *options = arguments[7:]
    if _known(*arguments):
        slots = None if indices is None else [-1] * indices.shape[0]  # which are good in any pool
        feature_map = _feature_map(kind, nu, map_eps, _abstract(projection))
        STEPS[rule](*map(_abstract, inputs), slots, feature_map, *options, None)
    q, k, v = inputs[:3]
    heads = max(q.shape[-2], k.shape[-2], v.shape[-2])
    o: Tensor = v.new_empty((*v.shape[:-2], heads, v.shape[-1]))
    return o


def _parse(arguments: tuple[Any, ...]) -> tuple[Inputs, Call]:
    _refuse_tangents()
    inputs, cu_seqlens, (rule, *parameters) = arguments[:6], arguments[6], arguments[7:]
    return inputs, Call(*(rule, _feature_map(*parameters[:4]), *parameters[4:], cu_seqlens))


def _feature_map(kind: int, nu: int, eps: float, projection: Any) -> _core.FeatureMap | None:
    return _core.FeatureMap(kind, nu, eps, projection) if kind else None


def _refuse_tangents() -> None:
    # Torch takes the tangents off before an operator is called and gives its results none, which means zero.
    if forward_ad._current_level >= 0:
        refuse_forward_mode()


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], inputs[11])
    ctx.options = inputs[7:11], inputs[12:]


def _gradients(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    *inputs, cu_seqlens, projection = ctx.saved_tensors
    before, after = ctx.options
    options = (cu_seqlens, *before, projection, *after)
    if do is None and dfinal_state is None:
        return (None,) * (len(inputs) + len(options))
    gradients = iter(scan_backward(do, dfinal_state, *inputs, *options))
    return *(None if x is None else next(gradients) for x in inputs), *(None for _ in options)


def _forward_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    refuse_batched("cu_seqlens", in_dims[6] is not None)
    fold = Fold(info.batch_size, arguments[6] is not None)
    folded = fold.inputs(arguments[:6], in_dims[:6])
    o, final_state = scan(*folded, _repeated(arguments[6], fold.size, folded), *arguments[7:])
    return (fold.open(o), fold.open_state(final_state)), (0, 0)


def _backward_vmap(
    info: Any, in_dims: Any, do: Tensor | None, dfinal_state: Tensor | None, *arguments: Any
) -> Any:
    fold = Fold(info.batch_size, arguments[6] is not None)
    folded = fold.inputs(arguments[:6], in_dims[2:8])
    do, dfinal_state = fold.close(do, in_dims[0]), fold.close_state(dfinal_state, in_dims[1])
    options = _repeated(arguments[6], fold.size, folded), *arguments[7:]
    gradients = list(fold.open_all(scan_backward(do, dfinal_state, *folded, *options), arguments[:6]))
    return gradients, [0] * len(gradients)


def _repeated(cu_seqlens: Tensor | None, count: int, folded: Inputs) -> Tensor | None:
    return None if cu_seqlens is None else repeated(cu_seqlens, count, folded)


scan = torch.library.custom_op(
    "fwp_core::scan", _forward, mutates_args=(), schema=f"({_SCAN}) -> (Tensor, Tensor)"
)
scan_backward = torch.library.custom_op(
    "fwp_core::scan_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? do, Tensor? dfinal_state, {_SCAN}) -> Tensor[]",
)
step = torch.library.custom_op(
    "fwp_core::step",
    _step,
    mutates_args=("state",),
    schema=f"({_INPUTS}, Tensor(a!) state, Tensor? state_indices, {_OPTIONS}) -> Tensor",
)
scan.register_fake(_forward_shapes)
scan.register_autograd(_gradients, setup_context=_save)
scan.register_vmap(_forward_vmap)
scan_backward.register_fake(_backward_shapes)
scan_backward.register_vmap(_backward_vmap)
step.register_fake(_step_shapes)
