"""flash-linear-attention: its references in torch, the only part of it that runs on a CPU.

The package cannot be imported without Triton, so each reference file is loaded by itself; they need torch and
einops.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from types import ModuleType
from typing import Any

from registry import Case

from . import Prepared, Unsupported, torch_arrays

PACKAGES = ("fla-core", "torch", "einops")
start = torch_arrays.start


@cache
def _naive(op: str) -> ModuleType:
    """The module fla.ops.<op>.naive, without its packages."""
    name = f"fla/ops/{op}/naive.py"
    try:
        found = [file for file in files("fla-core") or [] if file.as_posix() == name]
    except PackageNotFoundError:
        raise ImportError("No module named 'fla'") from None
    if not found:
        raise ImportError(f"fla-core has no {name}")
    spec = importlib.util.spec_from_file_location(f"fla_{op}_naive", found[0].locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_naive("delta_rule")  # an ImportError says that it is not installed


def prepare(case: Case) -> Prepared:
    """Chunk references for sequences, recurrent ones for a step."""
    name = case.rule if case.decay == "none" else f"{case.rule}-{case.decay}"
    functions = STEPS if case.task == "step" else SCANS
    if name not in functions:
        kind = "recurrent" if case.task == "step" else "chunk"
        raise Unsupported(f"it has no {kind} reference for {name}")
    layout = "BHT" if name == "delta" else "BTH"
    return torch_arrays.prepare(case, functions[name], layout)


def _linear(q: Any, k: Any, v: Any) -> Any:
    return _naive("linear_attn").naive_chunk_linear_attn(q, k, v)


def _linear_scalar(q: Any, k: Any, v: Any, g: Any) -> Any:
    return _naive("simple_gla").naive_chunk_simple_gla(q, k, v, g, output_final_state=True)


def _delta(q: Any, k: Any, v: Any, beta: Any) -> Any:
    return _naive("delta_rule").delta_rule_chunkwise(q, k, v, beta)


def _delta_scalar(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
    return _naive("gated_delta_rule").naive_chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)


def _delta_channel(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
    return _naive("kda").naive_chunk_kda(q, k, v, g, beta, output_final_state=True)


def _linear_step(q: Any, k: Any, v: Any, state: Any) -> Any:
    module = _naive("linear_attn")
    return module.naive_recurrent_linear_attn(q, k, v, initial_state=state, output_final_state=True)


def _delta_step(q: Any, k: Any, v: Any, beta: Any, state: Any) -> Any:
    return _naive("delta_rule").delta_rule_recurrence(q, k, v, beta, initial_state=state)


def _delta_scalar_step(q: Any, k: Any, v: Any, beta: Any, g: Any, state: Any) -> Any:
    module = _naive("gated_delta_rule")
    return module.naive_recurrent_gated_delta_rule(
        q, k, v, beta, g, initial_state=state, output_final_state=True
    )


SCANS = {
    "linear": _linear,
    "linear-scalar": _linear_scalar,
    "delta": _delta,
    "delta-scalar": _delta_scalar,
    "delta-channel": _delta_channel,
}
STEPS = {"linear": _linear_step, "delta": _delta_step, "delta-scalar": _delta_scalar_step}
