"""The scans as differentiable functions of torch tensors, for eager code and torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import UnsupportedError
from . import recurrence
from .torch_call import Call, Inputs, no_gradient, parameters, wide


class Scan(torch.autograd.Function):
    """(o, final_state) of a call and its six inputs, of which None is absent."""

    # Without setup_context, for which torch binds the arguments by a signature: a fifth of a small call.
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        o, final_state, checkpoints = call.forward(inputs)
        _save(ctx, call, inputs, checkpoints)
        return o, final_state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> Any:
        return _saved_gradients(ctx, do, dfinal_state)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()


class TransformedScan(torch.autograd.Function):
    """The same for transformations of torch.func, which want checkpoints to be an output as well."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        o, final_state, checkpoints = call.forward(inputs)
        return o, final_state, final_state.new_empty(0) if checkpoints is None else checkpoints

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[2])
        _save(ctx, inputs[0], inputs[1:], output[2])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, _: None) -> Any:
        return _saved_gradients(ctx, do, dfinal_state)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *inputs: Tensor | None) -> Any:
        fold = Fold(info.batch_size, call.cu_seqlens is not None)
        folded = fold.inputs(inputs, in_dims[1:])
        o, final_state = scan(call.repeated(fold.size, folded), *folded)
        # Checkpoints of all together are of no use to one: backward makes its own.
        return (fold.open(o), fold.open_state(final_state), final_state.new_empty(0)), (0, 0, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()


class ScanGradients(torch.autograd.Function):
    """The gradients of those inputs that are there; differentiable, through the recurrence token by token."""

    @staticmethod
    def forward(
        call: Call,
        do: Tensor,
        dfinal_state: Tensor | None,
        checkpoints: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        gradients = call.backward(do, dfinal_state, checkpoints, inputs)
        return tuple(x for x in gradients if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, do, dfinal_state, _, *arrays = inputs
        ctx.save_for_backward(do, dfinal_state, *arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        arrays: tuple[Any, ...] = ctx.saved_tensors
        present = [x for x in arrays if x is not None]

        def gradients(*given: Tensor) -> Any:
            values = iter(given)
            return _recurrence_gradients(ctx.call, *(None if x is None else next(values) for x in arrays))

        with torch.autocast(present[0].device.type, enabled=False):
            pullback = torch.func.vjp(gradients, *present)[1]
            results = iter(pullback(cotangents))
        ddo, ddfinal_state, *dinputs = (None if x is None else next(results) for x in arrays)
        return None, ddo, ddfinal_state, None, *dinputs

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        call: Call,
        do: Any,
        dfinal_state: Any,
        checkpoints: Any,
        *inputs: Tensor | None,
    ) -> Any:
        fold = Fold(info.batch_size, call.cu_seqlens is not None)
        folded = fold.inputs(inputs, in_dims[4:])
        do, dfinal_state = fold.close(do, in_dims[1]), fold.close_state(dfinal_state, in_dims[2])
        call = call.repeated(fold.size, folded)
        gradients = fold.open_all(scan_gradients(call, do, dfinal_state, None, *folded), inputs)
        return gradients, (0,) * len(gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()


scan_gradients: Callable[..., Any] = ScanGradients.apply


def scan(call: Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return o and final_state, differentiable and transformable."""
    function: Any = TransformedScan if torch._C._are_functorch_transforms_active() else Scan
    o, final_state = function.apply(call, *inputs)[:2]
    return o, final_state


def refuse_forward_mode() -> None:
    raise UnsupportedError(
        "q: expected no forward-mode tangents (torch.func.jvp, jacfwd, dual numbers), got some; use reverse "
        "mode (backward, torch.func.grad, vjp, jacrev)"
    )


def refuse_batched(name: str, batched: bool) -> None:
    if batched:
        raise UnsupportedError(
            f"{name}: expected a tensor without a batch axis of torch's, got one with it (torch.func.vmap, "
            "is_grads_batched, vectorize), which is not supported here"
        )


class Fold:
    """The batch axis of torch.func.vmap, of a size, as part of B or, where sequences are packed, of T."""

    def __init__(self, size: int, packed: bool) -> None:
        if size == 0:
            raise UnsupportedError("q: expected an axis of torch.func.vmap of size 1 or more, got 0")
        self.size, self.packed = size, packed

    def inputs(self, inputs: Inputs, dims: Any) -> Inputs:
        rows = (self.close(x, dim) for x, dim in zip(inputs[:-1], dims, strict=False))
        return *rows, self.close_state(inputs[-1], dims[-1])

    def close(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """[n,B,T,...] to [nB,T,...], or to [1,nT,...]."""
        x = self.close_state(x, dim)
        return x.flatten(0, 1)[None] if x is not None and self.packed else x

    def close_state(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        return (x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    def open(self, x: Tensor) -> Tensor:
        x = self.open_state(x[0] if self.packed else x)
        return x[:, None] if self.packed else x

    def open_state(self, x: Tensor) -> Tensor:
        return x.reshape(self.size, x.shape[0] // self.size, *x.shape[1:])

    def open_all(self, gradients: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
        """The gradients of those inputs that are there."""
        if inputs[-1] is None:
            return tuple(map(self.open, gradients))
        return *map(self.open, gradients[:-1]), self.open_state(gradients[-1])


def _save(ctx: Any, call: Call, inputs: Inputs, checkpoints: Tensor | None) -> None:
    ctx.call = call
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, checkpoints)


def _saved_gradients(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> Any:
    """Those of a call and its inputs, from what was saved of them."""
    *inputs, checkpoints = ctx.saved_tensors
    if do is None and dfinal_state is None:
        return (None,) * (1 + len(inputs))
    for name, x in (("do", do), ("dfinal_state", dfinal_state)):
        refuse_batched(name, x is not None and torch._C._functorch.is_legacy_batchedtensor(x))
    do = no_gradient(inputs) if do is None else do
    if not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()):
        return None, *ctx.call.backward(do, dfinal_state, checkpoints, inputs)
    gradients = iter(scan_gradients(ctx.call, do, dfinal_state, checkpoints, *inputs))
    return None, *(None if x is None else next(gradients) for x in inputs)


def _recurrence_gradients(call: Call, *arrays: Any) -> tuple[Tensor, ...]:
    """What ``call.backward`` returns, of do, dfinal_state and the inputs, by operations of torch."""
    do, dfinal_state, *inputs = arrays

    def results(*given: Tensor) -> tuple[Tensor, Tensor]:
        values = iter(given)
        return _recurrence(call, *(None if x is None else next(values) for x in inputs))

    (_, final_state), pullback = torch.func.vjp(results, *(x for x in inputs if x is not None))[:2]
    dfinal_state = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state
    gradients: tuple[Tensor, ...] = pullback((do, dfinal_state))
    return gradients


def _recurrence(call: Call, *inputs: Any) -> tuple[Tensor, Tensor]:
    rule = recurrence.Rule(
        call.rule == "delta_rule",
        parameters(call.feature_map),
        call.qk_norm,
        call.attention_norm,
        call.eps,
        call.scale,
    )
    q, k, v, beta, g, initial_state = (None if x is None else x.to(wide(inputs[2])) for x in inputs)
    o, final_state = recurrence.scan(torch, rule, q, k, v, beta, g, initial_state, call.lengths())
    return o.to(inputs[2].dtype), final_state
