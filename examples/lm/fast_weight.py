"""A scan of fwp_core as a differentiable operation on torch tensors in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import fwp_core as fwp


def fast_weight(
    scan: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``scan(q, k, v, beta, g, initial_state=..., **options)`` on tensors, with gradients for all six.

    ``scan`` is ``fwp.delta_rule`` or ``fwp.linear_attention``; shapes, dtypes and errors are its own. Tensors
    are read where they lie. Gradients are exact; second derivatives are an error.
    """
    o, final_state = FastWeight.apply(scan, options, q, k, v, beta, g, initial_state)
    return o, final_state


class FastWeight(torch.autograd.Function):
    """The scan as ``fwp.vjp`` runs it, and its pullback."""

    @staticmethod
    def forward(ctx: Any, scan: Callable[..., Any], options: dict[str, Any], *inputs: Tensor | None) -> Any:
        *arrays, initial_state = (None if x is None else x.detach().numpy() for x in inputs)
        results, ctx.pullback = fwp.vjp(scan, *arrays, initial_state=initial_state, **options)
        ctx.save_for_backward(*inputs)
        return tuple(map(torch.from_numpy, results))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal_state: Tensor) -> Any:
        _ = ctx.saved_tensors  # raises if an input was changed in place: the pullback reads them again
        gradients = ctx.pullback(do.numpy(), dfinal_state.numpy())
        return None, None, *(None if x is None else torch.from_numpy(x) for x in gradients)
