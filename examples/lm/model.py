"""The language model: a slow net in torch around a memory, fast weights or, to compare, softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fwp_core as fwp

TAPS = 4  # of the short convolution


class State(NamedTuple):
    """What a layer carries from one segment of a text to the next."""

    recent: Tensor  # [B,TAPS-1,3D] the last projections, for the short convolution
    memory: Tensor | None  # [B,H,K,V] fast weights; None for attention, which sees its segment only

    def detach(self) -> State:
        """The same values, through which no gradient flows: the border of a segment."""
        return State(self.recent.detach(), None if self.memory is None else self.memory.detach())


@dataclass(frozen=True)
class FastWeightMemory:
    """A rule of fwp_core. Its state is the fast weights: a scan returns them, a step updates them."""

    scan: Callable[..., Any]
    step: Callable[..., Any]
    options: dict[str, Any]

    def initial(self, batch: int, heads: int, size: int) -> Tensor | None:
        return torch.zeros(batch, heads, size, size + self.options.get("attention_norm", False))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, decode: bool
    ) -> tuple[Tensor, Tensor]:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        if decode:
            return self.step(*(x.detach() for x in (q, k, v, beta, g)), state=state, **self.options), state
        return self.scan(q, k, v, beta, g, initial_state=state, **self.options)


class SoftmaxMemory:
    """Causal softmax attention within the segment, with rotary positions; no state, no write strength."""

    def initial(self, batch: int, heads: int, size: int) -> Tensor | None:
        return None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: None, decode: bool
    ) -> tuple[Tensor, None]:
        if decode:
            raise ValueError("rule: softmax attention has no state to decode with; linear and delta have one")
        q, k, v = (x.transpose(1, 2) for x in (rotate(q), rotate(k), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


MEMORIES = {
    "linear": FastWeightMemory(fwp.linear_attention, fwp.linear_attention_step, {"qk_norm": "l2"}),
    "delta": FastWeightMemory(fwp.delta_rule, fwp.delta_rule_step, {"qk_norm": "l2"}),
    "softmax": SoftmaxMemory(),
}


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): channels of x [B,T,H,D] turn in pairs by angles that grow with t."""
    half = x.shape[-1] // 2
    rates = 1000.0 ** -(torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None, None] * rates  # [T,1,D/2]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Layer(nn.Module):
    """Read and write the memory, then a perceptron at each token; both added to the stream x [B,T,D]."""

    def __init__(self, rule: str, width: int, heads: int) -> None:
        super().__init__()
        self.rule, self.heads = MEMORIES[rule], heads
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.taps = nn.Parameter(torch.randn(TAPS, 3 * width) / TAPS**0.5)
        self.strength = nn.Linear(width, heads)
        self.head_norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)
        self.perceptron = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def initial(self, batch: int) -> State:
        """The state before the first byte of a text."""
        width = self.out.in_features
        recent = torch.zeros(batch, TAPS - 1, 3 * width)
        return State(recent, self.rule.initial(batch, self.heads, width // self.heads))

    def forward(self, x: Tensor, g: Tensor, state: State, decode: bool) -> tuple[Tensor, State]:
        inputs = self.norm(x)
        qkv, recent = self.convolve(self.project(inputs), state.recent)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        beta = torch.sigmoid(self.strength(inputs))
        o, memory = self.rule(q, k, v, beta, g.expand_as(beta), state.memory, decode)
        x = x + self.out(self.head_norm(o).flatten(2))
        return x + self.perceptron(x), State(recent, memory)

    def convolve(self, x: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Each channel's weighted sum of its last TAPS values, so that a key can name the bytes before it."""
        x = torch.cat([recent, x], dim=1)
        length = x.shape[1] - TAPS + 1
        y = sum(tap * x[:, i : i + length] for i, tap in enumerate(self.taps))
        return y, x[:, length:]


class ByteModel(nn.Module):
    """Bytes in, logits of the next byte out, and a state per layer that goes on to the next segment."""

    def __init__(self, rule: str, width: int = 128, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(rule, width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.classify = nn.Linear(width, 256)

    def initial(self, batch: int) -> list[State]:
        """The states before the first byte of ``batch`` texts."""
        return [layer.initial(batch) for layer in self.layers]

    def forward(self, text: Tensor, states: list[State], decode: bool = False) -> tuple[Tensor, list[State]]:
        """Read a segment ``text`` [B,T] of bytes; return logits [B,T,256] and the states after it.

        With ``decode`` the fast weights are updated in place by a ``*_step`` function: without gradients, for
        few bytes at a time. Either way gives the same numbers, to rounding. A zero byte, which ends a file,
        empties the fast weights: their log decay g is -inf there, and 0 elsewhere.
        """
        x, after = self.embed(text), []
        g = torch.zeros(*text.shape, 1, dtype=x.dtype).masked_fill(text[..., None] == 0, -torch.inf)
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, g, state, decode)
            after.append(state)
        return self.classify(self.norm(x)), after


@torch.no_grad()
def generate(model: ByteModel, prompt: bytes, count: int, temperature: float = 0.8, seed: int = 0) -> bytes:
    """Continue ``prompt``, at least one byte, by ``count`` bytes, each one step of the fast weights."""
    if not prompt:
        raise ValueError("prompt: expected at least one byte, got none")
    random = torch.Generator().manual_seed(seed)
    logits, states = model(torch.tensor([list(prompt)]), model.initial(1))
    text = bytearray()
    for _ in range(count):
        odds = torch.softmax(logits[0, -1] / temperature, dim=-1)
        byte = torch.multinomial(odds, 1, generator=random)
        text.append(int(byte))
        logits, states = model(byte[None], states, decode=True)
    return bytes(text)
