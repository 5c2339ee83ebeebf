"""What every participant that runs on torch shares: a case's tensors, and autograd as a call to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from registry import Array, Case, inputs

from . import Prepared

Tensor = torch.Tensor
# Takes q, k, v and what the case has of beta and g by name, a step also state; returns o or (o, final_state).
Function = Callable[..., Any]


def start(threads: int) -> None:
    """Set torch's threads."""
    torch.set_num_threads(threads)


def prepare(case: Case, function: Function, layout: str = "BTH") -> Prepared:
    """Time a torch function; layout "BHT" hands it compact tensors with heads before time."""
    x = inputs(case)
    named = {name: getattr(x, name) for name in ("q", "k", "v", "beta", "g")}
    arrays = {name: array for name, array in named.items() if array is not None}
    if case.task == "step":
        arrays = {name: array[:, None] for name, array in arrays.items()}
    tensors = {name: _tensor(array, layout) for name, array in arrays.items()}
    if case.task == "step":
        return _step(function, tensors, torch.tensor(x.state), layout)
    if case.task == "forward+backward":
        return _forward_backward(function, tensors, _tensor(x.do, layout), layout)
    return _forward(function, tensors, layout)


def _forward(function: Function, tensors: dict[str, Tensor], layout: str) -> Prepared:
    kept: dict[str, Tensor] = {}

    def call() -> None:
        with torch.inference_mode():
            kept["o"] = _output(function(**tensors))

    return Prepared(call, lambda: {"o": _array(kept["o"], layout)})


def _forward_backward(function: Function, tensors: dict[str, Tensor], do: Tensor, layout: str) -> Prepared:
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    kept: dict[str, Tensor] = {}

    def call() -> None:
        o = _output(function(**leaves))
        gradients = torch.autograd.grad(o, list(leaves.values()), do)
        kept["o"] = o.detach()
        kept.update(zip((f"d{name}" for name in leaves), gradients, strict=True))

    outputs = do.nbytes + sum(t.nbytes for t in leaves.values())
    return Prepared(call, lambda: {name: _array(t, layout) for name, t in kept.items()}, outputs)


def _step(function: Function, tensors: dict[str, Tensor], state: Tensor, layout: str) -> Prepared:
    kept = {"state": state}

    def call() -> None:
        with torch.inference_mode():
            kept["o"], kept["state"] = function(**tensors, state=kept["state"])

    return Prepared(call, lambda: {"o": _array(kept["o"], layout)[:, 0], "state": kept["state"].numpy()})


def _tensor(x: Array, layout: str) -> Tensor:
    """A tensor on the array's own memory, or a compact copy with heads before time."""
    t = torch.from_numpy(x)
    return t.transpose(1, 2).contiguous() if layout == "BHT" else t


def _array(t: Tensor, layout: str) -> Array:
    """Back to [B,T,H,...]."""
    x: Array = (t.transpose(1, 2) if layout == "BHT" else t).numpy()
    return x


def _output(returned: Any) -> Tensor:
    o: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return o
