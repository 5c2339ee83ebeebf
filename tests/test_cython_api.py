"""The Cython interface: its signatures never change, and its functions compute what the Python ones do.

The functions are called as a downstream module calls them: through the pointers in __pyx_capi__.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from tolerances import assert_bits_equal

import fwp_core as fwp
from fwp_core import cython_api

CAPI = cython_api.__pyx_capi__
SIGNATURES = Path(__file__).parent / "cython_api_signatures.txt"
CTYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "int": ctypes.c_int}
RULES = ["linear_attention", "delta_rule"]
DTYPES = [("f32", np.float32), ("f64", np.float64)]

_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def signature(name):
    return _name(CAPI[name]).decode()


def pointer(name, restype, *argtypes):
    return ctypes.CFUNCTYPE(restype, *argtypes)(_pointer(CAPI[name], signature(name).encode()))


def function(name):
    """The C function as a callable of numbers and of arrays or None."""
    result, _, arguments = signature(name).partition(" (")
    argtypes = [CTYPES.get(a, ctypes.c_void_p) for a in arguments.rstrip(")").split(", ")]
    call = pointer(name, CTYPES[result], *argtypes)
    return lambda *args: call(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in args))


def last_error():
    return pointer("last_error", ctypes.c_char_p)().decode()


def test_signatures_are_those_released():
    assert [f"{name}: {signature(name)}" for name in sorted(CAPI)] == SIGNATURES.read_text().splitlines()


class Problem:
    """Arrays of one scan, and of one step if T is left out."""

    B, H, K, V = 2, 3, 5, 4

    def __init__(self, dtype, T=None, decay="none", rule="delta_rule"):
        rng = np.random.default_rng(0)
        lead = (self.B, self.H) if T is None else (self.B, T, self.H)

        def draw(*shape):
            return rng.uniform(-1, 1, shape).astype(dtype)

        self.q, self.k, self.v = draw(*lead, self.K), draw(*lead, self.K), draw(*lead, self.V)
        self.beta = abs(draw(*lead)) if rule == "delta_rule" else None
        self.G = self.K if decay == "channel" else 1
        gates = {"none": None, "scalar": -abs(draw(*lead)), "channel": -abs(draw(*lead, self.K))}
        self.g = gates[decay]
        self.state = draw(self.B, self.H, self.K, self.V)
        self.do, self.dfinal_state = draw(*lead, self.V), draw(self.B, self.H, self.K, self.V)
        sizes = [self.B, self.H, self.K, self.V] if T is None else [self.B, T, self.H, self.K, self.V]
        self.sizes = (*sizes, self.G, 0.5)
        self.inputs = self.q, self.k, self.v, self.beta, self.g


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_forward(rule, suffix, dtype, decay):
    p = Problem(dtype, 7, decay, rule)
    o, final_state = np.full_like(p.v, np.nan), np.full_like(p.state, np.nan)
    assert function(f"{rule}_fwd_{suffix}")(*p.sizes, *p.inputs, p.state, o, final_state) == 0, last_error()
    expected = getattr(fwp, rule)(*p.inputs, scale=0.5, initial_state=p.state)
    assert_bits_equal(o, expected[0], "o")
    assert_bits_equal(final_state, expected[1], "final_state")


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_backward(rule, suffix, dtype, decay):
    p = Problem(dtype, 7, decay, rule)
    wanted = (*p.inputs, p.state)
    gradients = [None if x is None else np.full_like(x, np.nan) for x in wanted]
    arguments = (*p.sizes, *wanted, p.do, p.dfinal_state, *gradients)
    assert function(f"{rule}_bwd_{suffix}")(*arguments) == 0, last_error()
    expected = getattr(fwp, f"{rule}_backward")(
        p.do, *p.inputs, dfinal_state=p.dfinal_state, scale=0.5, initial_state=p.state
    )
    for name, actual, exact in zip(expected._fields, gradients, expected, strict=True):
        assert (actual is None) == (exact is None), name
        if exact is not None:
            assert_bits_equal(actual, exact, name)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_step(rule, suffix, dtype, decay):
    p = Problem(dtype, None, decay, rule)
    state, expected_state, o = p.state.copy(), p.state.copy(), np.full_like(p.v, np.nan)
    assert function(f"{rule}_step_{suffix}")(*p.sizes, *p.inputs, state, o) == 0, last_error()
    expected = getattr(fwp, f"{rule}_step")(*p.inputs, state=expected_state, scale=0.5)
    assert_bits_equal(o, expected, "o")
    assert_bits_equal(state, expected_state, "state")


def test_outputs_that_are_not_wanted_are_left_out():
    p = Problem(np.float64, 7)
    o, dk = np.full_like(p.v, np.nan), np.full_like(p.k, np.nan)
    assert function("delta_rule_fwd_f64")(*p.sizes, *p.inputs, None, o, None) == 0, last_error()
    assert_bits_equal(o, fwp.delta_rule(*p.inputs, scale=0.5)[0])
    outputs = (None, dk, None, None, None, None)
    assert function("delta_rule_bwd_f64")(*p.sizes, *p.inputs, None, p.do, None, *outputs) == 0, last_error()
    assert_bits_equal(dk, fwp.delta_rule_backward(p.do, *p.inputs, scale=0.5).dk)


def test_errors_come_back_as_codes_with_a_message():
    p = Problem(np.float64, 7)
    o = p.v.copy()
    assert function("delta_rule_fwd_f64")(*p.sizes, p.q, p.k, p.v, None, None, None, o, None) != 0
    assert "beta" in last_error()
    assert function("delta_rule_fwd_f64")(*p.sizes, *p.inputs, None, p.v, None) != 0  # o over v
    assert "o" in last_error()
    assert_bits_equal(o, p.v)
