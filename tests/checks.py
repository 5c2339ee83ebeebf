"""What must hold of any scan, whatever its options. Each check takes a Case."""

import numpy as np
from cases import exact_gradients, exact_scan, gradients, scan, step, steps, vjp
from strategies import LAYOUTS
from tolerances import (
    ADJOINT,
    CENTRAL_DIFFERENCE,
    CENTRAL_STEP,
    REORDERED,
    assert_bits_equal,
    assert_close,
    assert_gradients_bits_equal,
    assert_gradients_close,
    relative_error,
)

import fwp_core as fwp

INPUTS = ("q", "k", "v", "beta", "g", "initial_state")


def results(case):
    return [*scan(case), *gradients(case)]


def assert_same_bits(actual, expected):
    """Two lists of results, absent ones included."""
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert (x is None) == (y is None), i
        if y is not None:
            assert_bits_equal(x, y, str(i))


def scan_is_the_oracles(case):
    o, final_state = scan(case)
    exact_o, exact_state = exact_scan(case)
    assert o.dtype == case.v.dtype
    assert final_state.dtype == case.state_dtype
    assert_close(o, exact_o, "forward", "o")
    assert_close(final_state, exact_state, "forward", "final_state")


def gradients_are_the_oracles(case):
    result = gradients(case)
    for name, gradient in zip(INPUTS, result, strict=True):
        x = getattr(case, name)
        if x is not None:
            assert gradient.dtype == x.dtype, name
    assert_gradients_close(result, exact_gradients(case))


def gradients_are_central_differences(case):
    """Element by element in float64, with nothing but the library's own forward."""
    for name, gradient in zip(INPUTS, gradients(case), strict=True):
        x = getattr(case, name)
        if x is None:
            continue
        differences = np.empty(x.shape)
        for index in np.ndindex(x.shape):
            ahead, behind = x.copy(), x.copy()
            ahead[index] += CENTRAL_STEP
            behind[index] -= CENTRAL_STEP
            rise = loss(case.but(**{name: ahead})) - loss(case.but(**{name: behind}))
            differences[index] = rise / (2 * CENTRAL_STEP)
        assert relative_error(gradient, differences) < CENTRAL_DIFFERENCE, name


def loss(case):
    """What the gradients are gradients of."""
    o, final_state = scan(case)
    return np.sum(o * case.do) + np.sum(final_state * case.dfinal_state)


def gradients_are_the_adjoint(case):
    """<d, J dx> = <J^T d, dx> over all inputs and both outputs jointly; J dx is the oracle's complex step."""
    rng = np.random.default_rng(1)
    directions = {name: rng.standard_normal(getattr(case, name).shape) for name in case.arrays}
    moved = case.but(**{name: getattr(case, name) + 1e-30j * directions[name] for name in directions})
    forward = [x.imag / 1e-30 for x in exact_scan(moved)]
    incoming = [case.do, np.zeros_like(forward[1]) if case.dfinal_state is None else case.dfinal_state]
    left = sum(np.sum(x * y) for x, y in zip(forward, incoming, strict=True))
    named = dict(zip(INPUTS, gradients(case), strict=True))
    terms = [np.sum(named[name] * directions[name]) for name in INPUTS if named[name] is not None]
    size = np.sqrt(sum(np.sum(x**2) for x in forward) * sum(np.sum(x**2) for x in incoming))
    size += np.sqrt(sum(np.sum(x**2) for x in named.values() if x is not None)) + np.sum(np.abs(terms))
    assert abs(left - sum(terms)) <= ADJOINT * size


def is_float32_rounded_once(case):
    """Forward and gradients have the bits of the float32 call, rounded to each result's own dtype."""
    full = results(case.map(lambda x: converted(x, np.float32)))
    half = results(case)
    assert_same_bits(
        half, [None if x is None else converted(y, x.dtype) for x, y in zip(half, full, strict=True)]
    )


def converted(x, dtype):
    """By NumPy or ml_dtypes, which warn of overflow and of signalling NaN."""
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def vjp_is_scan_and_backward(case):
    (o, final_state), pullback = vjp(case)
    assert_same_bits((o, final_state), scan(case))
    grads = pullback(case.do, case.dfinal_state)
    assert isinstance(grads, fwp.Gradients)
    assert_gradients_bits_equal(grads, gradients(case))


def steps_are_the_scan(case):
    """One by one, with a time axis of one bit for bit the same, and all in one call."""
    exact_o, exact_state = exact_scan(case)
    one, other, state = (case.first_state() for _ in range(3))
    rows = [step(case, t, one) for t in range(case.v.shape[1])]
    again = [steps(case.at(slice(t, t + 1)), other) for t in range(case.v.shape[1])]
    assert_same_bits([np.stack(rows, axis=1), one], [np.concatenate(again, axis=1), other])
    for o, final_state in ((np.stack(rows, axis=1), one), (steps(case, state), state)):
        assert o.dtype == case.v.dtype
        assert_close(o, exact_o, "forward", "o")
        assert_close(final_state, exact_state, "forward", "state")


def slots_are_states(case):
    """A pool of states, of which all sequences but the first have one; the other slots keep their bits."""
    N, *rest = case.state_shape
    pool = np.full((2 * N + 1, *rest), np.nan, case.state_dtype)
    slots = np.array([-1, *range(2, 2 * N, 2)])
    pool[slots[1:]] = case.first_state()[1:]
    o = steps(case, pool, state_indices=slots)
    state = case.first_state()
    expected = steps(case, state)
    assert not np.any(o[0])
    assert_same_bits([o[1:], pool[slots[1:]]], [expected[1:], state[1:]])
    assert np.isnan(np.delete(pool, slots[1:], axis=0)).all()


def threads_do_not_matter(case):
    with fwp.threads(1):
        expected = results(case)
    for count in (2, 3, 8):
        with fwp.threads(count):
            assert_same_bits(results(case), expected)


def layout_does_not_matter(case):
    expected = results(case)
    for layout in LAYOUTS:
        assert_same_bits(results(case.map(layout)), expected)


def batch_does_not_matter(case):
    """One sequence and head alone has the bits that it has among the others."""
    b, h = case.v.shape[0] - 1, case.do.shape[2] - 1

    def part(x):
        return None if x is None else x[b:, h:] if x.shape[1:] == case.state_shape[1:] else x[b:, :, h:]

    assert case.k.shape[2] == case.q.shape[2] == h + 1
    assert case.v.shape[1] != h + 1
    assert_same_bits(results(case.map(part)), [part(x) for x in results(case)])


def packed_sequences_are_a_loop(case):
    whole, (o, final_state) = gradients(case), scan(case)
    for n, (start, end) in enumerate(zip(case.cu_seqlens[:-1], case.cu_seqlens[1:], strict=True)):
        one, span = slice(n, n + 1), slice(start, end)
        states = {"initial_state": case.initial_state[one], "dfinal_state": case.dfinal_state[one]}
        part = [o[:, span], final_state[one]]
        part += [None if x is None else x[:, span] for x in whole[:5]] + [whole.dinitial_state[one]]
        assert_same_bits(results(case.at(span).but(**states, cu_seqlens=None)), part)


def parts_are_the_whole(case):
    """The state goes forward from part to part, its gradient comes back."""
    o, final_state = scan(case)
    whole = gradients(case)
    T = case.v.shape[1]
    for cut in sorted({0, 1, T // 2, T - 1, T}):
        first, second = case.at(slice(None, cut)), case.at(slice(cut, None))
        first_o, state = scan(first)
        second = second.but(initial_state=state)
        second_o, end = scan(second)
        after = gradients(second)
        before = gradients(first.but(dfinal_state=after.dinitial_state))
        joined = [np.concatenate([first_o, second_o], axis=1), end]
        for x, y in zip(before[:5], after[:5], strict=True):
            joined.append(None if x is None else np.concatenate([x, y], axis=1))
        for x, y in zip([*joined, before.dinitial_state], [o, final_state, *whole], strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert relative_error(x, y, floor=1.0) < 4 * REORDERED[x.dtype], cut


def every_result_is_written(case):
    """Outputs are the given arrays, prefilled with NaN; inputs may be read-only."""
    expected = results(case)

    def empty(x):
        return None if x is None else np.full_like(x, np.nan)

    frozen = case.map(np.copy)
    for x in frozen.arrays.values():
        x.flags.writeable = False
    out, final, *grads = (empty(x) for x in expected)
    o, final_state = scan(frozen, out=out, final_state_out=final)
    result = gradients(frozen, out=fwp.Gradients(*grads))
    assert all(x is y for x, y in zip((o, final_state, *result), (out, final, *grads), strict=True))
    assert_same_bits([out, final, *grads], expected)


def the_past_does_not_see_the_future(case):
    o, _ = scan(case)
    for t in range(case.v.shape[1]):
        changed = case.map(np.copy)
        for name, x in changed.arrays.items():
            if name in ("q", "k", "v", "beta", "g"):
                x[:, t + 1 :] = np.nan
        assert_bits_equal(scan(changed)[0][:, : t + 1], o[:, : t + 1], f"t={t}")


def nan_goes_where_it_belongs(case):
    """One NaN in one array reaches exactly the results that the oracle says."""
    rng = np.random.default_rng(0)
    for name in case.arrays:
        poisoned = case.map(np.copy)
        x = getattr(poisoned, name)
        x[tuple(rng.integers(0, n) for n in x.shape)] = np.nan
        exact = [*exact_scan(poisoned), *exact_gradients(poisoned)]
        for i, (x, y) in enumerate(zip(results(poisoned), exact, strict=True)):
            if y is not None:
                wrong = np.count_nonzero(np.isnan(x) != np.isnan(y))
                assert wrong == 0, f"NaN in {name}, result {i}: {wrong} of {y.size}"


# Those that take any case of several sequences and ungrouped heads.
PROMISES = (
    vjp_is_scan_and_backward,
    threads_do_not_matter,
    layout_does_not_matter,
    batch_does_not_matter,
    every_result_is_written,
    the_past_does_not_see_the_future,
    nan_goes_where_it_belongs,
    steps_are_the_scan,
    slots_are_states,
)
