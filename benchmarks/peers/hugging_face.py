"""transformers: the gated delta rule of Qwen3-Next in torch, what a CPU user of these models runs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from registry import Case
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from . import Prepared, Unsupported, torch_arrays

PACKAGES = ("transformers", "torch")
start = torch_arrays.start

# Beneath the decorators that look for Triton kernels.
_chunk: Any = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)
_recurrent: Any = inspect.unwrap(qwen.torch_recurrent_gated_delta_rule)


def prepare(case: Case) -> Prepared:
    """The chunk function for sequences, the recurrent one for a step; without decay g is 0, given."""
    if case.rule != "delta" or case.decay == "channel":
        raise Unsupported("it has the delta rule with a scalar decay only")
    ungated = torch.zeros(case.B, case.T, case.H) if case.decay == "none" else None

    def function(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: Any = ungated,
        state: Any = None,
    ) -> Any:
        scan = _recurrent if case.task == "step" else _chunk
        return scan(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)

    return torch_arrays.prepare(case, function)
