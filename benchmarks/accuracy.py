"""Accuracy against float64 by length and dtype: ``python benchmarks/accuracy.py``, a minute or two.

Each number is |x - exact| / |exact| in L2 over the whole array. ``exact`` is the float64 call on the same
inputs, after they were rounded to the dtype: the table shows what computing in that dtype adds, not what
rounding the inputs costs. Gradients are those for random do and dfinal_state; the largest error of dq, dk,
dv, dbeta and dg stands for all.
"""

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np

import fwp_core as fwp

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
LENGTHS = tuple(4**n for n in range(4, 9))
SCANS = {
    "linear": (fwp.linear_attention, False),
    "delta": (fwp.delta_rule, False),
    "delta, gated": (fwp.delta_rule, True),
}
HEADS, SIZE = 2, 64


def inputs(T, gated):
    """Unit keys, strengths in (0, 1), gates that forget over some hundred tokens; do and dfinal_state."""
    rng = np.random.default_rng(T)
    q, k, v, do = rng.standard_normal((4, 1, T, HEADS, SIZE))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(size=(1, T, HEADS))
    g = -np.exp(rng.normal(-5, 1, (1, T, HEADS))) if gated else None
    return [q, k, v, beta, g], do, rng.standard_normal((1, HEADS, SIZE, SIZE))


def results(scan, arrays, do, dfinal_state):
    (o, final_state), pullback = fwp.vjp(scan, *arrays)
    dq, dk, dv, dbeta, dg, _ = pullback(do, dfinal_state.astype(final_state.dtype))
    return {"o": [o], "final_state": [final_state], "gradients": [dq, dk, dv, dbeta, dg]}


def relative_error(x, exact):
    return float(np.linalg.norm(x.astype(np.float64) - exact) / np.linalg.norm(exact))


def errors(scan, gated, T, dtype):
    """The error of every kind of result."""
    arrays, do, dfinal_state = inputs(T, gated)
    arrays = [None if x is None else x.astype(dtype) for x in arrays]
    do = do.astype(dtype)
    computed = results(scan, arrays, do, dfinal_state)
    wide = [None if x is None else x.astype(np.float64) for x in arrays]
    exact = results(scan, wide, do.astype(np.float64), dfinal_state)
    return {
        kind: max(
            relative_error(x, y) for x, y in zip(computed[kind], exact[kind], strict=True) if y is not None
        )
        for kind in computed
    }


def table(lengths):
    kinds = ("o", "final_state", "gradients")
    yield (
        "| scan | T | "
        + " | ".join(f"{kind}, {np.dtype(dtype)}" for kind in kinds for dtype in DTYPES)
        + " |"
    )
    yield "|---" * (2 + len(kinds) * len(DTYPES)) + "|"
    for name, (scan, gated) in SCANS.items():
        for T in lengths:
            found = [errors(scan, gated, T, dtype) for dtype in DTYPES]
            yield f"| {name} | {T} | " + " | ".join(f"{e[kind]:.1e}" for kind in kinds for e in found) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file to write the table to as well")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="the longest sequence")
    arguments = parser.parse_args()
    lines = [f"Relative error in L2 against float64 (level {fwp.isa()}, {HEADS} heads, K = V = {SIZE}).", ""]
    print(*lines, sep="\n")
    for line in table([T for T in LENGTHS if arguments.longest >= T]):
        print(line, flush=True)
        lines.append(line)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
