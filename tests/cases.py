"""One call of a scan with all its arrays, and how the library and the oracle compute it."""

from dataclasses import dataclass, fields, replace

import ml_dtypes
import numpy as np
import oracle

import fwp_core as fwp

RULES = oracle.RULES
DECAYS = ("none", "scalar", "channel")
PRECISE = (np.float32, np.float64)
HALVES = (np.float16, ml_dtypes.bfloat16)
DTYPES = PRECISE + HALVES
# Gates that occur (mild), that grow the state (positive), and that forget within a token.
GATES = ("mild", "positive", "strong", "reset", "mixed")
STRONG = np.array([-5.0, -20.0, -1e4, -np.inf])

SCAN = {"linear": fwp.linear_attention, "delta": fwp.delta_rule}
BACKWARD = {"linear": fwp.linear_attention_backward, "delta": fwp.delta_rule_backward}
STEP = {"linear": fwp.linear_attention_step, "delta": fwp.delta_rule_step}


@dataclass(frozen=True, repr=False)
class Case:
    """The arrays of one forward call, and the gradients that come in when it is differentiated."""

    rule: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray | None
    g: np.ndarray | None
    initial_state: np.ndarray | None
    do: np.ndarray
    dfinal_state: np.ndarray | None
    cu_seqlens: np.ndarray | None = None
    scale: float = 1.0

    @property
    def inputs(self):
        return self.q, self.k, self.v, self.beta, self.g

    @property
    def options(self):
        return {"scale": self.scale, "initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens}

    @property
    def arrays(self):
        """Every array of floating point numbers that is present, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, np.ndarray) and name != "cu_seqlens"}

    @property
    def sizes(self):
        """(N, T, H, K, V)"""
        n = self.v.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return n, self.v.shape[1], self.do.shape[2], self.k.shape[3], self.v.shape[3]

    @property
    def state_dtype(self):
        return state_dtype(self.v.dtype)

    def but(self, **changes):
        return replace(self, **changes)

    def map(self, change):
        """The case with every array x replaced by change(x)."""
        return replace(self, **{name: change(x) for name, x in self.arrays.items()})

    def __repr__(self):
        shapes = {name: x.shape for name, x in self.arrays.items()}
        packed = None if self.cu_seqlens is None else list(self.cu_seqlens)
        return f"Case({self.rule}, {self.q.dtype}, {shapes}, cu_seqlens={packed}, scale={self.scale})"


def state_dtype(dtype):
    """Of states, and of the sums behind every result."""
    return np.float64 if dtype == np.float64 else np.float32


def make_case(
    rule="delta",
    decay="none",
    *,
    B=2,
    T=13,
    heads=(2, 2, 2),
    K=16,
    V=16,
    dtype=np.float32,
    gate_dtype=None,
    gate="mild",
    beta=True,
    state=True,
    lengths=None,
    scale=1.0,
    seed=0,
):
    """Random arrays with unit keys; heads are (Hq, Hk, Hv), lengths those of packed sequences (B = 1)."""
    rng = np.random.default_rng(seed)
    if lengths is not None:
        B, T = 1, sum(lengths)
    H, N = max(heads), B if lengths is None else len(lengths)
    gate_dtype = gate_dtype or dtype

    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape).astype(dtype)

    q, k, v = (normal(B, T, h, n) for h, n in zip(heads, (K, K, V), strict=True))
    with_beta = beta or rule == "delta"
    return Case(
        rule=rule,
        q=q,
        k=unit(k.astype(state_dtype(dtype))).astype(dtype),
        v=v,
        beta=rng.uniform(0, 1, (B, T, H)).astype(gate_dtype) if with_beta else None,
        g=make_gate(decay, gate, (B, T, H, K), rng).astype(gate_dtype) if decay != "none" else None,
        initial_state=normal(N, H, K, V, dtype=state_dtype(dtype)) if state else None,
        do=normal(B, T, H, V),
        dfinal_state=normal(N, H, K, V, dtype=state_dtype(dtype)) if state else None,
        cu_seqlens=None if lengths is None else np.cumsum([0, *lengths]),
        scale=scale,
    )


def unit(x):
    """Every row divided by its norm."""
    norm = np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True))
    return x / np.where(norm > 0, norm, 1).astype(x.dtype)


def make_gate(decay, kind, shape, rng):
    shape = shape if decay == "channel" else shape[:-1]
    mild = -np.exp(rng.normal(-2, 1, shape))
    if kind == "mild":
        return mild
    if kind == "positive":
        return rng.uniform(-0.1, 0.1, shape)
    if kind == "strong":
        return rng.choice(STRONG[:3], shape)
    if kind == "reset":
        return np.where(rng.random(shape) < 0.3, -np.inf, mild)
    return np.where(rng.random(shape) < 0.5, rng.choice(STRONG, shape), mild)


def scan(case, **options):
    """The library's (o, final_state)."""
    return SCAN[case.rule](*case.inputs, **case.options, **options)


def gradients(case, **options):
    """The library's Gradients."""
    return BACKWARD[case.rule](
        case.do, *case.inputs, dfinal_state=case.dfinal_state, **case.options, **options
    )


def exact_scan(case):
    """The oracle's (o, final_state)."""
    return oracle.forward(case.rule, *_wide(*case.inputs), **_wide_options(case))


def exact_gradients(case):
    """The oracle's Gradients."""
    do, dfinal_state = _wide(case.do, case.dfinal_state)
    return oracle.backward(
        case.rule, do, *_wide(*case.inputs), dfinal_state=dfinal_state, **_wide_options(case)
    )


def _wide_options(case):
    return {**case.options, "initial_state": _wide(case.initial_state)[0]}


def _wide(*arrays):
    return [None if x is None else x.astype(np.result_type(x, np.float64)) for x in arrays]
