"""What a call costs besides its arithmetic: a tiny problem through JAX, jitted or not, in microseconds.

python benchmarks/jax_call.py [--calls 3000]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import fwp_core as fwp


def median(call: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(calls + calls // 10 + 1):  # the first tenth warms up, the first of all compiles
        start = time.perf_counter_ns()
        jax.block_until_ready(call())
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times[calls // 10 + 1 :]) / 1000


def measure(T: int, calls: int) -> dict[str, float]:
    """The delta rule with B = H = 1, K = V = 4, on one thread."""
    q, k, v, token = jax.random.normal(jax.random.key(0), (4, 1, T, 1, 4))
    inputs = (q, k, v, jnp.abs(token[..., 0]))
    gradient = jax.grad(lambda *x: jnp.sum(fwp.delta_rule(*x)[0]), argnums=(0, 1, 2, 3))
    step = jax.jit(lambda inputs, state: fwp.delta_rule_step(*inputs, state=state), donate_argnums=1)
    jitted, jitted_gradient, nothing = map(jax.jit, (fwp.delta_rule, gradient, lambda *x: x[0] + 1))
    state = jnp.zeros((1, 1, 4, 4))

    def donated() -> object:
        nonlocal state
        o, state = step(inputs, state)
        return o, state

    return {
        "jit: an addition": median(lambda: nothing(*inputs), calls),
        "jit: forward": median(lambda: jitted(*inputs), calls),
        "jit: gradient": median(lambda: jitted_gradient(*inputs), calls),
        "jit: donated step": median(donated, calls),
        "eager: forward": median(lambda: fwp.delta_rule(*inputs), calls),
        "eager: gradient": median(lambda: gradient(*inputs), calls),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    calls = parser.parse_args(argv).calls
    with fwp.threads(1):
        for T in (1, 4):
            for name, microseconds in measure(T, calls).items():
                print(f"T = {T}  {name:<18}{microseconds:8.1f} us")


if __name__ == "__main__":
    main()
