"""fwp_core itself, and the machine's peak of fused multiply-adds at its instruction set level."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from registry import Array, Case, Inputs, aligned, inputs

import fwp_core as fwp
from fwp_core import _core

from . import Prepared

PACKAGES = ("fwp_core", "numpy")

SCAN: dict[str, Any] = {"linear": fwp.linear_attention, "delta": fwp.delta_rule}
STEP: dict[str, Any] = {"linear": fwp.linear_attention_step, "delta": fwp.delta_rule_step}


def start(threads: int) -> None:
    """Take this many threads, for the scans and for the peak."""
    fwp.set_num_threads(threads)
    fwp.isa()  # an FWP_ISA that this machine lacks ends here


def peak(seconds: float) -> float:
    """FMA rate in flop/s, all threads at once; each thread's is the best of many short loops."""
    threads = fwp.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        rates = list(pool.map(lambda _: _core.fma_peak("float32", seconds), range(threads)))
    return 1e9 * sum(rates)


def prepare(case: Case) -> Prepared:
    """The library's call with outputs given; full of NaN, they are touched, and an unwritten entry shows."""
    x = inputs(case)
    return {"forward": _forward, "forward+backward": _forward_backward, "step": _step}[case.task](case, x)


def _forward(case: Case, x: Inputs) -> Prepared:
    out = outputs(case)
    call = partial(SCAN[case.rule], x.q, x.k, x.v, x.beta, x.g, **options(case), **out)
    return Prepared(call, lambda: {"o": out["out"]})


def _forward_backward(case: Case, x: Inputs) -> Prepared:
    out = outputs(case)
    arrays = (x.q, x.k, x.v, x.beta, x.g, None)
    gradients = fwp.Gradients(*(None if array is None else _nan_like(array) for array in arrays))

    def call() -> None:
        _, pullback = fwp.vjp(SCAN[case.rule], x.q, x.k, x.v, x.beta, x.g, **options(case), **out)
        pullback(x.do, out=gradients)

    def results() -> dict[str, Array]:
        present = {name: array for name, array in gradients._asdict().items() if array is not None}
        return {"o": out["out"], **present}

    return Prepared(call, results)


def _nan_like(array: Array) -> Array:
    return aligned(np.broadcast_to(np.nan, array.shape), array.dtype)


def outputs(case: Case) -> dict[str, Array]:
    """The output and the final state as keyword arguments, full of NaN."""
    state = aligned(np.full((case.B, case.H, case.features, case.V), np.nan), "float32")
    return {"out": _nan_like(inputs(case).v), "final_state_out": state}


def feature_map(case: Case) -> fwp.feature_maps.FeatureMap | None:
    """DPFP, where the case has a map."""
    return fwp.feature_maps.DPFP(case.nu) if case.nu else None


def options(case: Case) -> dict[str, Any]:
    """The keyword arguments of every call; a map comes with the paper's sum norm."""
    return {"feature_map": feature_map(case), "qk_norm": "sum" if case.nu else None, "scale": case.scale}


def _step(case: Case, x: Inputs) -> Prepared:
    state, o = aligned(x.state, "float32"), _nan_like(x.v)
    call = partial(STEP[case.rule], x.q, x.k, x.v, x.beta, x.g, state=state, out=o, **options(case))
    return Prepared(call, lambda: {"o": o, "state": state})
