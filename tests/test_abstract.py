"""Arrays without memory: what a tracing framework asks before it calls."""

import cases
import numpy as np
import pytest
from cases import DTYPES, make_case

import fwp_core as fwp
from fwp_core import _core


def abstract(x):
    return None if x is None else _core.AbstractArray(x.shape, x.dtype.name)


def described(x):
    return None if x is None else (tuple(x.shape), str(x.dtype))


def options(case):
    spec = case.feature_map
    phi = cases.library_map(spec)
    if cases.is_favor(spec):
        phi = _core.FeatureMap(5, 0, 0.0, abstract(spec[1]))
    return phi, case.qk_norm, case.attention_norm, case.eps, case.scale


CASES = [
    {},
    {"heads": (2, 1, 4), "decay": "channel"},
    {"lengths": (3, 0, 9)},
    {"feature_map": ("FAVOR", 5), "qk_norm": "sum"},
    {"feature_map": ("DPFP", 2), "attention_norm": True, "state": False},
    {"B": 10**6, "T": 0, "K": 0},
    *[{"dtype": dtype} for dtype in DTYPES],
]


@pytest.mark.parametrize("rule", ["linear_attention", "delta_rule"])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_results_are_described(rule, settings):
    case = make_case("delta", **settings)
    given = [abstract(x) for x in case.inputs]
    rest = (*options(case), abstract(case.initial_state), case.cu_seqlens)
    o, final_state, checkpoints = getattr(_core, rule)(*given, *rest, None, None, True)
    real = cases.scan(case.but(rule="delta" if rule == "delta_rule" else "linear"))
    assert [described(o), described(final_state)] == [described(x) for x in real]
    assert checkpoints.dtype == final_state.dtype
    found = getattr(_core, f"{rule}_backward")(
        abstract(case.do), *given, abstract(case.dfinal_state), None, *rest, None
    )
    assert [described(x) for x in found] == [described(x) for x in (*case.inputs, case.initial_state)]


def test_steps_and_maps_are_described():
    case = make_case("delta", T=1).at(0)
    given = [abstract(x) for x in case.inputs]
    state = _core.AbstractArray((4, 2, 16, 16), "float32")
    o = _core.delta_rule_step(*given, state, [3, 0], *options(case), None)
    assert described(o) == ((2, 2, 16), "float32")
    with pytest.raises(fwp.ArgumentError, match="slots from 0 to S-1=3"):
        _core.delta_rule_step(*given, state, [4, 0], *options(case), None)
    phi = fwp.feature_maps.DPFP(2)
    x = _core.AbstractArray((7, 5, 3), "bfloat16")
    y = _core.feature_forward(phi, x)
    assert described(y) == ((7, 5, 12), "bfloat16")
    assert described(_core.feature_backward(phi, y, x)) == ((7, 5, 3), "bfloat16")
    with pytest.raises(fwp.ShapeError, match="dy: expected shape"):
        _core.feature_backward(phi, x, x)


def test_sizes_beyond_all_memory():
    rest = (None, None, None, None, False, 0.0, 1.0, None, None, None, None, False)
    huge = _core.AbstractArray((2**20, 2**20, 8, 64), "float32")
    result = _core.linear_attention(huge, huge, huge, *rest)
    assert described(result[0]) == (huge.shape, "float32")
    huge = _core.AbstractArray((2**40, 2**40, 8, 64), "float32")
    with pytest.raises(fwp.ArgumentError, match="at most 2\\^55 elements"):
        _core.linear_attention(huge, huge, huge, *rest)


def test_they_meet_no_array_with_memory():
    x, y = np.ones((1, 2, 1, 3), np.float32), _core.AbstractArray((1, 2, 1, 3), "float32")
    rest = (None, None, None, False, 0.0, 1.0, None, None, None, None, False)
    for arrays in ((x, y, x), (y, x, y), (x, x, y)):
        with pytest.raises(fwp.DTypeError):
            _core.linear_attention(*arrays, None, *rest)
    phi = _core.FeatureMap(5, 0, 0.0, _core.AbstractArray((2, 3), "float32"))
    with pytest.raises(fwp.DTypeError, match="projection"):
        _core.linear_attention(x, x, x, None, None, phi, *rest[2:])
    with pytest.raises(fwp.DTypeError, match="projection"):
        _core.feature_forward(phi, x)
    with pytest.raises(fwp.DTypeError, match="q: expected dtype float32, .*, got int32"):
        _core.linear_attention(_core.AbstractArray((1, 2, 1, 3), "int32"), y, y, None, *rest)
