"""No byte outside an array is touched: each lies against a forbidden page, at one end, then at the other.

The sweeps run in another process, which dies of the first wrong access and says where.
"""

import itertools

import numpy as np
import pytest
from cases import DECAYS, DTYPES, MAPS, NORMS, RULES, STEP, gradients, library_map, make_case, scan
from memory import guarded
from processes import run_python
from tolerances import assert_bits_equal, assert_gradients_bits_equal

import fwp_core as fwp

SIDES = ("front", "back")
SIZES = ((1, 1), (3, 5), (16, 16), (15, 17), (33, 31), (8, 64), (65, 7), (4, 100))
TIMES = (1, 5, 6, 7, 13)


def check_case(case, side):
    """Forward, backward and steps, with every array of theirs guarded, outputs filled with NaN."""

    def output(x):
        return None if x is None else guarded(np.full_like(x, np.nan), side)

    expected, expected_gradients = scan(case), gradients(case)
    inputs = case.map(lambda x: guarded(x, side)).but(feature_map=guarded_map(case.feature_map, side))
    out, final = (output(x) for x in expected)
    scan(inputs, out=out, final_state_out=final)
    for x, y in zip((out, final), expected, strict=True):
        assert_bits_equal(x, y)
    grads = fwp.Gradients(*(output(x) for x in expected_gradients))
    gradients(inputs, out=grads)
    assert_gradients_bits_equal(grads, expected_gradients)

    if case.cu_seqlens is None:
        check_step(case, [None if x is None else x[:, 0].copy() for x in case.inputs], side)
        check_step(case, case.inputs, side)


def guarded_map(feature_map, side):
    """The projection of FAVOR is an array as well."""
    if feature_map is None:
        return None
    return tuple(guarded(x, side) if isinstance(x, np.ndarray) else x for x in feature_map)


def check_step(case, tokens, side):
    """The whole batch, then its last sequence alone in the last slot."""
    options = case.step_options
    state, o = (
        case.initial_state.copy(),
        np.full_like(case.do if tokens[0].ndim == 4 else case.do[:, 0], np.nan),
    )
    guarded_o = guarded(o, side)
    o = STEP[case.rule](*tokens, state=state, **options)
    guarded_state = guarded(case.initial_state, side)
    tokens = [None if x is None else guarded(x, side) for x in tokens]
    STEP[case.rule](*tokens, state=guarded_state, out=guarded_o, **options)
    assert_bits_equal(guarded_o, o)
    assert_bits_equal(guarded_state, state)

    guarded_state = guarded(case.initial_state, side)
    slots = guarded(np.array([-1] * (len(state) - 1) + [len(state) - 1], np.int32), side)
    STEP[case.rule](*tokens, state=guarded_state, state_indices=slots, out=guarded_o, **options)
    assert_bits_equal(guarded_o[-1], o[-1])
    assert_bits_equal(guarded_state[-1], state[-1])
    assert_bits_equal(guarded_state[:-1], case.initial_state[:-1])


def sweep(level):
    with fwp.use_isa(level), fwp.threads(2):
        for i, (rule, decay, dtype, (K, V), T) in enumerate(
            itertools.product(RULES, DECAYS, DTYPES, SIZES, TIMES)
        ):
            # The other options change with the index, so that each meets each size.
            options = (
                {"B": 1, "heads": (1, 1, 1), "T": T},
                {"B": 2, "heads": (4, 2, 1), "T": T},
                {"heads": (1, 1, 2), "lengths": (T, 0, 3)},
            )[i % 3]
            case = make_case(rule, decay, K=K, V=V, dtype=dtype, **options)
            check_case(case, SIDES[i // 3 % 2])
            check_case(case, SIDES[1 - i // 3 % 2])
    print("all inside")


def feature_sweep(level):
    """Scans with features and norms, and maps alone; rows of fewer entries than a register has too."""
    sizes = ((2, 1), (3, 5), (8, 16), (17, 33))
    options = itertools.product((None, *MAPS), NORMS, (False, True))
    with fwp.use_isa(level), fwp.threads(2):
        for i, (dtype, (phi, norm, attention_norm), (K, V)) in enumerate(
            itertools.product(DTYPES, options, sizes)
        ):
            features = {"feature_map": phi, "qk_norm": norm, "attention_norm": attention_norm}
            rule, decay, side = RULES[i % 2], DECAYS[i % 3], SIDES[i // 2 % 2]
            case = make_case(rule, decay, B=1, T=7, heads=(2, 1, 2), K=K, V=V, dtype=dtype, **features)
            check_case(case, side)
            if phi:
                check_map(case, side)
    print("all inside")


def check_map(case, side):
    phi, outside = (library_map(x) for x in (case.feature_map, guarded_map(case.feature_map, side)))
    x, y = case.q, phi(case.q)
    assert_bits_equal(outside(guarded(x, side)), y)
    assert_bits_equal(outside.backward(guarded(y, side), guarded(x, side)), phi.backward(y, x))


@pytest.mark.parametrize("sweep", ["sweep", "feature_sweep"])
@pytest.mark.parametrize("level", fwp.available_isas())
def test_no_access_outside_the_arrays(level, sweep):
    done = run_python(f"import test_guard_pages; test_guard_pages.{sweep}({level!r})")
    assert done.stdout.strip() == "all inside", done.stderr


TOUCH = """
import ctypes
import numpy as np
from memory import guarded
x = guarded(np.ones(1000, np.float32), {side!r})
ctypes.c_float.from_address(x.ctypes.data + 4 * {index}).value
print("alive")
"""


@pytest.mark.parametrize(
    ("side", "index", "alive"),
    [("front", 0, True), ("front", -1, False), ("back", 999, True), ("back", 1000, False)],
)
def test_the_guards_bite(side, index, alive):
    done = run_python(TOUCH.format(side=side, index=index))
    assert (done.stdout.strip() == "alive") == alive
