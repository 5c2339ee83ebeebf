"""Feature maps and norms of queries and keys inside the scans."""

import checks
import numpy as np
import pytest
from arguments import FUNCTIONS, accepted, get, good, refused
from cases import (
    HALVES,
    MAPS,
    NORMS,
    PRECISE,
    RULES,
    SCAN,
    exact_gradients,
    exact_scan,
    gradients,
    library_map,
    make_case,
    scan,
    steps,
)
from hypothesis import given
from strategies import feature_cases
from tolerances import REORDERED, TOLERANCE, assert_bits_equal, relative_error

import fwp_core as fwp

# Every map and every norm, alone and together.
MAPPED = [{"feature_map": phi, "qk_norm": norm} for phi in MAPS for norm in NORMS]
FEATURES = [*MAPPED, *({"feature_map": None, "qk_norm": norm} for norm in NORMS if norm)]
FEW_FEATURES = [
    {"feature_map": ("DPFP", 3), "qk_norm": "sum"},
    {"feature_map": ("ELU1",), "qk_norm": None},
    {"feature_map": ("FAVOR", 5), "qk_norm": "l2"},
    {"feature_map": ("Softmax",), "qk_norm": "sum"},
    {"feature_map": None, "qk_norm": "l2"},
]


def each(features):
    return pytest.mark.parametrize("features", features, ids=lambda f: "-".join(map(str, f.values())))


every_feature, every_map, few_features = each(FEATURES), each(MAPPED), each(FEW_FEATURES)
rules = pytest.mark.parametrize("rule", RULES)
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@given(case=feature_cases())
def test_scan_is_the_oracles(isa, case):
    checks.scan_is_the_oracles(case)


@given(case=feature_cases())
def test_gradients_are_the_oracles(isa, case):
    checks.gradients_are_the_oracles(case)


@given(case=feature_cases(dtypes=(np.float64,), sizes=(1, 3, 8), gate_dtype=np.float64))
def test_adjoint_identity(isa, case):
    checks.gradients_are_the_adjoint(case)


@given(case=feature_cases(dtypes=HALVES))
def test_halves_are_float32_rounded_once(isa, case):
    checks.is_float32_rounded_once(case)


@given(case=feature_cases(times=(1, 2, 7), lengths=None))
def test_steps_are_the_scan(isa, case):
    checks.steps_are_the_scan(case)


@rules
@every_feature
def test_gradients_are_central_differences(isa, rule, features):
    case = make_case(
        rule, "channel", B=1, T=4, heads=(2, 1, 2), K=3, V=2, dtype=np.float64, scale=0.5, **features
    )
    checks.gradients_are_central_differences(case)


@rules
@every_feature
def test_float64_gradients_to_the_promised_digits(isa, rule, features):
    """Relative to the gradient alone."""
    case = make_case(rule, "scalar", T=40, heads=(4, 2, 1), K=9, V=33, dtype=np.float64, **features)
    exact = exact_gradients(case)
    for name, x, y in zip(exact._fields, gradients(case), exact, strict=True):
        assert relative_error(x, y) < 1e-12, name


@rules
@pytest.mark.parametrize("dtype", PRECISE)
@every_map
def test_fused_is_the_map_outside(isa, rule, dtype, features):
    """Bit for bit in the forward pass; gradients go through the map's own backward.

    FAVOR before a norm is taken at another scale, which the norm divides out.
    """
    case = make_case(rule, "channel", T=23, heads=(4, 2, 1), K=9, V=37, dtype=dtype, **features)
    phi = library_map(case.feature_map)
    outside = case.but(feature_map=None, q=phi(case.q), k=phi(case.k))
    if isinstance(phi, fwp.feature_maps.FAVOR) and case.qk_norm and phi.eps == 0:
        for x, y in zip(scan(case), scan(outside), strict=True):
            assert relative_error(x, y) < REORDERED[x.dtype]
    else:
        checks.assert_same_bits(scan(case), scan(outside))
    inner, fused = gradients(outside), gradients(case)
    through = inner._replace(dq=phi.backward(inner.dq, case.q), dk=phi.backward(inner.dk, case.k))
    for name, x, y in zip(fused._fields, fused, through, strict=True):
        assert relative_error(x, y) < TOLERANCE["gradient", x.dtype.name], name


@rules
@pytest.mark.parametrize("norm", ["sum", "l2"])
@pytest.mark.parametrize("dtype", PRECISE)
def test_fused_is_the_norm_outside(isa, rule, dtype, norm):
    case = make_case(rule, "channel", T=23, heads=(4, 2, 1), K=9, V=37, dtype=dtype, qk_norm=norm)

    def normalised(x):
        size = np.sum(x, axis=-1) if norm == "sum" else np.sqrt(np.sum(x**2, axis=-1))
        return x / size[..., None]

    outside = case.but(qk_norm=None, q=normalised(case.q), k=normalised(case.k))
    for x, y in zip(scan(case), scan(outside), strict=True):
        assert relative_error(x, y) < REORDERED[x.dtype]


@pytest.mark.parametrize("check", checks.PROMISES, ids=lambda check: check.__name__)
@rules
@few_features
def test_promises_of_every_scan(isa, rule, features, check):
    check(make_case(rule, "channel", T=15, K=9, V=37, **features))


@rules
@few_features
def test_packed_sequences_are_a_loop(isa, rule, features):
    case = make_case(rule, "channel", lengths=(7, 0, 1, 13, 6), heads=(2, 1, 4), K=5, V=40, **features)
    checks.packed_sequences_are_a_loop(case)


@rules
@few_features
def test_parts_are_the_whole(isa, rule, features):
    case = make_case(rule, "scalar", T=20, heads=(4, 2, 1), K=9, V=20, dtype=np.float64, **features)
    checks.parts_are_the_whole(case)


@few_features
@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
def test_many_value_tiles(isa, features, dtype):
    """Several tiles of values and parts of heads, each with a share of the gradients of features."""
    case = make_case("delta", "scalar", B=1, T=80, heads=(4, 2, 1), K=7, V=150, dtype=dtype, **features)
    if dtype is np.float32:
        checks.scan_is_the_oracles(case)
        checks.gradients_are_the_oracles(case)
        checks.threads_do_not_matter(case)
    else:
        checks.is_float32_rounded_once(case)


def test_long_sequence(isa):
    """Past any spacing of checkpoints."""
    features = {"feature_map": ("DPFP", 3), "qk_norm": "sum"}
    case = make_case("delta", "scalar", lengths=(1030, 0, 1), heads=(1, 1, 1), K=5, V=18, **features)
    checks.scan_is_the_oracles(case)
    checks.gradients_are_the_oracles(case)
    checks.vjp_is_scan_and_backward(case)


@few_features
def test_same_array_as_query_and_key(isa, features):
    case = make_case("delta", T=9, K=5, **features)
    case = case.but(q=case.k)
    checks.assert_same_bits(checks.results(case), checks.results(case.but(q=case.k.copy())))


@pytest.mark.parametrize("name", ["B", "T", "heads", "K", "V"])
@rules
@pytest.mark.parametrize(("feature_map", "qk_norm"), [(("ELU1",), "sum"), (("FAVOR", 3), None)])
def test_zero_sizes(isa, rule, feature_map, qk_norm, name):
    size = {name: (0, 0, 0) if name == "heads" else 0}
    case = make_case(rule, "channel", feature_map=feature_map, qk_norm=qk_norm, **size)
    checks.scan_is_the_oracles(case)
    checks.gradients_are_the_oracles(case)
    checks.every_result_is_written(case)
    scan(make_case(rule))  # the fixture wants a call
    if name == "T":
        assert_bits_equal(scan(case)[1], case.initial_state)


# Norms at their limits.


@pytest.mark.parametrize("dtype", PRECISE)
@rules
def test_rows_without_a_norm(isa, rule, dtype):
    """Sums and vectors of zero: the token reads and writes nothing, and gets no gradient."""
    for norm, row in (("sum", [1, -1, 2, -2]), ("sum", [0, 0, 0, 0]), ("l2", [0, 0, 0, -0.0])):
        case = make_case(rule, "scalar", T=9, K=4, V=20, dtype=dtype, qk_norm=norm)
        case.q[0, 3], case.k[0, 5], case.k[0, 6, 0] = row, row, row
        (o, _), result = scan(case), gradients(case)
        assert not np.any(o[0, 3])
        assert not np.any(result.dq[0, 3])
        assert not np.any(result.dk[0, 5])
        assert not np.any(result.dk[0, 6, 0])
        assert not np.any(result.dv[0, 5])
        checks.scan_is_the_oracles(case)
        checks.gradients_are_the_oracles(case)


@rules
def test_features_without_a_sum(isa, rule):
    """DPFP of a single non-zero entry, or of none, has no product that is not zero."""
    case = make_case(rule, T=9, K=4, V=20, feature_map=("DPFP", 1), qk_norm="sum")
    case.q[:, 2], case.k[:, 4] = [0, 0, 3, 0], [0, -2, 0, 0]
    (o, _), result = scan(case), gradients(case)
    assert not np.any(o[:, 2])
    assert not np.any(result.dq[:, 2])
    assert not np.any(result.dk[:, 4])
    checks.gradients_are_the_oracles(case)


def test_favor_that_underflows_everywhere(isa):
    """Where the original divides 0 by 0: zero features without a norm, of size 1 under one, no NaN."""
    for norm in NORMS:
        case = make_case("delta", T=9, K=4, V=20, feature_map=("FAVOR", 5), qk_norm=norm)
        case.q[:, 2] *= 1000
        case.k[:, 4] *= 1000
        (o, _), result = scan(case), gradients(case)
        if norm is None:
            assert not np.any(o[:, 2])
            assert not np.any(result.dq[:, 2])
            assert not np.any(result.dk[:, 4])
            checks.gradients_are_the_oracles(case)
        else:
            assert np.all(np.isfinite(o) & (o != 0))
            assert all(np.isfinite(x).all() for x in result if x is not None)


@rules
@pytest.mark.parametrize("qk_norm", ["sum", "l2"])
@pytest.mark.parametrize("length", [17.0, 45.0])
def test_long_rows_of_favor_under_a_norm_are_the_oracles(isa, rule, qk_norm, length):
    """exp(-45^2 / 2) is 0 in float64 too: only relative to their largest feature are there any."""
    options = {"feature_map": ("FAVOR", 5), "qk_norm": qk_norm}
    case = make_case(rule, T=9, K=4, V=20, dtype=np.float64, **options)
    case = case.but(q=length * case.q, k=length * case.k)
    checks.scan_is_the_oracles(case)
    for name, x, y in zip(fwp.Gradients._fields, gradients(case), exact_gradients(case), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            # exp(R x) has the rounding of R x, and its gradient is as long as x again.
            assert relative_error(x, y, floor=1e-3) < 1e-15 * length**3, name
    assert scan(case)[0].any(axis=-1).all()


@pytest.mark.parametrize(
    ("dtype", "power"), [(np.float32, 66), (np.float32, 120), (np.float64, 600), (np.float64, 1000)]
)
@pytest.mark.parametrize("sign", [-1, 1])
@rules
def test_l2_of_tiny_and_huge_vectors(isa, rule, dtype, power, sign):
    """|x|^2 under- or overflows, |x| does not: directions count; gradients are divided by |x|."""
    case = make_case(rule, "scalar", T=9, K=5, V=20, dtype=dtype, qk_norm="l2")
    size = dtype(2.0 ** (sign * power))
    scaled = case.but(q=case.q * size, k=case.k * size)
    for x, y in zip(scan(scaled), scan(case), strict=True):
        assert relative_error(x, y) < REORDERED[x.dtype]
    result, expected = gradients(scaled), gradients(case)
    tolerance = TOLERANCE["gradient", np.dtype(dtype).name]
    if power != 120:  # whose gradients would be subnormal
        result = result._replace(dq=result.dq * size, dk=result.dk * size)
        for x, y in zip(result, expected, strict=True):
            assert relative_error(x, y) < tolerance


@pytest.mark.parametrize("dtype", PRECISE)
def test_l2_of_subnormal_vectors(isa, dtype):
    """As exact as their digits are: unit vectors along an axis, and the diagonal."""
    tiny = np.finfo(dtype).smallest_subnormal
    k = np.array([[tiny, 0, 0], [0, -3 * tiny, 0], [tiny, tiny, tiny]], dtype).reshape(1, 3, 1, 3)
    _, state = fwp.linear_attention(k, k, np.ones((1, 3, 1, 1), dtype), qk_norm="l2")
    third = 3**-0.5
    np.testing.assert_allclose(state[0, 0, :, 0], [1 + third, third - 1, third], rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALVES)
def test_l2_of_the_largest_and_smallest_halves(isa, dtype):
    case = make_case("delta", T=6, K=5, V=7, dtype=dtype, qk_norm="l2")
    largest = 60000 if dtype is np.float16 else 1e38
    case.q[:, 1], case.k[:, 1] = dtype(largest), dtype(-largest)
    case.q[:, 2], case.k[:, 2] = np.finfo(np.float16).smallest_subnormal, dtype(1e-7)
    checks.is_float32_rounded_once(case)
    checks.scan_is_the_oracles(case)


def test_norm_of_the_values_of_a_map(isa):
    """The map comes first: the sum of ELU1 features is positive whatever the sum of x."""
    case = make_case("delta", T=5, K=4, V=3, dtype=np.float64, feature_map=("ELU1",), qk_norm="sum")
    case.q[:, 2] = [1, -1, 1, -1]
    assert np.all(scan(case)[0][:, 2] != 0)
    checks.scan_is_the_oracles(case)


# What is refused, by every function.

BAD_OPTIONS = [
    ("feature_map", "elu", fwp.DTypeError),
    ("feature_map", ("ELU1",), fwp.DTypeError),
    ("feature_map", np.tanh, fwp.DTypeError),
    ("feature_map", 1, fwp.DTypeError),
    ("feature_map", False, fwp.DTypeError),
    ("feature_map", "ReLU", fwp.DTypeError),
    ("qk_norm", "L2", fwp.ArgumentError),
    ("qk_norm", "", fwp.ArgumentError),
    ("qk_norm", "sum ", fwp.ArgumentError),
    ("qk_norm", "l2\0", fwp.ArgumentError),
    ("qk_norm", b"l2", fwp.DTypeError),
    ("qk_norm", 2, fwp.DTypeError),
    ("qk_norm", False, fwp.DTypeError),
    ("attention_norm", 1, fwp.DTypeError),
    ("attention_norm", None, fwp.DTypeError),
    ("attention_norm", "yes", fwp.DTypeError),
    ("attention_norm", np.zeros(1, bool), fwp.DTypeError),
    ("eps", -1e-9, fwp.ArgumentError),
    ("eps", np.inf, fwp.ArgumentError),
    ("eps", np.nan, fwp.ArgumentError),
    ("eps", "1e-6", fwp.DTypeError),
    ("eps", None, fwp.DTypeError),
    ("eps", 1j, fwp.DTypeError),
]


@EVERY_FUNCTION
@pytest.mark.parametrize(("name", "value", "error"), BAD_OPTIONS, ids=str)
def test_bad_options(function, name, value, error):
    message = refused(function, good(function) | {name: value}, error)
    assert message.startswith(f"{name}: expected ")
    assert ", got " in message


@EVERY_FUNCTION
def test_a_class_is_no_map(function):
    refused(function, good(function) | {"feature_map": fwp.feature_maps.ReLU}, fwp.DTypeError)


@pytest.mark.parametrize("fn", SCAN.values())
def test_bad_options_of_vjp(fn):
    arguments = good(FUNCTIONS[fn.__name__])
    for name, value, error in BAD_OPTIONS:
        with pytest.raises(error, match=f"^{name}: expected "):
            fwp.vjp(fn, **arguments, **{name: value})


@EVERY_FUNCTION
def test_good_options(function):
    """Options that change nothing where they have nothing to do."""
    plain = good(function)
    changed = good(function) | {"feature_map": None, "qk_norm": None, "attention_norm": False, "eps": 0.5}
    accepted(function, plain)
    accepted(function, changed)
    for name in function.outputs:
        if "." not in name:
            assert_bits_equal(changed[name], plain[name])
    for eps in (0, 1, 0.0, np.float32(1e-3), np.float64(0)):
        accepted(function, good(function) | {"eps": eps})


@EVERY_FUNCTION
def test_maps_that_do_not_fit(function):
    """Sizes and precisions belong together; K = 4 in good arguments."""
    projections = [(fwp.ShapeError, np.zeros((2, 3), np.float32)), (fwp.DTypeError, np.zeros((2, 4)))]
    for error, projection in projections:
        phi = fwp.feature_maps.FAVOR(projection)
        message = refused(function, good(function) | {"feature_map": phi}, error)
        assert "expected" in message
    refused(function, good(function) | {"feature_map": fwp.feature_maps.DPFP(8)}, fwp.ArgumentError)
    accepted(function, good(function) | {"feature_map": fwp.feature_maps.FAVOR(np.zeros((2, 4), np.float32))})


@EVERY_FUNCTION
def test_outputs_over_the_projection(function):
    """It is an input like any other."""
    for position in function.outputs:
        arguments = good(function)
        output = get(arguments, position)
        projection = output.ravel()[:8].reshape(2, 4)
        assert np.shares_memory(projection, output)
        projection[...] = 0.5
        arguments["feature_map"] = fwp.feature_maps.FAVOR(projection)
        message = refused(function, arguments, fwp.ArgumentError)
        assert (
            message == f"{position}: expected an output without overlap, but it shares memory with projection"
        )


@EVERY_FUNCTION
def test_states_and_gates_have_the_size_of_the_features(function):
    """DPFP(1) makes K = 8 of K_in = 4: what was good is refused, and the message has the K of the states."""
    for phi in (fwp.feature_maps.DPFP(1), fwp.feature_maps.FAVOR(np.zeros((4, 4), np.float32))):
        message = refused(function, good(function) | {"feature_map": phi}, fwp.ShapeError)
        assert "K=8" in message
        message = refused(function, good(function, channel=True) | {"feature_map": phi}, fwp.ShapeError)
        assert message.startswith("g: expected shape ")
        assert "K=8" in message


def test_interrupted_by_nothing_where_features_are_empty():
    """A huge time of rows without entries is no work."""
    T = 1 << 40
    x = np.zeros((1, T, 0, 4), np.float32)
    for phi in (fwp.feature_maps.ELU1(), fwp.feature_maps.DPFP(2)):
        o, state = fwp.linear_attention(x, x, x, feature_map=phi, qk_norm="sum")
        assert (o.shape, state.shape) == (x.shape, (1, 0, phi.dim(4), 4))


def test_exact_scan_is_asked_with_the_same_options():
    """The machinery itself: a map changes what library and oracle compute."""
    plain = make_case("linear", K=5, V=3, beta=False, state=False)
    mapped = plain.but(feature_map=("ReLU",), qk_norm="sum")
    assert relative_error(exact_scan(plain)[0], exact_scan(mapped)[0]) > 0.1
    assert relative_error(scan(mapped)[0], exact_scan(mapped)[0]) < 1e-5
    state = mapped.first_state()
    assert relative_error(steps(mapped, state), exact_scan(mapped)[0]) < 1e-5


@pytest.mark.parametrize("qk_norm", ["sum", "l2"])
@pytest.mark.parametrize("length", [1.0, 17.0, 40.0])
def test_favor_under_a_norm_neither_underflows_nor_overflows(isa, qk_norm, length):
    """exp(-|x|^2 / 2) is divided out: |x| = 17 is subnormal in float32, 40 is 0 in float64."""
    rng = np.random.default_rng(8)
    projection = fwp.feature_maps.orthogonal_gaussian(5, 4, 1, np.float64)
    q, k, v, do = rng.standard_normal((4, 1, 9, 2, 4))
    q, k = (length * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta = rng.random((1, 9, 2))

    def gradients_at(dtype):
        phi = fwp.feature_maps.FAVOR(projection.astype(dtype))
        x = [array.astype(dtype) for array in (do, q, k, v, beta)]
        return fwp.delta_rule_backward(*x, feature_map=phi, qk_norm=qk_norm)

    # The same features without the factor that the norm divides out.
    def features(x):
        Rx = x @ projection.T
        return np.exp(np.concatenate([Rx, -Rx], -1) - np.abs(Rx).max(-1, keepdims=True))

    phi = fwp.feature_maps.FAVOR(projection)
    o, _ = fwp.delta_rule(q, k, v, beta, feature_map=phi, qk_norm=qk_norm)
    expected, _ = fwp.delta_rule(features(q), features(k), v, beta, qk_norm=qk_norm)
    assert relative_error(o, expected) < 1e-12
    single, double = gradients_at(np.float32), gradients_at(np.float64)
    for x, y in zip(single[:4], double[:4], strict=True):
        assert np.isfinite(x).all()
        # exp(R x) has the rounding of R x, and its gradient is as long as x again.
        assert relative_error(x, y, floor=1e-3) < 1e-5 + 1e-6 * length**2
