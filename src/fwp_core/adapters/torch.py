"""The functions of the library on torch tensors.

:func:`delta_rule` and :func:`linear_attention` are differentiable; all others are plain calls. Under
``torch.compile`` and ``torch.export`` scans and steps are operators of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _core
from .._core import DeviceError, DTypeError, UnsupportedError
from ..feature_maps import FeatureMap
from ..ops import QKNorm
from . import torch_ops
from .torch_autograd import Scan, refuse_forward_mode
from .torch_call import Call, parameters

Integers = Sequence[int] | Tensor | Any  # or a NumPy array
_NAMES = ("q", "k", "v", "beta", "g", "initial_state")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
    out: Tensor | None = None,
    final_state_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fwp_core.delta_rule` on tensors, differentiable."""
    options = ("delta_rule", feature_map, qk_norm, attention_norm, eps, scale)
    return _scan((q, k, v, beta, g, initial_state), options, cu_seqlens, out, final_state_out)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
    out: Tensor | None = None,
    final_state_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fwp_core.linear_attention` on tensors, differentiable."""
    options = ("linear_attention", feature_map, qk_norm, attention_norm, eps, scale)
    return _scan((q, k, v, beta, g, initial_state), options, cu_seqlens, out, final_state_out)


def _scan(inputs: Any, options: Any, cu_seqlens: Any, out: Any, final_state_out: Any) -> tuple[Tensor, Tensor]:
    if _traced():
        return _scan_in_graph(inputs, options, cu_seqlens, out, final_state_out)
    inputs = _autocast(tuple(map(_checked, _NAMES, inputs)))
    if out is not None or final_state_out is not None:
        raise NotImplementedError
    differentiable = torch.is_grad_enabled()
    call = Call(*options, _lengths(cu_seqlens), _core.isa() if differentiable else None)
    o, final_state, _ = Scan.apply(call, *inputs)
    return o, final_state


def _scan_in_graph(
    inputs: Any, options: Any, cu_seqlens: Any, out: Any, final_state_out: Any
) -> tuple[Tensor, Tensor]:
    rule, feature_map, *norms = options
    cu_seqlens = None if cu_seqlens is None else torch.as_tensor(cu_seqlens)
    map_parameters = (0, 0, 0.0, None) if feature_map is None else parameters(feature_map)
    o, final_state = torch_ops.scan(*_autocast(inputs), cu_seqlens, rule, *map_parameters, *norms)
    return o, final_state


def _traced() -> bool:
    """Whether operations are recorded rather than run: by torch.compile, torch.export or a dispatch mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _checked(name: str, x: Any) -> Any:
    """The tensor as the kernels can read it."""
    if x is None:
        return None
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        raise DTypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise UnsupportedError(f"{name}: expected a strided tensor, got layout {x.layout}")
    if x.is_meta:
        raise DeviceError(f"{name}: expected a tensor in memory, got one on device meta")
    return x.resolve_neg() if x.is_neg() else x


def _lengths(cu_seqlens: Any) -> Any:
    if cu_seqlens is None:
        return None
    return tuple(cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens)


def _autocast(inputs: Any) -> Any:
    """Under torch.autocast: q, k and v in its dtype, as for a matrix product; gates and state in float32."""
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return inputs
    if any(x is not None and x.dtype == torch.float64 for x in inputs):
        return inputs
    low = torch.get_autocast_dtype(device)
    dtypes = (low, low, low, torch.float32, torch.float32, torch.float32)
    return tuple(None if x is None else x.to(dtype) for x, dtype in zip(inputs, dtypes, strict=True))
