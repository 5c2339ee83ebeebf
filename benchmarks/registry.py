"""The cases: what is measured, what it is credited with, its inputs, and its exact results.

A case is one call of one operation. All its arrays follow from its fields and fixed seeds, so that every
process makes the same ones. Exact results come from tests/oracle.py: float64, token by token, written
independently of the library and of every peer.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import oracle
from oracle_features import DPFP
from tolerances import ROUNDING, relative_error

from fwp_core.reference import softmax_attention

Array = npt.NDArray[Any]

FAST_WEIGHT_RULES = ("linear", "delta")
TASKS = ("forward", "forward+backward", "step")

# Credited flops per token and head in units of K*V, the sequential count. What a method does beyond it
# (recomputed states, decay, the blocks' own systems) earns nothing.
FORWARD_FLOPS = {"linear": 4, "delta": 6}
BACKWARD_FLOPS = {"linear": 10, "delta": 16}
# Float32 arrays that pass through memory, in units of the array.
STREAMS = {"copy": 2, "add": 3}

# Relative L2 errors above which a participant is refused. The library's own tests are stricter; this only
# asks whether all compute the same function in single precision.
TOLERANCE = {"forward": 1e-5, "forward+backward": 1e-4, "step": 1e-5}
# What is compared: the first and last sequence and head, and in a forward pass the first tokens, which do not
# depend on the later ones.
CHECKED_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    rule is "linear" or "delta" (with decay "none", "scalar" or "channel"), "softmax", or one of the
    yardsticks "sgemm" (T^3), "copy" and "add" (T floats). In a step T is 1. query_heads: heads of q and k, if
    fewer than H. nu: q and k pass through DPFP-nu and the sum norm, 0 for neither.
    """

    rule: str
    task: str = "forward"
    decay: str = "none"
    B: int = 1
    T: int = 1
    H: int = 1
    K: int = 1
    V: int = 1
    query_heads: int = 0
    nu: int = 0
    dtype: str = "float32"  # of all arrays but states
    every_thread_count: bool = False  # measured at every thread count asked for, not at the largest only
    alone: bool = False  # too large to ask the peers

    @property
    def name(self) -> str:
        """What --cases matches, like delta-scalar/forward/T4096-H8-K64."""
        if self.rule not in (*FAST_WEIGHT_RULES, "softmax"):
            return f"{self.rule}/{self.T}"
        rule = self.rule if self.decay == "none" else f"{self.rule}-{self.decay}"
        rule += f"-dpfp{self.nu}" if self.nu else ""
        batch = f"B{self.B}-" if self.B > 1 else ""
        time = f"T{self.T}-" if self.task != "step" else ""
        grouped = f"-q{self.query_heads}" if self.query_heads else ""
        value = f"-V{self.V}" if self.V != self.K else ""
        dtype = f"-{self.dtype}" if self.dtype != "float32" else ""
        return f"{rule}/{self.task}/{batch}{time}H{self.H}{grouped}-K{self.K}{value}{dtype}"

    @property
    def features(self) -> int:
        """K of the states: the key size, or the number of features that a map makes of it."""
        return 2 * self.K * self.nu or self.K

    @property
    def limit(self) -> str:
        """What bounds this case: "fma" or "bandwidth"."""
        return "bandwidth" if self.task == "step" or self.rule in STREAMS else "fma"

    @property
    def credit(self) -> float:
        """Credited work: flops, or bytes where memory is the limit."""
        if self.rule in STREAMS:
            return 4.0 * STREAMS[self.rule] * self.T
        if self.rule == "sgemm":
            return 2.0 * self.T**3
        if self.task == "step":
            return 4.0 * 2 * self.B * self.H * self.features * self.V  # the state, read and written
        rows = self.B * self.T * self.H
        if self.rule == "softmax":
            return rows * (self.T + 1) / 2 * 2 * (self.K + self.V)  # scores and sums, the causal half
        flops = FORWARD_FLOPS[self.rule]
        if self.task == "forward+backward":
            flops += BACKWARD_FLOPS[self.rule]
        return float(flops * self.features * self.V * rows)

    @property
    def scale(self) -> float:
        """1 / sqrt(K), which several peers cannot be talked out of."""
        return float(self.K**-0.5)

    @property
    def tolerance(self) -> float:
        """The relative error above which a participant is refused; half precisions round once."""
        return TOLERANCE[self.task] + ROUNDING.get(np.dtype(self.dtype), 0.0)

    @property
    def array_bytes(self) -> int:
        """Bytes of the inputs and outputs, and of do and the gradients where there is a backward pass."""
        rows = self.B * self.T
        key = rows * (self.query_heads or self.H) * self.K
        value = rows * self.H * self.V
        gate = rows * self.H * {"none": 0, "scalar": 1, "channel": self.features}[self.decay]
        beta = rows * self.H if self.rule == "delta" else 0
        state = self.B * self.H * self.features * self.V
        passes = 2 if self.task == "forward+backward" else 1
        return np.dtype(self.dtype).itemsize * passes * (2 * key + 2 * value + gate + beta) + 4 * state

    def tiny(self) -> Case:
        """The same operation at a size that takes no time."""
        cap = {"T": 4096 if self.rule in STREAMS else 64, "B": 2, "H": 2, "K": 32, "V": 32, "query_heads": 1}
        return replace(
            self, alone=False, **{name: min(getattr(self, name), most) for name, most in cap.items()}
        )


class Arrays:
    """Inputs of a case, made when first used: unit q and k, beta and exp(g) in (0, 1)."""

    def __init__(
        self, B: int, T: int, H: int, K: int, features: int, V: int, query_heads: int, dtype: str
    ) -> None:
        self.rows = (B, T, H)
        self.key_shape = (B, T, query_heads or H, K)
        self.sizes = (features, V)
        self.dtype = dtype

    q = cached_property(lambda self: aligned(_unit("q", self.key_shape), self.dtype))
    k = cached_property(lambda self: aligned(_unit("k", self.key_shape), self.dtype))
    v = cached_property(lambda self: aligned(_normal("v", (*self.rows, self.sizes[1])), self.dtype))
    do = cached_property(lambda self: aligned(_normal("do", (*self.rows, self.sizes[1])), self.dtype))
    beta = cached_property(lambda self: aligned(_uniform("beta", self.rows), self.dtype))
    scalar = cached_property(lambda self: aligned(-_uniform("g", self.rows), self.dtype))
    channel = cached_property(lambda self: aligned(-_uniform("g", (*self.rows, self.sizes[0])), self.dtype))
    state = cached_property(
        lambda self: aligned(_normal("state", (self.rows[0], self.rows[2], *self.sizes)), "float32")
    )


@cache
def _arrays(*sizes: int | str) -> Arrays:
    return Arrays(*sizes)


def aligned(array: Array, dtype: npt.DTypeLike) -> Array:
    """A copy that starts with a cache line, as arrays of torch, JAX and this library's own cache do.

    NumPy's start 16 bytes later: neighbouring heads, and so two threads, then share a line of every row.
    """
    line, dtype = 64, np.dtype(dtype)
    memory = np.empty(array.size * dtype.itemsize + line, np.uint8)
    start = -memory.ctypes.data % line
    copy = memory[start : start + array.size * dtype.itemsize].view(dtype).reshape(array.shape)
    copy[...] = array
    return copy


@dataclass(frozen=True)
class Inputs:
    """What a case's operation takes; absent ones are None. A step has no T axis."""

    q: Array
    k: Array
    v: Array
    beta: Array | None
    g: Array | None
    do: Array | None
    state: Array | None

    def values(self) -> list[Array | None]:
        """All fields in order, without the copies of dataclasses.astuple."""
        return [getattr(self, field.name) for field in fields(self)]


def inputs(case: Case) -> Inputs:
    """The arrays of a case, shared between cases of one shape: nobody may write into them."""
    x = _arrays(case.B, case.T, case.H, case.K, case.features, case.V, case.query_heads, case.dtype)
    step = case.task == "step"

    def token(array: Array) -> Array:
        return array[:, 0] if step else array

    return Inputs(
        token(x.q),
        token(x.k),
        token(x.v),
        token(x.beta) if case.rule == "delta" else None,
        token(getattr(x, case.decay)) if case.decay != "none" else None,
        x.do if case.task == "forward+backward" else None,
        x.state if step else None,
    )


def exact(case: Case) -> dict[str, Array]:
    """The checked part of the exact results: o; o, dq, dk, dv, dbeta, dg; or, for a step, o and state."""
    x = [
        None if array is None else checked(case, array).astype(np.float64) for array in inputs(case).values()
    ]
    head_axis = 1 if case.task == "step" else 2
    heads = [
        _exact_head(case, *(None if array is None else array.take([h], head_axis) for array in x))
        for h in range(x[2].shape[head_axis])
    ]
    return {name: np.concatenate([head[name] for head in heads], head_axis) for name in heads[0]}


def _exact_head(
    case: Case,
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array | None,
    do: Array | None,
    state: Array | None,
) -> dict[str, Array]:
    if case.rule == "softmax":
        return {"o": softmax_attention(q, k, v, scale=case.scale)}
    if case.task == "step":
        q, k, v, beta, g = (None if array is None else array[:, None] for array in (q, k, v, beta, g))
    options = {"scale": case.scale, **_features(case)}
    o, final_state = oracle.forward(case.rule, q, k, v, beta, g, initial_state=state, **options)
    if case.task == "step":
        return {"o": o[:, 0], "state": final_state}
    results = {"o": o}
    if case.task == "forward+backward":
        results |= _exact_gradients(case, do, q, k, v, beta, g)
    return results


def _features(case: Case) -> dict[str, Any]:
    return {"feature_map": DPFP(case.nu), "qk_norm": "sum"} if case.nu else {}


def _exact_gradients(case: Case, do: Array, *x: Array | None, tokens: int = 4096) -> dict[str, Array]:
    """By the oracle, which keeps every state of a call: a piece of the sequence at a time, from the last."""

    def piece(array: Array | None, start: int) -> Array | None:
        return None if array is None else array[:, start : start + tokens]

    starts = range(0, case.T, tokens)
    states: list[Array | None] = [None]
    for start in starts[:-1]:
        pieces = (piece(array, start) for array in x)
        _, state = oracle.forward(case.rule, *pieces, initial_state=states[-1], **_features(case))
        states.append(state)
    dstate, found = None, []
    for start in reversed(starts):
        gradients = oracle.backward(
            case.rule,
            piece(do, start),
            *(piece(array, start) for array in x),
            scale=case.scale,
            initial_state=states.pop(),
            dfinal_state=dstate,
            **_features(case),
        )._asdict()
        dstate = gradients.pop("dinitial_state")
        found.append({name: array for name, array in gradients.items() if array is not None})
    return {name: np.concatenate([part[name] for part in reversed(found)], 1) for name in found[0]}


def checked(case: Case, x: Array) -> Array:
    """What is compared of an input or result, heads equal: [B,H,...] in a step, else [B,T,H,...]."""
    x = x[_first_and_last(len(x))]
    if case.task == "step":
        return x.take(_first_and_last(case.H), 1)
    tokens = CHECKED_TOKENS if case.task == "forward" else case.T
    return x[:, :tokens].take(_first_and_last(case.H), 2)


def errors(case: Case, results: dict[str, Array], expected: dict[str, Array]) -> dict[str, float]:
    """Relative L2 error of each checked result; infinity where one is missing or not finite."""
    return {
        name: relative_error(checked(case, results[name]), array) if name in results else math.inf
        for name, array in expected.items()
    }


def _first_and_last(n: int) -> list[int]:
    return sorted({0, n - 1})


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def _normal(name: str, shape: tuple[int, ...]) -> Array:
    return _rng(name).standard_normal(shape, np.float32)


def _uniform(name: str, shape: tuple[int, ...]) -> Array:
    return _rng(name).random(shape, np.float32)


def _unit(name: str, shape: tuple[int, ...]) -> Array:
    x = _normal(name, shape)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


# The groups of cases.


def _main() -> list[Case]:
    cases = [Case("sgemm", T=1024, every_thread_count=True)]
    cases += [Case(rule, T=2**25, every_thread_count=True) for rule in STREAMS]
    rules = [
        ("delta", "none"),
        ("linear", "none"),
        ("delta", "scalar"),
        ("delta", "channel"),
        ("linear", "scalar"),
    ]
    for rule, decay in rules:
        for size in (64, 128):
            sizes = {"decay": decay, "H": 8, "K": size, "V": size}
            cases += [
                Case(rule, T=tokens, every_thread_count=tokens == 4096, **sizes) for tokens in (4096, 1024)
            ]
    for rule, decay in rules[:4]:
        for size in (64, 128):
            sizes = {"decay": decay, "H": 8, "K": size, "V": size}
            # With gates per channel, autograd through fla's reference keeps 6 GB and more at 4096 tokens.
            cases += [
                Case(rule, "forward+backward", T=tokens, alone=decay == "channel" and tokens > 1024, **sizes)
                for tokens in (4096, 1024)
            ]
    for dtype in ("bfloat16", "float16"):
        for task in TASKS[:2]:
            cases += [Case("delta", task, T=4096, H=8, K=64, V=64, dtype=dtype, alone=True)]
    cases += [Case("delta", T=65536, K=64, V=64, every_thread_count=True)]
    cases += [Case("softmax", T=tokens, H=8, K=64, V=64) for tokens in (4096, 1024)]
    cases += [Case("delta", T=16384, K=64, V=64, nu=3, every_thread_count=True)]
    for rule, decay in rules[:3]:
        cases += [Case(rule, "step", decay, H=32, K=128, V=128)]
    # 64 MiB of states, more than a cache
    cases += [Case("delta", "step", B=32, H=32, K=128, V=128), Case("delta", "step", B=128, H=32, K=64, V=64)]
    cases += [Case("delta", "step", K=64, V=64)]  # little but the call itself
    return cases


def _tokens() -> list[Case]:
    lengths = [4**n for n in range(5, 11)]
    # Exact gradients take the oracle minutes beyond 65536 tokens. Autograd through a loop over chunks costs
    # T^2: each chunk adds a gradient of the whole length.
    asked = {"forward": (lengths, 65536), "forward+backward": (lengths[:4], 16384)}
    cases = [
        Case("delta", task, T=tokens, H=2, K=64, V=64, alone=tokens > most)
        for task, (measured, most) in asked.items()
        for tokens in measured
    ]
    return cases + [Case("softmax", T=tokens, H=2, K=64, V=64) for tokens in lengths[:3]]


def _sizes() -> list[Case]:
    powers = [2**n for n in range(4, 10)]
    square = [(size, size) for size in powers]
    keys = [(size, 64) for size in powers]
    values = [(64, size) for size in powers]
    pairs = list(dict.fromkeys(square + keys + values))
    cases = [Case("delta", T=2048, H=8, K=K, V=V) for K, V in pairs]
    cases += [Case("linear", T=2048, H=8, K=K, V=V) for K, V in square]
    return cases + [Case("delta", "forward+backward", T=2048, H=8, K=K, V=V) for K, V in square]


def _threads() -> list[Case]:
    shapes = [(4096, 8, 64), (4096, 8, 128), (65536, 1, 64)]
    return [
        Case("delta", task, T=T, H=H, K=size, V=size, every_thread_count=True)
        for task in TASKS[:2]
        for T, H, size in shapes
    ]


def _memory() -> list[Case]:
    task, sizes = "forward+backward", {"K": 64, "V": 64}
    cases = [Case("delta", task, T=16384, **sizes), Case("delta", task, T=65536, alone=True, **sizes)]
    for changes in ({}, {"decay": "scalar"}, {"decay": "channel"}, {"query_heads": 2}):
        cases.append(Case("delta", task, T=65536, H=8, alone=True, **sizes, **changes))
    cases += [Case("linear", task, T=65536, H=8, alone=True, **sizes)]
    return cases + [Case("delta", T=16384, nu=3, **sizes)]


# main: the table. tokens, sizes, threads: curves. memory: extra memory in place of time.
GROUPS: dict[str, list[Case]] = {
    "main": _main(),
    "tokens": _tokens(),
    "sizes": _sizes(),
    "threads": _threads(),
    "memory": _memory(),
}
