"""The fast weight layer of Qwen3-Next, with random weights, before and after a patch.

python examples/qwen3_next.py            # needs torch and transformers

It prints the times of a forward pass, of a training step and of a decoded token, and how far outputs and
gradients are from those before. Sizes are those of Qwen3-Next-80B-A3B unless given.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import fwp_core as fwp
from fwp_core.compat.transformers import patched


def make_layer(hidden: int = 2048, heads: int = 16, size: int = 128) -> Qwen3NextGatedDeltaNet:
    """A layer with random weights: ``heads`` of queries and keys, twice as many of values."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads,
        linear_num_value_heads=2 * heads,
        linear_key_head_dim=size,
        linear_value_head_dim=size,
    )
    return Qwen3NextGatedDeltaNet(config, 0)


def forward(layer: Qwen3NextGatedDeltaNet, x: Tensor) -> list[Tensor]:
    """The output."""
    with torch.no_grad():
        return [layer(x)]


def train(layer: Qwen3NextGatedDeltaNet, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])]


def decoder(layer: Qwen3NextGatedDeltaNet, x: Tensor) -> Callable[[], list[Tensor]]:
    """After a prefill of x, a call that decodes one more token each time."""
    cache = DynamicCache(config=Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"]))
    with torch.no_grad():
        layer(x, cache_params=cache)

    def decode() -> list[Tensor]:
        with torch.no_grad():
            return [layer(x[:, -1:], cache_params=cache)]

    return decode


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """|x - y| / |y| of all tensors in one row."""
    x, y = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (actual, expected))
    return float((x - y).norm() / y.norm())


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The best time of some calls."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main(arguments: list[str] | None = None) -> None:
    """Run it before and after, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model")
    parser.add_argument(
        "--heads", type=int, default=16, help="of queries and keys; values have twice as many"
    )
    parser.add_argument("--size", type=int, default=128, help="of a head")
    args = parser.parse_args(arguments)

    layer = make_layer(args.hidden, args.heads, args.size)
    x = torch.randn(1, args.tokens, args.hidden)
    print(f"{args.tokens} tokens; threads: torch {torch.get_num_threads()}, fwp_core {fwp.get_num_threads()}")
    print(f"{'':16}{'before, ms':>12}{'after, ms':>12}{'difference':>12}")
    for name, make, repeats in (
        ("forward", lambda: lambda: forward(layer, x), 3),
        ("training step", lambda: lambda: train(layer, x), 2),
        ("decoded token", lambda: decoder(layer, x), 20),
    ):
        expected, before = make()(), seconds(make(), repeats)
        with patched("qwen3_next"):
            actual, after = make()(), seconds(make(), repeats)
        print(f"{name:16}{1e3 * before:12.2f}{1e3 * after:12.2f}{difference(actual, expected):12.1e}")


if __name__ == "__main__":
    main()
