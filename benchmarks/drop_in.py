"""What a patch makes of Qwen3-Next on this machine: python benchmarks/drop_in.py, a few minutes.

The two functions that a patch replaces, and the whole layer around them, at the sizes of Qwen3-Next-80B-A3B:
16 heads of queries and keys, 32 of values, 128 x 128 each, width 2048. Each is measured before and after the
patch by turns, in one process; a call that decodes is one of 64 tokens, each of which starts from the state
that the one before has left. Times are medians; the ratio is the median of the ratios of neighbours, beside
the least and the most. Results that differ by more than 1e-5, in L2 and all tensors in one row, end it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import qwen3_next as example

import fwp_core as fwp
from fwp_core.compat.transformers import patched

Call = Callable[
    [], list[Tensor]
]  # rows of the table are functions that make such, one for before, one for after
TOLERANCE = 1e-5
DECODED = 64  # tokens of a call of the row that decodes


def calls(tokens: int, heads: int, size: int) -> dict[str, Callable[[], Call]]:
    """The functions as the layer calls them: what the module has under their names when they run."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, tokens, heads, size)
    v, do = torch.randn(2, 1, tokens, 2 * heads, size)
    g = -F.softplus(torch.randn(1, tokens, 2 * heads) - 2)
    beta = torch.rand(1, tokens, 2 * heads)
    state = torch.randn(1, 2 * heads, size, size)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]

    def scan() -> Tensor:
        o, _ = qwen.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        return o

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [scan()]

    def both() -> list[Tensor]:
        o = scan()
        return [o, *torch.autograd.grad(o, leaves, do)]

    def decode() -> list[Tensor]:
        """A few tokens, one after the other, from the state that the one before has left."""
        results = []
        last = state
        with torch.no_grad():
            for t in range(min(DECODED, tokens)):
                token = (x[:, t : t + 1] for x in (q, k, v))
                gates = {"g": g[:, t : t + 1], "beta": beta[:, t : t + 1]}
                options = {"initial_state": last, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
                o, last = qwen.torch_recurrent_gated_delta_rule(*token, **gates, **options)
                results.append(o)
        return [*results, last]

    return {
        "call forward": lambda: forward,
        "call forward+backward": lambda: both,
        "call decode": lambda: decode,
    }


def blocks(tokens: int, heads: int, size: int, hidden: int) -> dict[str, Callable[[], Call]]:
    """The whole layer: projections, convolution, gates and normalisation around the call."""
    layer = example.make_layer(hidden, heads, size)
    x = torch.randn(1, tokens, hidden)
    return {
        "block forward": lambda: lambda: example.forward(layer, x),
        "block forward+backward": lambda: lambda: example.train(layer, x),
        "block decode": lambda: example.decoder(layer, x[:, :64]),
    }


def sample(call: Call) -> tuple[float, list[Tensor]]:
    """Seconds and results of a call."""
    start = time.perf_counter()
    results = call()
    return time.perf_counter() - start, results


def measure(make: Callable[[], Call], rounds: int) -> tuple[list[float], list[float], float]:
    """Seconds before and after the patch, first calls left out, and how far the first results are apart."""
    original, ours = make(), make()
    before, after = [], []
    for number in range(rounds + 1):
        seconds, expected = sample(original)
        before.append(seconds)
        with patched("qwen3_next"):
            seconds, actual = sample(ours)
        after.append(seconds)
        if number == 0:
            difference = example.difference(actual, expected)
    return before[1:], after[1:], difference


def line(name: str, before: list[float], after: list[float], difference: float) -> str:
    """A row of the table: medians in milliseconds, ratios, and how far results are apart."""
    ratios = [x / y for x, y in zip(before, after, strict=True)]
    figures = "".join(f"{1e3 * statistics.median(x):12.2f}" for x in (before, after))
    figures += "".join(f"{x:8.2f}" for x in (statistics.median(ratios), min(ratios), max(ratios)))
    return f"{name:24}{figures}{difference:12.1e}"


def main(arguments: list[str] | None = None) -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    most = fwp.get_num_threads()
    parser.add_argument("--threads", type=int, default=most, help=f"of both libraries (default: {most})")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each row, tenfold for decoding")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="GLOB", help="only these, such as 'call *'"
    )
    parser.add_argument("--output", type=Path, help="file to write the table to as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; no figures")
    args = parser.parse_args(arguments)
    heads, size, hidden, tokens = (2, 16, 32, 100) if args.quick else (16, 128, 2048, args.tokens)
    torch.set_num_threads(args.threads)

    lines = [
        f"{tokens} tokens, {args.threads} threads, torch {torch.__version__}, level {fwp.isa()}, "
        f"load {os.getloadavg()[0]:.1f}",
        f"{'':24}{'before, ms':>12}{'after, ms':>12}{'ratio':>8}{'least':>8}{'most':>8}{'difference':>12}",
    ]
    print(*lines, sep="\n")
    rows = calls(tokens, heads, size) | blocks(tokens, heads, size, hidden)
    asked = [name for name in rows if any(fnmatch(name, glob) for glob in args.rows)]
    with fwp.threads(args.threads):
        for name in asked:
            before, after, difference = measure(rows[name], args.rounds * (10 if "decode" in name else 1))
            if not difference <= TOLERANCE:
                sys.exit(f"{name}: results differ by {difference:.1e}")
            lines.append(line(name, before, after, difference))
            print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
