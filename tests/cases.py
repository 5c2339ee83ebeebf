"""One call of a scan with all its arrays, and how the library and the oracle compute it."""

from dataclasses import dataclass, fields, replace

import ml_dtypes
import numpy as np
import oracle
import oracle_features

import fwp_core as fwp

RULES = oracle.RULES
DECAYS = ("none", "scalar", "channel")
PRECISE = (np.float32, np.float64)
HALVES = (np.float16, ml_dtypes.bfloat16)
DTYPES = PRECISE + HALVES
# Gates that occur (mild), that grow the state (positive), and that forget within a token.
GATES = ("mild", "positive", "strong", "reset", "mixed")
STRONG = np.array([-5.0, -20.0, -1e4, -np.inf])
# Feature maps as data, the name and its arguments, of which library and oracle each make their own. make_case
# draws a projection where there is the number of its rows.
MAPS = (("ReLU",), ("ELU1",), ("Softmax",), ("DPFP", 1), ("DPFP", 3), ("FAVOR", 5), ("FAVOR", 2, 1e-3))
NORMS = (None, "sum", "l2")

SCAN = {"linear": fwp.linear_attention, "delta": fwp.delta_rule}
BACKWARD = {"linear": fwp.linear_attention_backward, "delta": fwp.delta_rule_backward}
STEP = {"linear": fwp.linear_attention_step, "delta": fwp.delta_rule_step}
PER_TOKEN = ("q", "k", "v", "beta", "g", "do")


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
    feature_map: tuple | None = None
    qk_norm: str | None = None
    attention_norm: bool = False
    eps: float = 1e-6

    @property
    def inputs(self):
        return self.q, self.k, self.v, self.beta, self.g

    @property
    def options(self):
        """Of a scan."""
        return {"initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens, **self.step_options}

    @property
    def step_options(self):
        return {"scale": self.scale, **self.features(library_map)}

    def features(self, make_map):
        """Feature map and norms, as far as they are set."""
        values = {"feature_map": make_map(self.feature_map), "qk_norm": self.qk_norm}
        if self.attention_norm:
            values |= {"attention_norm": True, "eps": self.eps}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def arrays(self):
        """Every array of floating point numbers that is present, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, np.ndarray) and name != "cu_seqlens"}

    @property
    def state_shape(self):
        """[N,H,K,V], the last axis with z where there is one."""
        n = self.v.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        K = size_of_features(self.feature_map, self.k.shape[3])
        return n, self.do.shape[2], K, self.v.shape[3] + self.attention_norm

    def first_state(self):
        """A copy of the initial state, zeros where there is none."""
        state = np.zeros(self.state_shape, self.state_dtype)
        if self.initial_state is not None:
            state[...] = self.initial_state
        return state

    @property
    def state_dtype(self):
        return state_dtype(self.v.dtype)

    def but(self, **changes):
        return replace(self, **changes)

    def map(self, change):
        """The case with every array x replaced by change(x)."""
        return replace(self, **{name: change(x) for name, x in self.arrays.items()})

    def at(self, span):
        """The case restricted to a span of time, an index or slice of the T axis."""
        return self.but(**{name: x[:, span] for name, x in self.arrays.items() if name in PER_TOKEN})

    def __repr__(self):
        shapes = {name: x.shape for name, x in self.arrays.items()}
        packed = None if self.cu_seqlens is None else list(self.cu_seqlens)
        features = self.features(lambda spec: spec and tuple(getattr(x, "shape", x) for x in spec))
        return f"Case({self.rule}, {self.q.dtype}, {shapes}, {packed}, scale={self.scale}, {features})"


def library_map(feature_map):
    if feature_map is None:
        return None
    name, *arguments = feature_map
    return getattr(fwp.feature_maps, name)(*arguments)


def exact_map(feature_map):
    if feature_map is None:
        return None
    name, *arguments = feature_map
    return getattr(oracle_features, name)(*arguments)


def with_projection(feature_map, K, dtype, rng):
    """The map with a projection drawn where it is FAVOR with m rows."""
    if not is_favor(feature_map):
        return feature_map
    name, m, *more = feature_map
    return (name, rng.standard_normal((m, K)).astype(dtype), *more)


def is_favor(feature_map):
    return feature_map is not None and feature_map[0] == "FAVOR"


def size_of_features(feature_map, K):
    """The size K of states from that of keys."""
    return oracle_features.features(exact_map(feature_map)).value(np.zeros(K)).size


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
    feature_map=None,
    qk_norm=None,
    attention_norm=False,
    eps=1e-6,
    seed=0,
):
    """Random arrays; heads are (Hq, Hk, Hv), lengths those of packed sequences (B = 1).

    Keys are unit vectors, or what feature maps and norms take without losing digits. The strengths of the
    delta rule are such that states do not grow.
    """
    rng = np.random.default_rng(seed)
    if lengths is not None:
        B, T = 1, sum(lengths)
    H, N = max(heads), B if lengths is None else len(lengths)
    gate_dtype = gate_dtype or dtype
    wide = state_dtype(dtype)

    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape).astype(dtype)

    feature_map = with_projection(feature_map, K, wide, rng)
    phi = oracle_features.features(exact_map(feature_map), qk_norm)
    S = (N, H, size_of_features(feature_map, K), V + attention_norm)

    q, k, v = (normal(B, T, h, n) for h, n in zip(heads, (K, K, V), strict=True))
    if feature_map or qk_norm or attention_norm:
        positive = feature_map is None and (qk_norm == "sum" or attention_norm)
        q, k = (well_conditioned(x.astype(wide), feature_map, positive).astype(dtype) for x in (q, k))
    else:
        k = unit(k.astype(wide)).astype(dtype)
    beta = rng.uniform(0, 1, (B, T, H)) if beta or rule == "delta" else None
    if rule == "delta" and feature_map and not qk_norm and not attention_norm:
        beta /= np.max(np.sum(phi.value(k) ** 2, axis=-1), initial=1)
    case = Case(
        rule=rule,
        q=q,
        k=k,
        v=v,
        beta=None if beta is None else beta.astype(gate_dtype),
        g=make_gate(decay, gate, (B, T, H, S[2]), rng).astype(gate_dtype) if decay != "none" else None,
        initial_state=normal(*S, dtype=wide) if state else None,
        do=normal(B, T, H, V),
        dfinal_state=normal(*S, dtype=wide) if state else None,
        cu_seqlens=None if lengths is None else np.cumsum([0, *lengths]),
        scale=scale,
        feature_map=feature_map,
        qk_norm=qk_norm,
        attention_norm=attention_norm,
        eps=eps,
    )
    if state and attention_norm:
        z = case.initial_state[..., V]
        z[...] = 1 + np.abs(z)
    return case


def unit(x):
    """Every row divided by its norm."""
    norm = np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True))
    return x / np.where(norm > 0, norm, 1).astype(x.dtype)


def well_conditioned(x, feature_map, positive):
    """Rows whose features, sums and products are zero or of order one: no entry is below 1/2.

    Only FAVOR, whose features are exponentials of -|x|^2 / 2, has unit vectors.
    """
    x = unit(x) if is_favor(feature_map) else x + np.copysign(x.dtype.type(0.5), x)
    return np.abs(x) if positive else x


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


def vjp(case, **options):
    """The library's ((o, final_state), pullback)."""
    return fwp.vjp(SCAN[case.rule], *case.inputs, **case.options, **options)


def steps(case, state, **options):
    """All tokens of the case in one call of the library's step."""
    return STEP[case.rule](*case.inputs, state=state, **case.step_options, **options)


def step(case, t, state, **options):
    """Token t of the case, without a T axis."""
    return steps(case.at(t), state, **options)


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
    options = {"scale": case.scale, "cu_seqlens": case.cu_seqlens, **case.features(exact_map)}
    return {**options, "initial_state": _wide(case.initial_state)[0]}


def _wide(*arrays):
    return [None if x is None else x.astype(np.result_type(x, np.float64)) for x in arrays]
