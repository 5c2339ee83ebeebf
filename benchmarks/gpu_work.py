"""The process that measures for gpu.py: it reads one request per line and answers each with a line of JSON.

Where a request leaves the GPU unusable, the process ends after its answer, and gpu.py starts another.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_cases
import numpy as np
import torch
from gpu_cases import Tensor, Tensors
from gpu_peers import PEERS, choose_configurations, chosen_configurations
from peers import Unsupported
from registry import Case

import fwp_core as fwp

Answer = dict[str, Any]
Call = Callable[[], Any]

SAMPLE_SECONDS = 1e-3  # a call is repeated within a sample until it takes this long
MOST_CALLS = 32
FEWEST_REPEATS = 5


class Clock:
    """Seconds of n calls on a GPU, by events of its stream; those of the CPU in a dry run."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []

    def seconds(self, calls: list[Call], n: int) -> float:
        """Seconds per call; the calls are taken in turn."""
        if self.cuda:
            self.events[0].record()
            for i in range(n):
                calls[i % len(calls)]()
            self.events[1].record()
            self.events[1].synchronize()
            return self.events[0].elapsed_time(self.events[1]) / 1e3 / n
        start = time.perf_counter()
        for i in range(n):
            calls[i % len(calls)]()
        return (time.perf_counter() - start) / n


class Way(NamedTuple):
    """One way to time one participant: its calls, for the sets of inputs."""

    peer: str
    kind: str  # "graph" or "eager"
    calls: list[Call]
    n: int  # calls of a sample


class Server:
    """The requests."""

    def __init__(self, device: str, configurations: str) -> None:
        self.device, self.clock = device, Clock(device)
        if device == "cpu":
            torch.set_num_threads(1)  # for tiny arrays
        self.configurations = Path(configurations)
        self.peers, self.refused = {}, {}
        for name, peer in PEERS[device].items():
            try:
                self.peers[name] = peer(device)
            except (ImportError, Unsupported) as reason:
                self.refused[name] = str(reason) or type(reason).__name__
        self._use_configurations()

    def hello(self) -> Answer:
        """The machine, versions, and who is not here."""
        packages = {package for peer in self.peers.values() for package in peer.packages}
        versions = {name: importlib.metadata.version(name) for name in sorted(packages | {"torch", "numpy"})}
        machine: Answer = {"gpu": "none"}
        if self.device == "cuda":
            p = torch.cuda.get_device_properties(0)
            machine = {
                "gpu": p.name,
                "capability": f"{p.major}.{p.minor}",
                "multiprocessors": p.multi_processor_count,
                "memory": p.total_memory,
                "l2": p.L2_cache_size,
                "cuda": torch.version.cuda,
            }
        return {"machine": machine, "versions": versions, "peers": list(self.peers), "refused": self.refused}

    def ceilings(self) -> Answer:
        """What this GPU reaches: a copy in byte/s, both ways counted, and a product of bfloat16 in flop/s."""
        if self.device != "cuda":
            return {"copy": 1e10, "product": 1e11}  # of nothing: a dry run
        x = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
        y = torch.empty_like(x)
        a, b, c = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(3))
        copies = self._median([lambda: y.copy_(x)], 4)
        products = self._median([lambda: torch.mm(a, b, out=c)], 4)
        return {"copy": 2 * x.numel() / copies, "product": 2 * 8192**3 / products}

    def tune(self, case: Case, peer: str) -> Answer:
        """Let a peer choose its configurations, by one pass there and back."""
        start = time.monotonic()
        x = gpu_cases.tensors(case, self.device, 0)
        self._call(case, peer, x)()
        self._synchronize()
        self.configurations.write_text(json.dumps(chosen_configurations(), indent=1) + "\n")
        self._use_configurations()
        return {"seconds": time.monotonic() - start}

    def errors(self, case: Case, peers: list[str]) -> Answer:
        """Relative L2 errors of everyone's results, against float64 on the CPU."""
        x = gpu_cases.tensors(case, self.device, 1)
        dstate = gpu_cases.tensors(case, self.device, 2).state
        exact = exact_results(case, x, dstate)
        found: Answer = {}
        for peer in peers:
            self._poison()
            try:
                results = self._results(case, peer, x, dstate)
                found[peer] = {name: relative_error(array, exact[name]) for name, array in results.items()}
            except Exception as reason:
                found[peer] = {"refused": said(reason)}
        return found

    def time(self, case: Case, peers: list[str], repeats: int, within: float) -> Answer:
        """Times of everyone, by turns, replayed from a graph and called one by one."""
        end = time.monotonic() + within
        sets = self._sets(case)
        answers: Answer = {peer: {"note": self.peers[peer].note(case)} for peer in peers}
        ways: list[Way] = []
        for peer in peers:
            try:
                calls = [self._call(case, peer, x) for x in sets]
                self._warm(calls)
                ways.append(self._way(peer, "eager", calls))
            except Exception as reason:
                answers[peer]["refused"] = said(reason)
                self._synchronize()
                continue
            try:
                ways.append(self._way(peer, "graph", [self._captured(call) for call in calls]))
            except Exception as reason:
                answers[peer]["no graph"] = said(reason)
                self._synchronize()
        samples: list[list[float]] = [[] for _ in ways]
        for repeat in range(repeats if ways else 0):
            for i in range(len(ways)):
                i = (i + repeat) % len(ways)
                samples[i].append(self.clock.seconds(ways[i].calls, ways[i].n))
            if time.monotonic() > end and repeat + 1 >= FEWEST_REPEATS:
                break
        for way, found in zip(ways, samples, strict=True):
            answers[way.peer][way.kind] = summary(found)
        answers["sets"] = len(sets)
        ways.clear()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return answers

    def _sets(self, case: Case) -> list[Tensors]:
        """Inputs: several where one would stay in the cache."""
        first = gpu_cases.tensors(case, self.device, 0)
        size = sum(x.nbytes for x in first.inputs.values()) + (
            first.state.nbytes if case.task == "step" else 0
        )
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.device == "cuda" else 0
        more = 3 if size < 4 * cache else 0
        return [first, *(gpu_cases.tensors(case, self.device, seed) for seed in range(1, more + 1))]

    def _call(self, case: Case, peer: str, x: Tensors) -> Call:
        """What is timed."""
        if case.task == "step":
            step = self.peers[peer].step(case)
            return no_grad(lambda: step(x))
        scan = self.peers[peer].scan(case)
        if case.task == "forward":
            return no_grad(lambda: scan(x, False))
        leaves = [array.requires_grad_() for array in x.inputs.values()]
        return lambda: torch.autograd.grad(scan(x, False)[0], leaves, x.do)

    def _results(self, case: Case, peer: str, x: Tensors, dstate: Tensor) -> dict[str, Tensor]:
        leaves = {name: array.requires_grad_() for name, array in x.inputs.items()}
        o, state = self.peers[peer].scan(case)(x, True)
        outputs, incoming = ([o], [x.do]) if state is None else ([o, state], [x.do, dstate])
        gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
        results = {"o": o, **{f"d{name}": d for name, d in zip(leaves, gradients, strict=True)}}
        if state is None:  # its gradients are then others than the exact ones
            return {"o": o}
        return {**results, "final_state": state}

    def _warm(self, calls: list[Call]) -> None:
        for call in [calls[0], *calls]:
            call()
        self._synchronize()

    def _captured(self, call: Call) -> Call:
        """A call as a graph; in a dry run it stays what it is."""
        if self.device != "cuda":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        self._synchronize()
        return graph.replay

    def _way(self, peer: str, kind: str, calls: list[Call]) -> Way:
        seconds = max(self.clock.seconds(calls, len(calls)), 1e-7)
        n = min(max(round(SAMPLE_SECONDS / seconds), 1), MOST_CALLS)
        return Way(peer, kind, calls, -(-n // len(calls)) * len(calls))

    def _median(self, calls: list[Call], n: int) -> float:
        self._warm(calls)
        return statistics.median(self.clock.seconds(calls, n) for _ in range(10))

    def _poison(self) -> None:
        """Fill the memory that results will be made in: an element that is not written then shows."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            for floats in (2**26, 2**18):
                torch.full((floats,), float("nan"), device="cuda")

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _use_configurations(self) -> None:
        if "fla" in self.peers and self.device == "cuda" and self.configurations.exists():
            heads = tuple(sorted({case.H for case in gpu_cases.timed(False)}))
            choose_configurations(json.loads(self.configurations.read_text()), heads)


def no_grad(call: Call) -> Call:
    """The call without a record for gradients."""
    return torch.no_grad()(call)


def exact_results(case: Case, x: Tensors, dstate: Tensor) -> dict[str, np.ndarray]:
    """Results and gradients of this library's float64 on the CPU, of the same inputs."""

    def array(t: Tensor | None) -> np.ndarray | None:
        return None if t is None else t.detach().double().cpu().numpy()

    function = fwp.delta_rule if case.rule == "delta" else fwp.linear_attention
    inputs = [array(getattr(x, name)) for name in ("q", "k", "v", "beta", "g")]
    (o, state), pullback = fwp.vjp(function, *inputs, scale=case.scale)
    gradients = pullback(array(x.do), array(dstate))._asdict()
    return {"o": o, "final_state": state, **{name: d for name, d in gradients.items() if d is not None}}


def relative_error(x: Tensor, exact: np.ndarray) -> float:
    """|x - exact| / |exact|; infinite where x is not finite."""
    error = np.linalg.norm(x.detach().double().cpu().numpy() - exact) / np.linalg.norm(exact)
    return float(error) if np.isfinite(error) else float("inf")


def summary(seconds: list[float]) -> Answer:
    """Median and spread, and how many there were."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median": statistics.median(seconds),
        "best": min(seconds),
        "quartiles": [low, high],
        "repeats": len(seconds),
    }


def said(reason: Exception) -> str:
    """An exception in one line."""
    if isinstance(reason, Unsupported):
        return str(reason)
    traceback.print_exception(reason)
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"


def usable(device: str) -> bool:
    """Whether the GPU still answers."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def serve(device: str, configurations: str, requests: Any, answers: Any) -> None:
    """Answer until there are no more requests. What goes wrong is an answer too: {"refused": reason}."""
    server = None

    def answer(work: Callable[[], Answer]) -> None:
        try:
            reply = work()
        except Exception as reason:
            reply = {"refused": said(reason)}
        print(json.dumps(reply), file=answers, flush=True)

    def hello() -> Answer:
        nonlocal server
        server = Server(device, configurations)
        return server.hello()

    answer(hello)
    for line in requests:
        request = json.loads(line)
        if "case" in request:
            request["case"] = Case(**request["case"])
        answer(lambda request=request: getattr(server, request.pop("do"))(**request))
        if not usable(device):
            sys.exit("the GPU does not answer any more")


if __name__ == "__main__":
    # What a library prints belongs on stderr; the answers keep the real stdout.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.argv[1], sys.argv[2], sys.stdin, answers)
