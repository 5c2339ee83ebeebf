"""Train one model and measure it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .model import ByteModel, State
from .text import Bytes, segments

NATS = math.log(2)  # in a bit


@dataclass(frozen=True)
class Settings:
    """What all models of a comparison share."""

    steps: int = 1000
    streams: int = 4
    length: int = 256
    width: int = 128
    layers: int = 2
    heads: int = 2
    rate: float = 3e-3
    validation_bytes: int = 131072

    def __post_init__(self) -> None:
        if self.validation_bytes < self.least_bytes:
            raise ValueError(
                f"validation_bytes: expected at least {self.least_bytes}, a segment for each stream, "
                f"got {self.validation_bytes}"
            )

    @property
    def least_bytes(self) -> int:
        """Of a text that is read in streams and segments: one segment each, and the byte before it."""
        return self.streams * (self.length + 1)

    @property
    def bytes_per_step(self) -> int:
        return self.streams * self.length


@dataclass(frozen=True)
class Run:
    """One trained model: bits per byte in validation, and over training, in twenty averages."""

    rule: str
    seed: int
    parameters: int
    bits_per_byte: float
    tokens_per_second: float
    training: list[float]


def run(rule: str, seed: int, texts: tuple[Bytes, Bytes], settings: Settings) -> tuple[ByteModel, Run]:
    """Train a model and validate it. The seed chooses weights and where in the text reading starts."""
    training, validation = texts
    torch.manual_seed(seed)
    offset = int(np.random.default_rng(seed).integers(len(training)))
    model = ByteModel(rule, settings.width, settings.layers, settings.heads)
    pieces = segments(training, settings.streams, settings.length, offset)
    start = time.perf_counter()
    losses = train(model, pieces, settings, f"{rule:8s}{seed}")
    seconds = time.perf_counter() - start
    return model, Run(
        rule,
        seed,
        parameters=sum(x.numel() for x in model.parameters() if x.grad is not None),
        bits_per_byte=validate(model, validation, settings),
        tokens_per_second=settings.steps * settings.bytes_per_step / seconds,
        training=[float(x.mean()) for x in np.array_split(losses, min(20, len(losses)))],
    )


def train(model: ByteModel, pieces: Iterator[Tensor], settings: Settings, name: str = "") -> list[float]:
    """Train on ``settings.steps`` segments, the state carried across their borders; bits per byte of each."""
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warm_cosine(step, settings.steps))
    states, losses = model.initial(settings.streams), []
    with tqdm(islice(pieces, settings.steps), name, settings.steps, ncols=90) as bar:
        for piece in bar:
            loss, states = loss_of(model, piece, states)
            states = [state.detach() for state in states]
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item() / NATS)
            bar.set_postfix(bits_per_byte=f"{losses[-1]:.3f}", refresh=False)
    return losses


def warm_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: up over the first twentieth, then down along a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def loss_of(model: ByteModel, piece: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
    """Mean negative log likelihood, in nats, of the next bytes of ``piece`` [B,T+1]; the states after it."""
    logits, states = model(piece[:, :-1], states)
    return F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten()), states


@torch.no_grad()
def validate(model: ByteModel, text: Bytes, settings: Settings) -> float:
    """Bits per byte over the first ``validation_bytes`` of a text, in streams and segments as in training."""
    text = text[: settings.validation_bytes]
    states, losses = model.initial(settings.streams), []
    count = max(1, (len(text) // settings.streams - 1) // settings.length)  # too short a text is an error
    for piece in islice(segments(text, settings.streams, settings.length), count):
        loss, states = loss_of(model, piece, states)
        losses.append(loss.item())
    return float(np.mean(losses)) / NATS
