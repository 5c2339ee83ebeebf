"""torch: SGEMM of its BLAS, and causal softmax attention by scaled_dot_product_attention."""

from __future__ import annotations

from functools import partial

import torch
from registry import Case
from torch.nn.functional import scaled_dot_product_attention

from . import Prepared, Unsupported, torch_arrays

PACKAGES = ("torch",)
start = torch_arrays.start


def prepare(case: Case) -> Prepared:
    """Heads before time, as its kernels want them."""
    if case.rule == "softmax":
        return torch_arrays.prepare(case, partial(_attention, scale=case.scale), "BHT")
    if case.rule == "sgemm":
        generator = torch.Generator().manual_seed(0)
        a, b, product = (torch.rand(case.T, case.T, generator=generator) for _ in range(3))
        return Prepared(partial(torch.mm, a, b, out=product), lambda: {"o": product.numpy()})
    raise Unsupported(f"{case.rule} is measured through NumPy")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
