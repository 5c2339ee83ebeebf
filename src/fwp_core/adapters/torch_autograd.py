"""The scans as differentiable functions of torch tensors, for eager code and torch.func."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import UnsupportedError
from . import recurrence
from .torch_call import Call, Inputs, parameters


class Scan(torch.autograd.Function):
    """(o, final_state, checkpoints) of a call and its six inputs, of which None is absent."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return call.forward(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.call, *arrays = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*arrays, output[2])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, _: None) -> Any:
        *inputs, checkpoints = ctx.saved_tensors
        if do is None and dfinal_state is None:
            return (None,) * (1 + len(inputs))
        gradients = iter(ScanGradients.apply(ctx.call, do, dfinal_state, checkpoints, *inputs))
        return None, *(None if x is None else next(gradients) for x in inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *inputs: Tensor | None) -> Any:
        fold = _Fold(call, info.batch_size, inputs[2], in_dims[3])
        o, final_state, checkpoints = Scan.apply(fold.call, *fold.inputs(inputs, in_dims[1:]))
        # Checkpoints of all together are of no use to one: backward makes its own.
        return (fold.open(o), fold.open_state(final_state), checkpoints.new_empty(0)), (0, 0, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()


class ScanGradients(torch.autograd.Function):
    """The gradients of those inputs that are there; differentiable, through the recurrence token by token."""

    @staticmethod
    def forward(
        call: Call,
        do: Tensor | None,
        dfinal_state: Tensor | None,
        checkpoints: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return call.backward(do, dfinal_state, checkpoints, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, do, dfinal_state, _, *arrays = inputs
        ctx.save_for_backward(do, dfinal_state, *arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        arrays = ctx.saved_tensors
        present = [x for x in arrays if x is not None]

        def gradients(*given: Tensor) -> Any:
            values = iter(given)
            return _recurrence_gradients(ctx.call, *(None if x is None else next(values) for x in arrays))

        with torch.autocast(present[0].device.type, enabled=False):
            _, pullback = torch.func.vjp(gradients, *present)
            results = iter(pullback(cotangents))
        ddo, ddfinal_state, *dinputs = (None if x is None else next(results) for x in arrays)
        return None, ddo, ddfinal_state, None, *dinputs

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, call: Call, do: Any, dfinal_state: Any, checkpoints: Any, *inputs: Tensor | None
    ) -> Any:
        fold = _Fold(call, info.batch_size, inputs[2], in_dims[6])
        folded = fold.inputs(inputs, in_dims[4:])
        do, dfinal_state = fold.close(do, in_dims[1]), fold.close_state(dfinal_state, in_dims[2])
        gradients = ScanGradients.apply(fold.call, do, dfinal_state, None, *folded)
        has_state = inputs[-1] is not None
        opened = [fold.open(x) for x in (gradients[:-1] if has_state else gradients)]
        opened += [fold.open_state(gradients[-1])] if has_state else []
        return tuple(opened), (0,) * len(opened)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()


def refuse_forward_mode() -> None:
    raise UnsupportedError(
        "q: expected no forward-mode tangents (torch.func.jvp, jacfwd, dual numbers), got some; gradients are "
        "those of reverse mode (backward, torch.func.grad, vjp, jacrev)"
    )


class _Fold:
    """The batch axis of torch.func.vmap as part of B or, where B must be 1, of T."""

    def __init__(self, call: Call, size: int, v: Tensor | None, dim: int | None) -> None:
        assert v is not None
        shape = list(v.shape)
        if dim is not None:
            del shape[dim]
        self.size, self.packed = size, call.cu_seqlens is not None
        self.call = call.repeated(size, shape[1])

    def inputs(self, inputs: Inputs, dims: Any) -> Inputs:
        rows = (self.close(x, dim) for x, dim in zip(inputs[:-1], dims, strict=False))
        return *rows, self.close_state(inputs[-1], dims[-1])

    def close(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """[n,B,T,...] to [nB,T,...], or to [1,nT,...]."""
        x = self._batch_first(x, dim)
        if x is None or not self.packed:
            return None if x is None else x.flatten(0, 1)
        return x.flatten(0, 2)[None]

    def close_state(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        x = self._batch_first(x, dim)
        return None if x is None else x.flatten(0, 1)

    def open(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.open_state(x)
        return x.reshape(self.size, 1, x.shape[1] // self.size, *x.shape[2:])

    def open_state(self, x: Tensor) -> Tensor:
        return x.reshape(self.size, x.shape[0] // self.size, *x.shape[1:])

    def _batch_first(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)


def _recurrence_gradients(
    call: Call, do: Tensor | None, dfinal_state: Tensor | None, *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """What ``call.backward`` returns, by operations of torch."""

    def scan(*given: Tensor) -> tuple[Tensor, Tensor]:
        values = iter(given)
        return _recurrence(call, *(None if x is None else next(values) for x in inputs))

    (o, final_state), pullback = torch.func.vjp(scan, *(x for x in inputs if x is not None))
    do = torch.zeros_like(o) if do is None else do
    dfinal_state = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state
    gradients: tuple[Tensor, ...] = pullback((do, dfinal_state))
    return gradients


def _recurrence(call: Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    v = inputs[2]
    assert v is not None
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    arrays = (None if x is None else x.to(wide) for x in inputs)
    rule = recurrence.Rule(
        call.rule == "delta_rule",
        parameters(call.feature_map),
        call.qk_norm,
        call.attention_norm,
        call.eps,
        call.scale,
    )
    o, final_state = recurrence.scan(torch, rule, *arrays, call.cu_seqlens)
    return o.to(v.dtype), final_state
