"""The machine through NumPy: SGEMM of its BLAS, and memory bandwidth."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from registry import Case

from . import Prepared

PACKAGES = ("numpy",)

_threads = 1


def start(threads: int) -> None:
    """BLAS took its threads from the environment; the streams are split by hand."""
    global _threads
    _threads = threads


def prepare(case: Case) -> Prepared:
    """C = A B of size T, or a[i] = b[i], or a[i] = b[i] + c[i], on arrays that exist and are touched."""
    rng = np.random.default_rng(0)
    if case.rule == "sgemm":
        a, b = rng.random((2, case.T, case.T), np.float32)
        product = np.zeros_like(a)
        return Prepared(partial(np.matmul, a, b, out=product), lambda: {"o": product})

    b, c = rng.random((2, case.T), np.float32)
    a = np.zeros_like(b)
    parts = [slice(case.T * i // _threads, case.T * (i + 1) // _threads) for i in range(_threads)]
    pool = ThreadPoolExecutor(_threads)

    def copy(part: slice) -> None:
        np.copyto(a[part], b[part])

    def add(part: slice) -> None:
        np.add(b[part], c[part], out=a[part])

    work = copy if case.rule == "copy" else add
    return Prepared(lambda: list(pool.map(work, parts)), lambda: {"o": a})
