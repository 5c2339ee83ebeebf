"""A pool of states: sequence b has the state of slot state_indices[b], or none at -1."""

import array

import numpy as np
import pytest
from arguments import FUNCTIONS, accepted, good, refused
from cases import DECAYS, DTYPES, RULES, make_case, steps
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, cases, strided_last_axis
from tolerances import assert_bits_equal

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])
STEPS = pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if f.kind == "step"])


def make_pool(case, slots, seed=1):
    """States of any contents, NaN among them, which must not get anywhere."""
    shape = (slots, *case.state_shape[1:])
    pool = np.random.default_rng(seed).standard_normal(shape).astype(case.state_dtype)
    pool[::3] = np.nan
    return pool


def check_pool(case, pool, indices, given=None):
    """A call with slots is one call per sequence with its own state, and leaves all other slots alone."""
    before, out = pool.copy(), np.full_like(case.do, np.nan)
    assert steps(case, pool, state_indices=indices if given is None else given, out=out) is out
    for b, slot in enumerate(indices):
        if slot == -1:
            assert_bits_equal(out[b], np.zeros_like(out[b]))
            continue
        state = before[slot : slot + 1].copy()
        alone = case.map(lambda x, b=b: x[b : b + 1])
        assert_bits_equal(out[b : b + 1], steps(alone, state))
        assert_bits_equal(pool[slot : slot + 1], state)
    others = np.setdiff1d(np.arange(len(pool)), indices)
    assert pool[others].tobytes() == before[others].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 30])
@all_scans
def test_slots_in_any_order(isa, rule, decay, dtype, tokens):
    case = make_case(rule, decay, B=5, T=tokens, heads=(4, 2, 1), K=9, V=70, dtype=dtype)
    check_pool(case, make_pool(case, 8), [6, -1, 0, 7, -1])


@given(case=cases(lengths=None, times=(0, 1, 2, 7)), data=st.data())
def test_any_slots(isa, case, data):
    """Fewer slots than sequences, no slot at all, any order."""
    B = case.v.shape[0]
    slots = data.draw(st.integers(0, 6))
    order = data.draw(st.permutations(range(slots)))
    places = data.draw(st.lists(st.integers(0, max(B - 1, 0)), unique=True, max_size=min(B, slots)))
    indices = np.full(B, -1)
    indices[places] = order[: len(places)]
    check_pool(case, make_pool(case, slots), indices)


def test_a_step_of_one_token_has_slots_too(isa):
    case = make_case("delta", "scalar", B=3, T=1, K=16, V=40)
    pool, other = make_pool(case, 5), make_pool(case, 5)
    token = [None if x is None else x[:, 0] for x in case.inputs]
    o = fwp.delta_rule_step(*token, state=pool, state_indices=[4, -1, 2])
    assert_bits_equal(o[:, None], steps(case, other, state_indices=[4, -1, 2]))
    assert_bits_equal(pool, other)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not strided_last_axis])
def test_pools_in_any_layout(isa, layout):
    case = make_case("delta", "channel", B=3, T=4, K=9, V=70)
    check_pool(case, layout(make_pool(case, 5)), [3, -1, 1])


@pytest.mark.parametrize("kind", [list, tuple, np.int8, np.int32, np.int64, np.uint16, ">i8", "strided"])
def test_any_integers_are_slots(kind):
    case = make_case("delta", B=3, T=1, K=8, V=8)
    indices = [4, 0, 2]
    if kind == "strided":
        given = np.array([4, 9, 0, 9, 2, 9], np.int32)[::2]
    elif kind in (list, tuple):
        given = kind(indices)
    else:
        given = np.array(indices, kind)
    check_pool(case, make_pool(case, 5), indices, given)
    check_pool(case, make_pool(case, 5), indices, array.array("i", indices))


def test_threads_do_not_matter(isa):
    case = make_case("delta", "scalar", B=9, T=2, heads=(4, 2, 4), K=64, V=130)
    indices = [3, -1, 11, 0, 7, -1, 1, 2, 10]
    results = []
    for threads in range(1, 9):
        with fwp.threads(threads):
            pool = make_pool(case, 12)
            results.append((steps(case, pool, state_indices=indices), pool))
    for o, pool in results[1:]:
        assert_bits_equal(o, results[0][0])
        assert_bits_equal(pool, results[0][1])


@pytest.mark.parametrize("slots", [0, 1, 4])
def test_a_batch_of_padding(isa, slots):
    case = make_case("delta", B=3, T=2, K=8, V=40)
    check_pool(case, make_pool(case, slots), [-1, -1, -1])


def test_many_slots(isa):
    """More than one page of indices, in an order of no pattern."""
    case = make_case("linear", B=2000, T=1, heads=(1, 1, 1), K=2, V=3)
    check_pool(case, make_pool(case, 3000), np.random.default_rng(0).permutation(3000)[:2000])


# ---- errors: found before anything changes ----


BAD_VALUES = {
    "below -1": [0, -2],
    "beyond the pool": [0, 2],
    "twice": [1, 1],
    "large": [1 << 40, 0],
    "the smallest": [-(1 << 63), 0],
    "more than 64 bits": [1 << 64, 0],
}


@STEPS
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_bad_values(name, bad):
    message = refused(
        FUNCTIONS[name], good(FUNCTIONS[name]) | {"state_indices": BAD_VALUES[bad]}, fwp.ArgumentError
    )
    assert message.startswith("state_indices: expected ")


@STEPS
def test_bad_values_behind_a_strided_state(name):
    """The state is copied then, and must not be copied back."""
    arguments = good(FUNCTIONS[name])
    arguments["state"] = strided_last_axis(arguments["state"])
    refused(FUNCTIONS[name], arguments | {"state_indices": [1, 1]}, fwp.ArgumentError)
    accepted(FUNCTIONS[name], arguments | {"state_indices": [1, 0]})


@STEPS
def test_bad_kinds(name):
    for bad in (
        1,
        0.0,
        "01",
        b"\x00\x01",
        {0, 1},
        iter([0, 1]),
        [0, 1.0],
        [0, None],
        [False, 1],
        np.array([0.0, 1]),
    ):
        message = refused(FUNCTIONS[name], good(FUNCTIONS[name]) | {"state_indices": bad}, fwp.DTypeError)
        assert message.startswith("state_indices: ")


@STEPS
def test_bad_shapes(name):
    for bad in ([], [0], [0, 1, -1], np.array([[0, 1]]), np.array(0)):
        refused(FUNCTIONS[name], good(FUNCTIONS[name]) | {"state_indices": bad}, fwp.ShapeError)
    for axis in (1, 2, 3):
        arguments = good(FUNCTIONS[name]) | {"state_indices": [0, 1]}
        arguments["state"] = arguments["state"].take(range(2), axis)
        refused(FUNCTIONS[name], arguments, fwp.ShapeError)


@STEPS
@pytest.mark.parametrize("output", ["state", "out"])
def test_outputs_over_slots(name, output):
    arguments = good(FUNCTIONS[name])
    arguments["state_indices"] = arguments[output].ravel()[:2].view(np.int32)
    arguments["state_indices"][...] = [1, 0]
    assert "shares memory with state_indices" in refused(FUNCTIONS[name], arguments, fwp.ArgumentError)


@pytest.mark.parametrize("function", [fwp.delta_rule, fwp.linear_attention_backward, fwp.vjp])
def test_scans_have_no_slots(function):
    with pytest.raises(TypeError, match="state_indices"):
        function(state_indices=[0])
