"""What gpu.py measures: cases, how fast each could be at best, and their tensors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from registry import Case

Tensor = torch.Tensor

# Names that the field has for a rule with a decay.
MODELS = {
    ("delta", "scalar"): "gdn",
    ("delta", "none"): "delta",
    ("delta", "channel"): "kda",
    ("linear", "channel"): "gla",
    ("linear", "scalar"): "simple_gla",
    ("linear", "none"): "linear",
}
# B, T, H
SHAPES = ((8, 8192, 16), (8, 2048, 16), (1, 32768, 32), (1, 32768, 8), (1, 131072, 32), (1, 256, 16))
SIZES = (128, 64)
DECODING = ((256, 16), (256, 32))  # B, H
MODES = {"forward": "fwd", "forward+backward": "fwd+bwd", "step": "step"}
CHUNK = 64  # tokens that the products of the floors take at a time


def case(rule: str, decay: str, task: str, B: int, T: int, H: int, D: int, dtype: str = "bfloat16") -> Case:
    """A case with K = V = D."""
    return Case(rule, task, decay, B=B, T=T, H=H, K=D, V=D, dtype=dtype)


def name(case: Case) -> str:
    """Like gdn fwd+bwd B8 T8192 H16 D128."""
    return f"{model(case)} {MODES[case.task]} B{case.B} T{case.T} H{case.H} D{case.K}"


def model(case: Case) -> str:
    """The name of its rule and decay."""
    return MODELS[case.rule, case.decay]


def timed(dry: bool) -> list[Case]:
    """Forward passes and training, the most telling first."""
    shapes, sizes = (((1, 64, 1),), (32,)) if dry else (SHAPES, SIZES)
    return [
        case(*kind, task, *shape, D)
        for D, shape, kind, task in itertools.product(sizes, shapes, MODELS, ("forward", "forward+backward"))
    ]


def decoding(dry: bool) -> list[Case]:
    """One token for many sequences, states in float32."""
    shapes, D = (((2, 2),), 32) if dry else (DECODING, 128)
    kinds = [("delta", "scalar"), ("delta", "none"), ("linear", "none")]
    return [case(*kind, "step", B, 1, H, D) for B, H in shapes for kind in kinds]


def checked(dry: bool) -> list[Case]:
    """What is compared with float64 on the CPU, the gradients too."""
    T, sizes = (64, (32,)) if dry else (1024, SIZES)
    cases = [case(*kind, "forward+backward", 1, T, 2, D) for D in sizes for kind in MODELS]
    # Sequences that are cut into segments, too.
    return cases if dry else [*cases, case("delta", "scalar", "forward+backward", 1, 16384, 1, 64)]


def tuned(dry: bool) -> list[Case]:
    """Small cases that make a peer choose its configurations; they do not depend on B and T."""
    if dry:
        return []
    return [case(*kind, "forward+backward", 1, 2048, 16, D) for D in SIZES for kind in MODELS]


class Floor(NamedTuple):
    """The least that a case can cost."""

    bytes: float
    flops: float

    def seconds(self, copy: float, product: float) -> float:
        """At this many bytes and flops per second."""
        return max(self.bytes / copy, self.flops / product)


def floors(case: Case) -> list[Floor]:
    """One for each pass: arrays are read and written once; the products are those of chunks, dense."""
    D, rows, item = case.K, case.B * case.T * case.H, 2 if case.dtype != "float32" else 4
    delta, gated = case.rule == "delta", case.decay != "none"
    gates = {"none": 0, "scalar": 4, "channel": item * D}[case.decay] + (item if delta else 0)
    if case.task == "step":
        return [Floor(rows * (2 * 4 * D * D + 4 * D * item + gates), rows * (6 if delta else 4) * D * D)]
    forward = 6 * D**2 + 8 * CHUNK * D + CHUNK**2 if delta else 4 * D**2 + 4 * CHUNK * D
    backward = 16 * D**2 + (20 if gated else 18) * CHUNK * D if delta else 10 * D**2 + 10 * CHUNK * D
    passes = [Floor(rows * (4 * D * item + gates), rows * forward)]
    if case.task == "forward+backward":
        passes.append(Floor(rows * (7 * D * item + 2 * gates), rows * backward))
    return passes


@dataclass
class Tensors:
    """Inputs of a case: unit q and k, beta in (0, 1), gates that forget over some tens of tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    g: Tensor | None
    do: Tensor
    state: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the rule takes, by name."""
        named = {name: getattr(self, name) for name in ("q", "k", "v", "beta", "g")}
        return {name: x for name, x in named.items() if x is not None}


def tensors(case: Case, device: str, seed: int) -> Tensors:
    """A set of them; a step has no T axis. Scalar gates are float32, those of channels have the dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, D = getattr(torch, case.dtype), case.K
    rows = (case.B, case.H) if case.task == "step" else (case.B, case.T, case.H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def unit() -> Tensor:
        return torch.nn.functional.normalize(normal(*rows, D), dim=-1).to(dtype)

    def gate() -> Tensor | None:
        if case.decay == "none":
            return None
        scalar = case.decay == "scalar"
        g = -torch.exp(normal(*(rows if scalar else (*rows, D))) - 3)
        return g if scalar else g.to(dtype)

    return Tensors(
        q=unit(),
        k=unit(),
        v=normal(*rows, D).to(dtype),
        beta=normal(*rows).sigmoid().to(dtype) if case.rule == "delta" else None,
        g=gate(),
        do=normal(*rows, D).to(dtype),
        state=normal(case.B, case.H, D, D),
    )
