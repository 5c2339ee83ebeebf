"""Train a tiny model with fast weights, in torch, to recall what it was told: a few seconds on one core.

A sequence names pairs of a key and a value, one token each, and then asks for the values of its keys in
another order. The pairs are drawn anew for each sequence, so that nothing but memory helps: the model has to
write each value under its key, and to read it.

    python examples/torch_training.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fwp_core as fwp

KEYS, VALUES, PAIRS = 16, 16, 8


class Model(nn.Module):
    """Tokens in, logits of a value out: two layers of fast weights around the stream of an embedding."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(KEYS + VALUES, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers))
        # A short convolution, so that a token sees its neighbour: a value the key it is stored under.
        self.layers = nn.ModuleList(
            fwp.torch.FastWeightAttention(width, heads=1, taps=2) for _ in range(layers)
        )
        self.classify = nn.Linear(width, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y, _ = layer(norm(x))
            x = x + y
        return self.classify(x)


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences [size,3 PAIRS]: key value ... key value, key ... key; and the values [size,PAIRS]."""
    random = torch.Generator().manual_seed(seed)
    while True:
        keys = torch.rand(size, KEYS, generator=random).argsort(1)[:, :PAIRS]
        values = torch.randint(VALUES, (size, PAIRS), generator=random)
        order = torch.rand(size, PAIRS, generator=random).argsort(1)
        told = torch.stack([keys, KEYS + values], dim=2).flatten(1)
        yield torch.cat([told, keys.gather(1, order)], dim=1), values.gather(1, order)


def train(steps: int, seed: int = 0) -> list[float]:
    """Return the part of the values that was right, at every step, each of new sequences."""
    torch.manual_seed(seed)
    model = Model()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    right = []
    for _, (tokens, values) in zip(range(steps), batches(32, seed), strict=False):
        logits = model(tokens)[:, -PAIRS:]
        loss = F.cross_entropy(logits.flatten(0, 1), values.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        right.append((logits.argmax(-1) == values).float().mean().item())
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    right = train(parser.parse_args().steps)
    for start in range(0, len(right), 50):
        part = right[start : start + 50]
        print(f"steps {start:>3} to {start + len(part) - 1:>3}: {sum(part) / len(part):.0%} recalled")


if __name__ == "__main__":
    main()
