"""What a call costs besides its arithmetic: a tiny problem through torch and through NumPy, in microseconds.

python benchmarks/torch_call.py [--calls 3000]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import fwp_core as fwp


def median(call: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(calls + calls // 10):  # the first tenth warms up
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times[calls // 10 :]) / 1000


def measure(T: int, calls: int) -> dict[str, float]:
    """The delta rule with B = H = 1, K = V = 4, all four inputs requiring a gradient, on one thread."""
    q, k, v = torch.randn(3, 1, T, 1, 4).unbind()
    inputs = [x.clone().requires_grad_() for x in (q, k, v, torch.rand(1, T, 1))]
    arrays = [x.detach().numpy() for x in inputs]
    do = torch.ones(1, T, 1, 4)

    def both() -> None:
        torch.autograd.backward(fwp.delta_rule(*inputs)[0], do)
        for x in inputs:
            x.grad = None

    def products() -> None:
        torch.autograd.backward(inputs[0] * inputs[1] * inputs[2], do)
        for x in inputs:
            x.grad = None

    def without_gradients() -> object:
        with torch.no_grad():
            return fwp.delta_rule(*inputs)

    return {
        "forward": median(lambda: fwp.delta_rule(*inputs), calls),
        "forward and backward": median(both, calls),
        "forward, no_grad": median(without_gradients, calls),
        "q * k * v and backward": median(products, calls),
        "NumPy: forward": median(lambda: fwp.delta_rule(*arrays), calls),
        "NumPy: vjp": median(lambda: fwp.vjp(fwp.delta_rule, *arrays)[1](do.numpy()), calls),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    calls = parser.parse_args(argv).calls
    torch.set_num_threads(1)
    with fwp.threads(1):
        for T in (1, 4):
            for name, microseconds in measure(T, calls).items():
                print(f"T = {T}  {name:<22}{microseconds:7.1f} us")


if __name__ == "__main__":
    main()
