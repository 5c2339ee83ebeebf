"""One call of a scan on torch tensors: its options and kernels. Nothing here is differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..feature_maps import Parameters

Kernel = Callable[..., Any]
KERNELS: dict[str, tuple[Kernel, Kernel]] = {
    "linear_attention": (_core.linear_attention, _core.linear_attention_backward),
    "delta_rule": (_core.delta_rule, _core.delta_rule_backward),
}
STEPS: dict[str, Kernel] = {
    "linear_attention": _core.linear_attention_step,
    "delta_rule": _core.delta_rule_step,
}
FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))  # what kernels take
Inputs = tuple[Any, ...]  # q, k, v, beta, g, initial_state
Offsets = Sequence[int] | Tensor  # cu_seqlens; a tensor on a device, so that nothing waits for it


@dataclass(eq=False, slots=True)
class Call:
    """The options of a scan, with the name of its function."""

    rule: str
    feature_map: _core.FeatureMap | None
    qk_norm: str | None
    attention_norm: bool
    eps: float
    scale: float
    cu_seqlens: Offsets | None
    level: str | None = None  # the instruction set level that checkpoints are kept for, None: none are kept

    def forward(
        self, inputs: Inputs, out: Tensor | None = None, final_state_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return o, final_state, and checkpoints for backward, None where there are none."""
        *arrays, initial_state = map(_resolved, inputs)
        keep = self.level is not None
        outputs = initial_state, self.cu_seqlens, out, final_state_out, keep
        o, final_state, checkpoints = KERNELS[self.rule][0](*arrays, *self._options(), *outputs)
        if keep and _core.isa() != self.level:  # switched by another thread meanwhile
            checkpoints = None
        return o, final_state, checkpoints

    def backward(
        self,
        do: Tensor,
        dfinal_state: Tensor | None,
        checkpoints: Tensor | None,
        inputs: Inputs,
        out: tuple[Tensor | None, ...] | None = None,
    ) -> Inputs:
        """Return the gradients of the inputs, None where an input is."""
        if checkpoints is not None and (not checkpoints.numel() or _core.isa() != self.level):
            checkpoints = None
        do, dfinal_state, *arrays, initial_state = map(_resolved, (do, dfinal_state, *inputs))
        gradients: Inputs = KERNELS[self.rule][1](
            *(do, *arrays, dfinal_state, out),
            *self._options(),
            *(initial_state, self.cu_seqlens, checkpoints),
        )
        return gradients

    def repeated(self, count: int, folded: Inputs) -> Call:
        """The call for the ``count`` times the sequences of these inputs, one behind the other if packed."""
        if self.cu_seqlens is None:
            return self
        if isinstance(self.cu_seqlens, Tensor):
            return replace(self, cu_seqlens=repeated(self.cu_seqlens, count, folded))
        tokens = self.cu_seqlens[-1]
        ends = [n * tokens + end for n in range(count) for end in self.cu_seqlens[1:]]
        return replace(self, cu_seqlens=(0, *ends))

    def lengths(self) -> Sequence[int] | None:
        """cu_seqlens as plain integers."""
        if isinstance(self.cu_seqlens, Tensor):
            return tuple(self.cu_seqlens.tolist())
        return self.cu_seqlens

    def _options(self) -> tuple[Any, ...]:
        return self.feature_map, self.qk_norm, self.attention_norm, self.eps, self.scale


def repeated(cu_seqlens: Tensor, count: int, folded: Inputs) -> Tensor:
    """The offsets of ``count`` times the sequences, which fill the T of these inputs."""
    starts = torch.arange(count, device=cu_seqlens.device)[:, None] * (folded[0].shape[1] // count)
    return torch.cat([cu_seqlens[:1], (starts + cu_seqlens[1:]).flatten()])


def _resolved(x: Any) -> Any:
    """The tensor with the values that its memory has: kernels do not know of the negative bit."""
    return x if x is None or not x.is_neg() else x.resolve_neg()


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums and states."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_gradient(inputs: Inputs) -> Tensor:
    """Zeros of the shape of o, which take no memory."""
    q, k, v = inputs[:3]
    heads = max(x.shape[2] for x in (q, k, v))
    zeros: Tensor = v.new_zeros(v.shape[3:]).expand(*v.shape[:2], heads, v.shape[3])
    return zeros


def parameters(feature_map: Any) -> Parameters | None:
    """The map as data, its projection a tensor."""
    if feature_map is None:
        return None
    data: Parameters = feature_map._parameters
    if data.projection is None or isinstance(data.projection, Tensor):
        return data
    return data._replace(projection=torch.from_numpy(data.projection))
