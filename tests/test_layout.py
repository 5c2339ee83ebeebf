"""Layout is strides: any strides give the bits of contiguous arrays, and gaps are neither read nor written.

Every gap holds NaN, so that one element read from the wrong place poisons the result.
"""

import numpy as np
import pytest
from cases import DECAYS, RULES, gradients, make_case, scan
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, cases, every_other, reversed_axes, strided_last_axis, time_major, transposed
from tolerances import assert_bits_equal, assert_gradients_bits_equal

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])


def assert_same_bits(case, other):
    for x, y in zip(scan(other), scan(case), strict=True):
        assert_bits_equal(x, y)
    assert_gradients_bits_equal(gradients(other), gradients(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@all_scans
def test_all_arrays_in_one_layout(isa, rule, decay, layout):
    case = make_case(rule, decay, T=20, heads=(4, 2, 1), K=9, V=37)
    assert_same_bits(case, case.map(layout))


@given(case=cases(times=(0, 1, 6, 7, 13), sizes=(1, 5, 16, 33)), data=st.data())
def test_each_array_in_a_layout_of_its_own(isa, case, data):
    assert_same_bits(case, case.map(lambda x: data.draw(st.sampled_from(LAYOUTS))(x)))


@pytest.mark.parametrize("axis", [0, 1, 2])
@all_scans
def test_broadcast_inputs(isa, rule, decay, axis):
    """Stride 0 on one axis of every input."""
    case = make_case(rule, decay, B=3, T=20, heads=(2, 2, 2), K=9, V=21)
    broadcast = case.map(lambda x: np.broadcast_to(x.take([0], axis=axis), x.shape))
    assert all(x.strides[axis] == 0 for x in broadcast.arrays.values())
    assert_same_bits(broadcast.map(np.ascontiguousarray), broadcast)


@pytest.mark.parametrize("layout", [transposed, time_major, every_other, reversed_axes, strided_last_axis])
@all_scans
def test_outputs_in_any_layout(isa, rule, decay, layout):
    case = make_case(rule, decay, T=20, heads=(4, 2, 1), K=9, V=37)
    (o, final_state), expected = scan(case), gradients(case)

    def empty(x):
        return None if x is None else layout(np.full_like(x, np.nan))

    out, final = empty(o), empty(final_state)
    with_gaps = [_gaps(x) for x in (out, final)]
    scan(case, out=out, final_state_out=final)
    assert_bits_equal(out, o)
    assert_bits_equal(final, final_state)
    grads = fwp.Gradients(*(empty(x) for x in expected))
    with_gaps += [_gaps(x) for x in grads if x is not None]
    gradients(case, out=grads)
    assert_gradients_bits_equal(grads, expected)
    assert all(_gaps(x) == count for x, count in zip((out, final), with_gaps, strict=False))
    present = [x for x in grads if x is not None]
    assert [_gaps(x) for x in present] == with_gaps[2:]


def _gaps(view):
    """How many elements of the memory around a view still hold NaN outside the view."""
    base = view
    while isinstance(base.base, np.ndarray):
        base = base.base
    return int(np.isnan(base).sum()) - int(np.isnan(view).sum())


def test_strides_of_axes_of_size_one_do_not_matter(isa):
    case = make_case("delta", "scalar", B=1, T=1, heads=(1, 1, 1), K=5, V=20)

    def absurd(x):
        strides = (2**40 + 4, -(2**41), 12, *x.strides[3:])
        return np.lib.stride_tricks.as_strided(x, x.shape, strides[: x.ndim])

    names = ("q", "k", "v", "beta", "g", "do")
    assert_same_bits(case, case.but(**{name: absurd(getattr(case, name)) for name in names}))


@pytest.mark.parametrize("offset", range(1, 17, 3))
def test_any_address_that_fits_the_item_size(isa, offset):
    """Vectors are loaded unaligned."""
    case = make_case("delta", "channel", T=13, K=16, V=32)

    def shifted(x):
        base = np.full(x.size + offset, np.nan, x.dtype)
        base[offset:] = x.ravel()
        return base[offset:].reshape(x.shape)

    assert_same_bits(case, case.map(shifted))


def test_packed_projection(isa):
    """q, k and v as slices of one array [B,T,3,H,K]."""
    packed = np.random.default_rng(0).standard_normal((2, 20, 3, 2, 16)).astype(np.float32)
    case = make_case("delta", T=20)
    sliced = case.but(q=packed[:, :, 0], k=packed[:, :, 1], v=packed[:, :, 2])
    assert_same_bits(sliced.map(np.ascontiguousarray), sliced)
