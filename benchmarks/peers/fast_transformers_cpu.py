"""idiap/fast-transformers: causal_product, linear attention in C++ with OpenMP, forward and backward."""

from __future__ import annotations

import torch
from fast_transformers.causal_product.causal_product_cpu import causal_dot_backward, causal_dot_product
from registry import Array, Case, inputs

from . import Prepared, Unsupported, torch_arrays

PACKAGES = ("pytorch-fast-transformers", "torch")
start = torch_arrays.start


def prepare(case: Case) -> Prepared:
    """Its C++ functions, with outputs given; they know no scale, so q is scaled before and dq after."""
    if case.rule != "linear" or case.decay != "none":
        raise Unsupported("it has the additive rule without decay only")
    if case.task == "step":
        raise Unsupported("its step always takes a feature map and a normaliser")
    x = inputs(case)
    q, k, v = (_compact(array) for array in (x.q, x.k, x.v))
    q *= case.scale
    o = torch.full_like(v, torch.nan)
    if case.task == "forward":
        return Prepared(lambda: causal_dot_product(q, k, v, o), lambda: {"o": _array(o)})

    do, gradients = _compact(x.do), [torch.full_like(t, torch.nan) for t in (q, k, v)]

    def call() -> None:
        causal_dot_product(q, k, v, o)
        causal_dot_backward(q, k, v, do, *gradients)

    def results() -> dict[str, Array]:
        dq, dk, dv = gradients
        return {"o": _array(o), "dq": _array(dq * case.scale), "dk": _array(dk), "dv": _array(dv)}

    return Prepared(call, results)


def _compact(x: Array) -> torch.Tensor:
    return torch.tensor(x).transpose(1, 2).contiguous()


def _array(t: torch.Tensor) -> Array:
    x: Array = t.transpose(1, 2).numpy()
    return x
