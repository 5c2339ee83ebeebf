"""Time the scans beside this machine's peak and NumPy softmax attention."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import fwp_core as fwp
from fwp_core import _core

from . import positive_int

Array = npt.NDArray[np.float32]

# Credited flops per token and head in units of K*V, the sequential count: work that a method adds to it
# (checkpoints, recomputed states, decay) earns nothing.
FORWARD_FLOPS = {"delta": 6, "linear": 4}
BACKWARD_FLOPS = {"delta": 16, "linear": 10}

PEAK_SECONDS = 0.1
SOFTMAX_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SOFTMAX_SIZE = 64
SOFTMAX_ROWS = 128  # query rows per block of scores, so that a block stays in cache

NOTES = """
median, best   milliseconds of one call over {rounds} interleaved rounds; float32, B = 1; outputs are
               warm (allocated and touched before). GF/s and peak are those of the best call.
GF/s           credited flops per token and head: delta 6KV forward and 16KV backward, linear 4KV
               and 10KV; decay earns nothing. vjp is the forward scan that keeps checkpoints, and
               its pullback.
peak           share of the float32 FMA rate that the same threads reached between the rounds:
               {peaks}"""


class Case(NamedTuple):
    """One row of the first table."""

    rule: str  # "linear" or "delta"
    decay: str  # "none", "scalar" or "channel"
    size: int  # K = V
    direction: str  # "forward", "backward" or "vjp"

    def flops(self, tokens: int) -> int:
        """Credited flops for this many tokens, counted over all heads."""
        forward, backward = FORWARD_FLOPS[self.rule], BACKWARD_FLOPS[self.rule]
        per_state_entry = {"forward": forward, "backward": backward, "vjp": forward + backward}
        return per_state_entry[self.direction] * self.size**2 * tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--tokens", type=positive_int, default=4096, help="sequence length T (default: 4096)")
    parser.add_argument("--heads", type=positive_int, default=8, help="number of heads H (default: 8)")
    parser.add_argument(
        "--sizes", type=positive_int, nargs="+", default=[64, 128], help="K = V (default: 64 128)"
    )
    parser.add_argument("--threads", type=positive_int, nargs="+", help="thread counts (default: 1 and all)")
    parser.add_argument("--rounds", type=positive_int, default=9, help="interleaved repeats (default: 9)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to FILE")
    parser.add_argument(
        "--quick", action="store_true", help="short runs to see that it works; no fair figures"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print two tables: every scan, then delta_rule beside softmax attention."""
    lengths: Sequence[int] = SOFTMAX_LENGTHS
    if args.quick:
        args.tokens, args.rounds, lengths = 64, 2, lengths[:1]
    thread_counts = args.threads or sorted({1, fwp.get_num_threads()})
    config = fwp.show_config(mode="dict")

    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    print(f"fwp_core {fwp.__version__}, ISA level {config['isa']}, T = {args.tokens}, H = {args.heads}")
    print(f"load average {load} on {os.cpu_count()} processors: figures count if it is near 0", flush=True)
    scans, peaks = bench_scans(args, thread_counts)
    print_scans(scans, thread_counts)
    peak_text = ", ".join(f"{threads_label(n)} {peak:.1f} GF/s" for n, peak in peaks.items())
    print(NOTES.format(rounds=args.rounds, peaks=peak_text), flush=True)

    softmax = bench_softmax(lengths, args.rounds)
    print_softmax(softmax)
    if args.json:
        settings = {name: getattr(args, name) for name in ("tokens", "heads", "sizes", "rounds", "quick")}
        result = {
            "config": config,
            "settings": settings,
            "load": load,
            "peak": peaks,
            "scans": scans,
            "softmax": softmax,
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0


def bench_scans(
    args: argparse.Namespace, thread_counts: Sequence[int]
) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """One record per case and thread count, and the best FMA rate in GFLOP/s per thread count."""
    calls: dict[tuple[Case, int], Callable[[], object]] = {}
    for size in args.sizes:
        buffers = Buffers(args.tokens, args.heads, size)
        for rule in ("linear", "delta"):
            for decay in ("none", "scalar", "channel"):
                for direction, call in buffers.calls(rule, decay).items():
                    for threads in thread_counts:
                        calls[Case(rule, decay, size, direction), threads] = with_threads(threads, call)

    rates: dict[int, list[float]] = {threads: [] for threads in thread_counts}

    def measure_peaks() -> None:
        for threads in thread_counts:
            rates[threads].append(fma_rate(threads))

    seconds = interleave(calls, args.rounds, between=measure_peaks)
    peaks = {threads: max(values) for threads, values in rates.items()}
    records = []
    for (case, threads), values in seconds.items():
        rate = case.flops(args.tokens * args.heads) / min(values) * 1e-9
        record = {**case._asdict(), "threads": threads, "gflops": rate, "of_peak": rate / peaks[threads]}
        records.append(record | milliseconds(values))
    return records, peaks


def interleave(
    calls: Mapping[Any, Callable[[], object]], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[Any, list[float]]:
    """Seconds of each call in each round; a round runs every call once, so that all meet the same weather."""
    for call in calls.values():
        call()
    seconds: dict[Hashable, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        between()
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and best in milliseconds."""
    return {"median_ms": 1e3 * statistics.median(seconds), "best_ms": 1e3 * min(seconds)}


def with_threads(threads: int, call: Callable[[], object]) -> Callable[[], object]:
    """The call on this many threads."""

    def wrapped() -> object:
        with fwp.threads(threads):
            return call()

    return wrapped


def fma_rate(threads: int) -> float:
    """GFLOP/s of a loop of fused multiply-adds in registers, on this many threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: _core.fma_peak("float32", PEAK_SECONDS), range(threads)))


class Buffers:
    """Inputs with unit keys and queries, and outputs that are touched, for B = 1 and one size K = V."""

    def __init__(self, tokens: int, heads: int, size: int) -> None:
        rng = np.random.default_rng(0)
        shape = (1, tokens, heads, size)
        self.q, self.k = unit(rng, shape), unit(rng, shape)
        self.v, self.do = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        self.beta = rng.random(shape[:3], dtype=np.float32)
        self.g = {
            "none": None,
            "scalar": -rng.random(shape[:3], dtype=np.float32),
            "channel": -rng.random(shape, dtype=np.float32),
        }
        self.out: dict[str, Any] = {
            "out": np.zeros(shape, np.float32),
            "final_state_out": np.zeros((1, heads, size, size), np.float32),
        }

    def calls(self, rule: str, decay: str) -> dict[str, Callable[[], object]]:
        """The three passes of one rule and decay as calls without arguments, by name."""
        delta = rule == "delta"
        scan: Any = fwp.delta_rule if delta else fwp.linear_attention
        backward: Any = fwp.delta_rule_backward if delta else fwp.linear_attention_backward
        inputs = (self.q, self.k, self.v, self.beta if delta else None, self.g[decay])
        gradients = fwp.Gradients(*[None if x is None else np.zeros_like(x) for x in inputs])

        def vjp() -> object:
            _, pullback = fwp.vjp(scan, *inputs, **self.out)
            return pullback(self.do, out=gradients)

        return {
            "forward": lambda: scan(*inputs, **self.out),
            "backward": lambda: backward(self.do, *inputs, out=gradients),
            "vjp": vjp,
        }


def unit(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random vectors of unit length on the last axis."""
    x = rng.standard_normal(shape, dtype=np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def bench_softmax(lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Causal softmax attention in NumPy and delta_rule for one head, on all threads, at each length."""
    delta: dict[int, Callable[[], object]] = {}
    softmax: dict[int, Callable[[], object]] = {}
    for tokens in lengths:
        buffers = Buffers(tokens, 1, SOFTMAX_SIZE)
        q, k, v = (np.ascontiguousarray(x[0, :, 0]) for x in (buffers.q, buffers.k, buffers.v))
        delta[tokens] = buffers.calls("delta", "none")["forward"]
        softmax[tokens] = partial(softmax_attention, q, k, v, np.zeros_like(v))
    # One after the other: BLAS threads spin for a while after a product and would slow the scan down.
    delta_seconds = interleave(delta, rounds)
    softmax_seconds = interleave(softmax, min(rounds, 5))
    return [
        {
            "tokens": tokens,
            "delta": milliseconds(delta_seconds[tokens]),
            "softmax": milliseconds(softmax_seconds[tokens]),
        }
        for tokens in lengths
    ]


def softmax_attention(q: Array, k: Array, v: Array, out: Array) -> Array:
    """Causal softmax attention for one head, the way a NumPy user would write it with some care.

    q, k [T,K], v [T,V], out [T,V]. Takes a block of query rows at a time against all keys up to its last row,
    so that half of the products is never computed; scores live in one reused block of [rows, T].
    """
    tokens = len(q)
    scale = np.float32(q.shape[1] ** -0.5)
    buffer = np.empty(SOFTMAX_ROWS * tokens, np.float32)
    future = np.triu(np.ones((SOFTMAX_ROWS, SOFTMAX_ROWS), bool), 1)
    for start in range(0, tokens, SOFTMAX_ROWS):
        end = min(start + SOFTMAX_ROWS, tokens)
        rows = end - start
        scores = buffer[: rows * end].reshape(rows, end)
        np.matmul(q[start:end] * scale, k[:end].T, out=scores)
        scores[:, start:][future[:rows, :rows]] = -np.inf
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        np.matmul(scores, v[:end], out=out[start:end])
        out[start:end] /= scores.sum(axis=1, keepdims=True)
    return out


def print_scans(records: list[dict[str, Any]], thread_counts: Sequence[int]) -> None:
    """One line per case, one group of columns per thread count."""
    lines: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for record in records:
        case = tuple(record[name] for name in Case._fields)
        lines.setdefault(case, {})[record["threads"]] = record

    groups = "".join(f"{threads_label(threads):>34s}" for threads in thread_counts)
    columns = f"{'median':>11s}{'best':>9s}{'GF/s':>8s}{'peak':>6s}" * len(thread_counts)
    print(f"\n{'':30s}{groups}\n{'rule':8s}{'decay':9s}{'K=V':>3s}  {'pass':8s}{columns}")
    previous = None
    for case, by_threads in lines.items():
        rule, decay, size, direction = case
        gap = "\n" if previous not in (None, size) else ""
        figures = "".join(
            "{median_ms:11.2f}{best_ms:9.2f}{gflops:8.1f}{of_peak:6.2f}".format_map(by_threads[threads])
            for threads in thread_counts
        )
        print(f"{gap}{rule:8s}{decay:9s}{size:3d}  {direction:8s}{figures}")
        previous = size


def print_softmax(records: list[dict[str, Any]]) -> None:
    """One line per length."""
    title = "delta_rule and softmax attention in NumPy, causal, forward: one head, all cores"
    print(f"\n{title}, K = V = {SOFTMAX_SIZE}")
    print(f"\n{'':8s}{'delta_rule':>22s}{'NumPy softmax':>22s}{'softmax /':>14s}")
    print(f"{'T':>8s}{'median':>12s}{'best':>10s}{'median':>12s}{'best':>10s}{'delta':>14s}")
    for record in records:
        figures = "".join(
            "{median_ms:12.2f}{best_ms:10.2f}".format_map(record[name]) for name in ("delta", "softmax")
        )
        ratio = record["softmax"]["best_ms"] / record["delta"]["best_ms"]
        print(f"{record['tokens']:8d}{figures}{ratio:14.1f}")


def threads_label(threads: int) -> str:
    """1 thread, 2 threads."""
    return f"{threads} thread{'s' if threads > 1 else ''}"
