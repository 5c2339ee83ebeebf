"""Feature maps alone: values and gradients against the oracle, bit by bit where that can be, and limits."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import (
    DTYPES,
    HALVES,
    MAPS,
    PRECISE,
    exact_map,
    is_favor,
    library_map,
    state_dtype,
    with_projection,
)
from checks import converted
from hypothesis import given
from hypothesis import strategies as st
from oracle_features import features
from strategies import LAYOUTS
from tolerances import (
    CENTRAL_DIFFERENCE,
    CENTRAL_STEP,
    COMPLEX_STEP,
    FEATURE,
    TOLERANCE,
    assert_bits_equal,
    assert_close,
    relative_error,
)

import fwp_core as fwp
from fwp_core import feature_maps

maps = pytest.mark.parametrize("spec", MAPS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
precise = pytest.mark.parametrize("dtype", PRECISE)
halves = pytest.mark.parametrize("dtype", HALVES)


def make(spec, shape, dtype=np.float64, seed=0):
    """The library's map, the oracle's, x of this shape, and dy."""
    rng = np.random.default_rng(seed)
    spec = with_projection(spec, shape[-1], state_dtype(dtype), rng)
    x = rng.standard_normal(shape).astype(dtype)
    exact = features(exact_map(spec))
    return library_map(spec), exact, x, rng.standard_normal(exact.value(x).shape).astype(dtype)


def check_features(spec, y, exact, x):
    """Every element by itself: nothing cancels in a feature but the exponent of FAVOR."""
    tolerance = FEATURE[y.dtype]
    if is_favor(spec):
        # The terms of the exponent are rounded; they are at most a few times sqrt(K) |x|, and |x|^2 / 2.
        tolerance = tolerance * (1 + np.sum(x.astype(float) ** 2, axis=-1, keepdims=True) + 8 * x.shape[-1])
    assert np.all(np.abs(y - exact) <= tolerance * np.abs(exact))


# Values.


@st.composite
def rows(draw):
    """A map, and an array of any rank that it takes."""
    K = draw(st.sampled_from((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 64, 65, 100)))
    spec = draw(st.sampled_from([m for m in MAPS if m[0] != "DPFP" or m[1] < 2 * K]))
    shape = (*draw(st.lists(st.integers(0, 4), max_size=4)), K)
    return spec, shape, draw(st.integers(0, 2**16))


@precise
@given(drawn=rows())
def test_values_are_the_oracles(isa, dtype, drawn):
    spec, shape, seed = drawn
    phi, exact, x, _ = make(spec, shape, dtype, seed)
    y = phi(x)
    assert y.dtype == x.dtype
    assert y.shape == (*shape[:-1], phi.dim(shape[-1]))
    check_features(spec, y, exact.value(x), x)
    # A call needs more than no rows to count.
    phi(np.ones((1, shape[-1]), dtype))


@dtypes
@given(drawn=rows())
def test_gradients_are_the_oracles(isa, dtype, drawn):
    spec, shape, seed = drawn
    phi, exact, x, dy = make(spec, shape, dtype, seed)
    dx = phi.backward(dy, x)
    assert (dx.dtype, dx.shape) == (x.dtype, x.shape)
    assert_close(dx, exact.vjp(dy, x), "gradient")
    phi(np.ones((1, shape[-1]), dtype))


@halves
@given(drawn=rows())
def test_halves_are_float32_rounded_once(isa, dtype, drawn):
    spec, shape, seed = drawn
    phi, _, x, dy = make(spec, shape, dtype, seed)
    wide_x, wide_dy = x.astype(np.float32), dy.astype(np.float32)
    assert_bits_equal(phi(x), converted(phi(wide_x), dtype))
    assert_bits_equal(phi.backward(dy, x), converted(phi.backward(wide_dy, wide_x), dtype))
    phi(np.ones((1, shape[-1]), dtype))


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (("ReLU",), {0: 0, 1: 1, 7: 7}),
        (("ELU1",), {0: 0, 1: 1, 7: 7}),
        (("Softmax",), {0: 0, 1: 1, 7: 7}),
        (("DPFP",), {0: 0, 1: 2, 7: 14}),
        (("DPFP", 3), {2: 12, 7: 42}),
        (("FAVOR", np.zeros((5, 7), np.float32)), {7: 10}),
        (("FAVOR", np.zeros((5, 0), np.float32)), {0: 10}),
    ],
    ids=str,
)
def test_sizes(spec, sizes):
    phi = library_map(spec)
    for K, dim in sizes.items():
        x = np.zeros((2, 3, K), np.float32)
        assert phi.dim(K) == dim
        assert phi(x).shape == (2, 3, dim)
        assert phi.backward(phi(x), x).shape == (2, 3, K)
        assert phi(x[:0]).shape == (0, 3, dim)
        assert phi.backward(phi(x[:, :0]), x[:, :0]).shape == (2, 0, K)


def test_no_entries_make_constant_features():
    """FAVOR of K = 0: exp(0) + eps, over sqrt(2 m)."""
    y = feature_maps.FAVOR(np.zeros((2, 0)), eps=0.5)(np.zeros((3, 0)))
    np.testing.assert_allclose(y, np.full((3, 4), 0.75), rtol=1e-15)


@dtypes
@maps
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(isa, spec, dtype, layout):
    phi, _, x, dy = make(spec, (3, 5, 4, 9), dtype)
    y, dx = phi(x), phi.backward(dy, x)
    assert y.flags.c_contiguous
    assert dx.flags.c_contiguous
    assert_bits_equal(phi(layout(x)), y)
    assert_bits_equal(phi.backward(layout(dy), layout(x)), dx)


@maps
def test_any_rank_and_direction(isa, spec):
    phi, _, x, dy = make(spec, (2, 3, 1, 2, 9), np.float32)
    y, dx = phi(x), phi.backward(dy, x)
    for index in np.ndindex(x.shape[:-1]):
        assert_bits_equal(phi(x[index]), y[index])
        assert_bits_equal(phi.backward(dy[index], x[index]), dx[index])
    assert_bits_equal(phi(x[:, ::-1, :, ::-1, ::-1][..., ::-1]), y[:, ::-1, :, ::-1])
    row = np.broadcast_to(x[0, 0, 0, 0], (4, 1, 9))
    assert_bits_equal(phi(row), np.broadcast_to(y[0, 0, 0, 0], (4, 1, y.shape[-1])))
    backwards = np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    assert_bits_equal(phi(backwards), y)
    assert_bits_equal(phi.backward(dy, backwards), dx)


@maps
def test_threads_do_not_matter(isa, spec):
    phi, _, x, dy = make(spec, (7, 501, 3, 33), np.float32)
    with fwp.threads(1):
        y, dx = phi(x), phi.backward(dy, x)
    for count in (2, 5):
        with fwp.threads(count):
            assert_bits_equal(phi(x), y)
            assert_bits_equal(phi.backward(dy, x), dx)


@maps
def test_inputs_are_only_read(isa, spec):
    phi, _, x, dy = make(spec, (5, 9), np.float32)
    before = x.tobytes(), dy.tobytes()
    x.flags.writeable = dy.flags.writeable = False
    y, dx = phi(x), phi.backward(dy, x)
    assert (x.tobytes(), dy.tobytes()) == before
    assert y.flags.writeable
    assert dx.flags.writeable
    assert not any(np.shares_memory(a, b) for a, b in itertools.product((y, dx), (x, dy)))


# Gradients: of the library's own values by central differences, of the oracle's by complex steps.


@maps
def test_gradients_are_central_differences(isa, spec):
    phi, _, x, dy = make(spec, (3, 7))
    x += np.copysign(0.1, x)  # away from kinks
    differences = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[index] += CENTRAL_STEP
        behind[index] -= CENTRAL_STEP
        differences[index] = np.sum((phi(ahead) - phi(behind)) * dy) / (2 * CENTRAL_STEP)
    assert relative_error(phi.backward(dy, x), differences) < CENTRAL_DIFFERENCE


@maps
def test_gradients_are_complex_steps(isa, spec):
    phi, exact, x, dy = make(spec, (3, 7))
    slopes = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += 1e-30j
        slopes[index] = np.sum(exact.value(moved).imag * dy) / 1e-30
    assert relative_error(phi.backward(dy, x), slopes) < COMPLEX_STEP


# Each map.


@dtypes
def test_relu_is_a_select(isa, dtype):
    x = np.array([[-np.inf, -1.5, -0.0, 0.0, 2.5, np.inf]], dtype)
    phi = feature_maps.ReLU()
    assert (phi(x) == np.array([0, 0, 0, 0, 2.5, np.inf], dtype)).all()
    dy = np.array([[np.nan, np.inf, 3, 4, 5, 6]], dtype)
    assert phi.backward(dy, x).tolist() == [[0, 0, 0, 0, 5, 6]]


@halves
def test_elu1_has_no_cancellation(isa, dtype):
    """Every half: exp(x) or x + 1 as float64 has them; exp(x) - 1 + 1 is 0 from x = -8 on in bfloat16."""
    x = np.arange(65536, dtype=np.uint16).view(dtype).reshape(-1, 16)
    x = x[np.isfinite(x.astype(np.float32)).all(axis=-1)]
    y, exact = feature_maps.ELU1()(x), features(exact_map(("ELU1",))).value(x)
    normal = exact >= float(ml_dtypes.finfo(dtype).smallest_normal)
    assert np.isfinite(y.astype(np.float32)).all()
    error = np.abs(y.astype(float) - exact) / np.where(normal, exact, 1)
    assert error.max() <= TOLERANCE["forward", np.dtype(dtype).name]
    eight = feature_maps.ELU1()(np.array([-8], dtype))
    assert_bits_equal(eight, np.array([np.exp(np.float64(-8))]).astype(dtype))


@precise
def test_exponentials_of_any_size(isa, dtype):
    """ELU1 down to where exp underflows, Softmax of logits that no exponential could hold."""
    x = np.linspace(-800 if dtype == np.float64 else -110, 5, 4001).astype(dtype)
    y, exact = feature_maps.ELU1()(x), features(exact_map(("ELU1",))).value(x)
    assert np.all(np.abs(y - exact) <= FEATURE[y.dtype] * exact + 2 * np.finfo(dtype).smallest_subnormal)
    assert y[0] == 0

    logits = np.array([[1e30, 1e30, -1e30], [-1e30, -1e30, -1e30], [-np.inf, 3, -np.inf]], dtype)
    third = np.full(3, 1 / 3)
    np.testing.assert_allclose(
        feature_maps.Softmax()(logits), [[0.5, 0.5, 0], third, [0, 1, 0]], rtol=FEATURE[y.dtype]
    )


@dtypes
def test_softmax_is_one_in_sum(isa, dtype):
    _, _, x, _ = make(("Softmax",), (5, 100), dtype)
    total = feature_maps.Softmax()(x).astype(np.float64).sum(axis=-1)
    assert relative_error(total, np.ones(5)) < TOLERANCE["forward", np.dtype(dtype).name]


@dtypes
@pytest.mark.parametrize(("K", "nu"), [(1, 1), (2, 1), (2, 3), (3, 5), (8, 2), (17, 4), (33, 3), (6, 11)])
def test_dpfp_in_the_official_order(isa, dtype, K, nu):
    """phi[(j-1) 2d + i] = y[i] y[(i-j) mod 2d], each product rounded once."""
    x = np.random.default_rng(0).standard_normal((3, K)).astype(dtype)
    expected = np.empty((3, 2 * K * nu), dtype)
    for row, values in zip(expected, x.astype(state_dtype(dtype)), strict=True):
        y = [max(value, 0) for value in values] + [max(-value, 0) for value in values]
        for j in range(1, nu + 1):
            for i in range(2 * K):
                row[(j - 1) * 2 * K + i] = dtype(y[i] * y[(i - j) % (2 * K)])
    assert_bits_equal(feature_maps.DPFP(nu)(x), expected)


def test_dpfp_keeps_negative_inputs(isa):
    x = -1 - np.random.default_rng(0).random((4, 8))
    y = feature_maps.DPFP(nu=1)(x)
    assert np.all(np.count_nonzero(y, axis=-1) == 7)
    assert np.all(y >= 0)
    assert np.all(feature_maps.DPFP(nu=1).backward(np.ones_like(y), x) < 0)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_limits_of_nu(isa, K):
    """All shifts but 0: j and 2d - j give the same products, and j = d none at all."""
    x = np.random.default_rng(0).standard_normal((3, K))
    largest = feature_maps.DPFP(nu=2 * K - 1)
    assert largest.dim(K) == 2 * K * (2 * K - 1)
    blocks = np.split(largest(x), 2 * K - 1, axis=-1)
    assert not np.any(blocks[K - 1])
    for j in range(1, K):
        assert_bits_equal(np.sort(blocks[j - 1]), np.sort(blocks[2 * K - j - 1]))
    too_large = feature_maps.DPFP(nu=2 * K)
    for call in (lambda: too_large.dim(K), lambda: too_large(x), lambda: too_large.backward(x, x)):
        with pytest.raises(fwp.ArgumentError, match="nu"):
            call()


# FAVOR.


@pytest.mark.parametrize("dtype", PRECISE)
def test_favor_estimates_the_exponential_of_the_product(isa, dtype):
    """phi(q).phi(k) -> exp(q.k), with an error that falls like 1 / sqrt(m) but for rare large ones."""
    K = 8
    q, k = 0.25 * np.random.default_rng(0).standard_normal((2, 20, K)).astype(dtype)
    exact = np.exp(np.sum(q * k, axis=-1))
    errors = []
    for m in (16, 256, 4096):
        estimates = []
        for seed in range(8):
            phi = feature_maps.FAVOR(feature_maps.orthogonal_gaussian(m, K, seed, dtype=dtype))
            estimates.append(np.sum(phi(q) * phi(k), axis=-1))
        errors.append(np.median(np.abs(estimates / exact - 1)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.01


def test_favor_has_no_bias(isa):
    """The mean over many projections of few rows: 5 standard errors."""
    q, k = np.array([0.9, -0.4, 0.3]), np.array([0.5, 0.8, -0.6])
    estimates = []
    for seed in range(2000):
        phi = feature_maps.FAVOR(feature_maps.orthogonal_gaussian(3, 3, seed, dtype=np.float64))
        estimates.append(phi(q) @ phi(k))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - np.exp(q @ k)) < 5 * error


@pytest.mark.parametrize("size", [1e2, 1e10, 1e25])
@dtypes
def test_favor_of_huge_inputs_is_zero(isa, dtype, size):
    """|x|^2 alone may overflow: the features are 0, with eps just that, and nothing is NaN."""
    size = min(size, 1e4) if dtype == np.float16 else size
    projection = feature_maps.orthogonal_gaussian(6, 5, seed=0, dtype=state_dtype(dtype))
    x = np.full((2, 5), size).astype(dtype)
    x[1, 2:] *= -1
    for eps in (0.0, 0.1):
        phi = feature_maps.FAVOR(projection, eps)
        expected = np.full((2, 12), eps / np.sqrt(12))
        np.testing.assert_allclose(phi(x).astype(float), expected, rtol=TOLERANCE["forward", x.dtype.name])
        assert not np.any(phi.backward(np.ones((2, 12), dtype), x))


def test_favor_evaluates_one_exponent(isa):
    """R x = |x|^2 / 2 = 28800: their exponentials are infinite and zero. The difference has few digits."""
    projection, x = np.full((1, 4), 60, np.float32), np.full((1, 4), 120, np.float32)
    y = feature_maps.FAVOR(projection)(x)
    np.testing.assert_allclose(y, [[0.5**0.5, 0]], rtol=28800 * 2.0**-23)


@precise
@pytest.mark.parametrize(("m", "K"), [(1, 1), (4, 4), (3, 8), (20, 8), (64, 16), (5, 1), (0, 3)])
def test_orthogonal_gaussian(dtype, m, K):
    """Rows of one block of K are orthogonal, those of the next are drawn anew."""
    R = feature_maps.orthogonal_gaussian(m, K, 3, dtype=dtype)
    assert (R.shape, R.dtype) == ((m, K), dtype)
    for start in range(0, m, K):
        block = R[start : start + K].astype(np.float64)
        products = block @ block.T
        norms = np.sqrt(np.diag(products))
        assert np.all(norms > 0)
        cosines = np.abs(products) / np.outer(norms, norms) - np.eye(len(norms))
        assert np.all(np.abs(cosines) < 8 * K * np.finfo(dtype).eps)
    if m > K > 1:
        assert np.any(np.abs(R[:K] @ R[K:].T) > 1e-2)
    assert_bits_equal(feature_maps.orthogonal_gaussian(m, K, 3, dtype=dtype), R)
    assert m == 0 or not np.array_equal(feature_maps.orthogonal_gaussian(m, K, 4, dtype=dtype), R)


def test_rows_are_as_long_as_gaussian_ones():
    """|row|^2 is chi-squared with K degrees of freedom: mean K, variance 2 K; entries have mean 0."""
    m, K = 20000, 10
    R = feature_maps.orthogonal_gaussian(m, K, 0, dtype=np.float64)
    squared = np.sum(R**2, axis=-1)
    assert abs(squared.mean() - K) < 5 * np.sqrt(2 * K / m)
    assert abs(squared.var() / (2 * K) - 1) < 0.1
    assert np.all(np.abs(R.mean(axis=0)) < 5 / np.sqrt(m))
    assert feature_maps.orthogonal_gaussian(3, 2, 0).dtype == np.float32


def test_projections_of_any_kind(isa):
    """Read-only or in any order; held as it is, not copied."""
    rng = np.random.default_rng(0)
    projection, x = rng.standard_normal((6, 5)), rng.standard_normal((3, 5))
    dy = rng.standard_normal((3, 12))
    phi = feature_maps.FAVOR(projection)
    y, dx = phi(x), phi.backward(dy, x)
    frozen = projection.copy()
    frozen.flags.writeable = False
    wide = np.full((12, 10), np.nan)
    wide[::2, 1::2] = projection
    for same in (frozen, np.asfortranarray(projection), wide[::2, 1::2], projection[::-1].copy()[::-1]):
        assert_bits_equal(feature_maps.FAVOR(same)(x), y)
        assert_bits_equal(feature_maps.FAVOR(same).backward(dy, x), dx)
    projection[...] = 0
    constant = np.exp(-np.sum(x**2, axis=1, keepdims=True) / 2) / np.sqrt(12)
    np.testing.assert_allclose(phi(x), np.broadcast_to(constant, y.shape), rtol=1e-14)


# NaN is data.


@precise
@maps
def test_nan_goes_where_it_belongs(isa, spec, dtype):
    phi, exact, x, dy = make(spec, (6, 9), dtype)
    for row, column in ((1, 0), (2, 4), (5, 8)):
        poisoned = x.copy()
        poisoned[row, column] = np.nan
        assert np.array_equal(np.isnan(phi(poisoned)), np.isnan(exact.value(poisoned)))
        dx = phi.backward(dy, poisoned)
        assert np.array_equal(np.isnan(dx), np.isnan(exact.vjp(dy, poisoned)))
        poisoned = dy.copy()
        poisoned[row, column % dy.shape[1]] = np.nan
        dx = phi.backward(poisoned, x)
        assert np.array_equal(np.isnan(dx), np.isnan(exact.vjp(poisoned, x)))


# Objects, and what is refused.


def test_objects():
    projection = np.zeros((4, 3), np.float32)
    objects = {
        "ReLU()": feature_maps.ReLU(),
        "ELU1()": feature_maps.ELU1(),
        "Softmax()": feature_maps.Softmax(),
        "DPFP(nu=2)": feature_maps.DPFP(2),
        "DPFP(nu=1)": feature_maps.DPFP(),
        "FAVOR(<float32 (4, 3)>, eps=0.0001)": feature_maps.FAVOR(projection, eps=1e-4),
    }
    for text, phi in objects.items():
        assert isinstance(phi, feature_maps.FeatureMap)
        assert repr(phi) == text
        for name in ("nu", "eps", "projection", "something"):
            with pytest.raises((AttributeError, TypeError)):
                setattr(phi, name, 3)
    assert feature_maps.DPFP(nu=2).nu == 2
    assert feature_maps.FAVOR(projection, eps=1e-4).eps == 1e-4
    assert np.shares_memory(feature_maps.FAVOR(projection).projection, projection)


X, DY = np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)
BAD_MAPS = [
    (fwp.ArgumentError, "nu", lambda: feature_maps.DPFP(0)),
    (fwp.ArgumentError, "nu", lambda: feature_maps.DPFP(-1)),
    (fwp.ArgumentError, "feature_map", lambda: feature_maps.DPFP(2).dim(0)),
    (fwp.ArgumentError, "feature_map", lambda: feature_maps.DPFP(2)(X[:, :0])),
    (fwp.ArgumentError, "feature_map", lambda: feature_maps.DPFP(6).backward(X, X)),
    (fwp.ArgumentError, "n", lambda: feature_maps.ReLU().dim(-1)),
    (fwp.DTypeError, "nu", lambda: feature_maps.DPFP(1.0)),
    (fwp.DTypeError, "nu", lambda: feature_maps.DPFP("1")),
    (fwp.DTypeError, "nu", lambda: feature_maps.DPFP(None)),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(None)),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR([[1.0, 2.0]])),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(X.astype(int))),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(X.astype(">f4"))),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(X.astype(np.float16))(X)),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(np.ma.array(X))),
    (fwp.ShapeError, "projection", lambda: feature_maps.FAVOR(X[0])),
    (fwp.ShapeError, "projection", lambda: feature_maps.FAVOR(X[None])),
    (fwp.ShapeError, "projection", lambda: feature_maps.FAVOR(X[:0])),
    (fwp.ArgumentError, "eps", lambda: feature_maps.FAVOR(X, eps=-1e-4)),
    (fwp.ArgumentError, "eps", lambda: feature_maps.FAVOR(X, eps=np.nan)),
    (fwp.ArgumentError, "eps", lambda: feature_maps.FAVOR(X, eps=np.inf)),
    (fwp.DTypeError, "eps", lambda: feature_maps.FAVOR(X, eps="0")),
    (fwp.DTypeError, "eps", lambda: feature_maps.FAVOR(X, eps=None)),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(X.astype(float))(X)),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(X)(X.astype(float))),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(X.astype(float))(X.astype(np.float16))),
    (fwp.DTypeError, "projection", lambda: feature_maps.FAVOR(X.astype(float)).backward(DY, X)),
    (fwp.DTypeError, "dtype", lambda: feature_maps.orthogonal_gaussian(3, 3, 0, dtype=np.float16)),
    (fwp.DTypeError, "m", lambda: feature_maps.orthogonal_gaussian(3.0, 3, 0)),
    (fwp.ArgumentError, "m", lambda: feature_maps.orthogonal_gaussian(-1, 3, 0)),
    (fwp.ArgumentError, "n", lambda: feature_maps.orthogonal_gaussian(3, -1, 0)),
]


@pytest.mark.parametrize(("error", "name", "call"), BAD_MAPS)
def test_bad_maps(error, name, call):
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        call()


@maps
@pytest.mark.parametrize(
    ("error", "x"),
    [
        (fwp.DTypeError, [[1.0, 2.0, 3.0]]),
        (fwp.DTypeError, None),
        (fwp.DTypeError, 1.0),
        (fwp.DTypeError, np.ma.array(X)),
        (fwp.DTypeError, X.astype(int)),
        (fwp.DTypeError, X.astype(">f4")),
        (fwp.DTypeError, X.astype(complex)),
        (fwp.ShapeError, np.float32(1) + np.zeros(())),
        (fwp.ArgumentError, np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3)),
    ],
    ids=lambda x: None if isinstance(x, type) else str(getattr(x, "dtype", type(x).__name__)),
)
def test_bad_rows(spec, error, x):
    if error is fwp.ShapeError:
        x = np.zeros((), np.float32)
    phi, _, good, dy = make(spec, (2, 3), np.float32)
    with pytest.raises(error, match="^x: expected .*, got "):
        phi(x)
    with pytest.raises(error, match="^x: expected .*, got "):
        phi.backward(dy, x)
    with pytest.raises((error, fwp.ShapeError), match="^dy: expected .*, got "):
        phi.backward(x, good)


@maps
def test_bad_gradients(spec):
    phi, _, x, dy = make(spec, (2, 3), np.float32)
    for bad in (dy[:1], dy[:, :-1], dy[None], np.zeros((3, 2), np.float32)):
        with pytest.raises(fwp.ShapeError, match="^dy: expected shape .*, got "):
            phi.backward(bad, x)
    for bad in (dy.astype(np.float64), dy.astype(np.float16)):
        with pytest.raises(fwp.DTypeError, match="^dy: expected dtype float32, got "):
            phi.backward(bad, x)
    with pytest.raises(TypeError):
        phi()
    with pytest.raises(TypeError):
        phi.dim("3")


def test_rows_of_another_size_than_the_projection():
    phi = feature_maps.FAVOR(X)
    for call in (lambda: phi.dim(4), lambda: phi(np.zeros((2, 4), np.float32))):
        with pytest.raises(fwp.ShapeError, match=r"^projection: expected shape \(m, K_in=4\), got \(2, 3\)"):
            call()


def test_the_base_class_is_no_map():
    """Neither it nor a class of one's own can stand for a map that C++ knows."""

    def own():
        class Mine(feature_maps.FeatureMap):
            pass

        return Mine()

    for make_one in (feature_maps.FeatureMap, own):
        with pytest.raises(TypeError):
            make_one()(X)


def test_a_map_without_init_is_refused():
    phi = feature_maps.ReLU.__new__(feature_maps.ReLU)
    for call in (lambda: phi.dim(3), lambda: phi(X), lambda: fwp.linear_attention(*OK, feature_map=phi)):
        with pytest.raises(
            fwp.DTypeError, match="^feature_map: expected an object whose __init__ was called"
        ):
            call()
    with pytest.raises(fwp.DTypeError, match="got <class 'fwp_core.feature_maps.ReLU'>"):
        fwp.linear_attention(*OK, feature_map=feature_maps.ReLU)


OK = [np.ones((1, 2, 1, 3), np.float32)] * 3


@pytest.mark.parametrize(
    ("n", "error"), [(2.0, fwp.DTypeError), (True, fwp.DTypeError), (-1, fwp.ArgumentError)]
)
def test_dim_of_no_size(n, error):
    with pytest.raises(error, match="^n: expected an integer"):
        feature_maps.ReLU().dim(n)


def test_nobody_can_take_a_projection_away():
    projection = np.ones((4, 3), np.float32)
    phi = feature_maps.FAVOR(projection)
    for array in (projection, phi.projection):
        with pytest.raises(ValueError, match="resize"):
            array.resize((2, 3))
    projection[:] = 0  # it is read at every call
    assert np.all(phi(X)[..., :4] == phi(X)[..., 4:])
    strided = np.ones((3, 4), np.float32)
    of_a_copy = feature_maps.FAVOR(strided.T)
    strided[:] = 0
    assert np.all(of_a_copy.projection == 1)
