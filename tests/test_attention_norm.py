"""attention_norm: reads divided by the accumulator z, the last column of the states (paper, eqs. 26-28)."""

import checks
import numpy as np
import pytest
from arguments import FUNCTIONS, accepted, good, refused
from cases import (
    DECAYS,
    DTYPES,
    HALVES,
    PRECISE,
    RULES,
    SCAN,
    exact_gradients,
    exact_scan,
    gradients,
    make_case,
    scan,
    steps,
)
from hypothesis import given
from strategies import feature_cases
from tolerances import CENTRAL_DIFFERENCE, REORDERED, TOLERANCE, assert_bits_equal, relative_error

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])
rules = pytest.mark.parametrize("rule", RULES)
# Features as they are, of one map, of a map with a norm; all are positive.
features = pytest.mark.parametrize(
    "features",
    [{}, {"feature_map": ("DPFP", 1)}, {"feature_map": ("ELU1",), "qk_norm": "sum"}],
    ids=["plain", "DPFP", "ELU1-sum"],
)
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def normalised_case(*arguments, **options):
    return make_case(*arguments, attention_norm=True, **options)


@given(case=feature_cases(attention_norm=True))
def test_scan_is_the_oracles(isa, case):
    checks.scan_is_the_oracles(case)


@given(case=feature_cases(attention_norm=True))
def test_gradients_are_the_oracles(isa, case):
    checks.gradients_are_the_oracles(case)


@given(case=feature_cases(attention_norm=True, gates=("mild", "reset"), eps=0.0))
def test_no_eps(isa, case):
    """The zeros are those of z.k and z.q alone."""
    checks.scan_is_the_oracles(case)
    checks.gradients_are_the_oracles(case)


@given(case=feature_cases(attention_norm=True, dtypes=(np.float64,), sizes=(1, 3, 8), gate_dtype=np.float64))
def test_adjoint_identity(isa, case):
    checks.gradients_are_the_adjoint(case)


@given(case=feature_cases(attention_norm=True, dtypes=HALVES))
def test_halves_are_float32_rounded_once(isa, case):
    checks.is_float32_rounded_once(case)


@given(case=feature_cases(attention_norm=True, times=(1, 2, 7), lengths=None))
def test_steps_are_the_scan(isa, case):
    checks.steps_are_the_scan(case)


@all_scans
@features
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_gradients_are_central_differences(isa, rule, decay, features, eps):
    options = {"dtype": np.float64, "scale": 0.5, "eps": eps, **features}
    case = normalised_case(rule, decay, B=1, T=5, heads=(2, 1, 2), K=3, V=2, **options)
    checks.gradients_are_central_differences(case)


@all_scans
@features
def test_float64_gradients_to_the_promised_digits(isa, rule, decay, features):
    """Relative to the gradient alone."""
    options = {"heads": (4, 2, 1), "dtype": np.float64, **features}
    case = normalised_case(rule, decay, T=40, K=9, V=33, **options)
    exact = exact_gradients(case)
    for name, x, y in zip(exact._fields, gradients(case), exact, strict=True):
        if y is not None:
            assert relative_error(x, y) < 1e-12, name


@pytest.mark.parametrize("check", checks.PROMISES, ids=lambda check: check.__name__)
@all_scans
@pytest.mark.parametrize("feature_map", [None, ("ELU1",)], ids=str)
def test_promises_of_every_scan(isa, rule, decay, feature_map, check):
    check(normalised_case(rule, decay, T=15, K=9, V=37, feature_map=feature_map))


@rules
@features
def test_packed_sequences_are_a_loop(isa, rule, features):
    options = {"heads": (2, 1, 4), "gate": "reset", **features}
    case = normalised_case(rule, "channel", lengths=(7, 0, 1, 13, 6), K=5, V=40, **options)
    checks.packed_sequences_are_a_loop(case)
    checks.gradients_are_the_oracles(case)


@all_scans
@features
def test_parts_are_the_whole(isa, rule, decay, features):
    """z goes on with the state, and its gradient comes back."""
    options = {"heads": (4, 2, 1), "dtype": np.float64, **features}
    checks.parts_are_the_whole(normalised_case(rule, decay, T=20, K=9, V=20, **options))


@all_scans
@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
def test_many_value_tiles(isa, rule, decay, dtype):
    """z is shared by all tiles, and each adds to its gradient: in tile order, whatever the threads."""
    case = normalised_case(rule, decay, B=1, T=80, heads=(4, 2, 1), K=7, V=150, dtype=dtype)
    if dtype is np.float32:
        checks.scan_is_the_oracles(case)
        checks.gradients_are_the_oracles(case)
        checks.threads_do_not_matter(case)
    else:
        checks.is_float32_rounded_once(case)


@rules
def test_every_value_size(isa, rule):
    """z lies behind V columns: at the end of a tile, in a tile of its own, anywhere."""
    for V in range(70):
        case = normalised_case(rule, "scalar", B=1, T=1 + V % 13, heads=(1, 1, 1), K=1 + V % 5, V=V)
        checks.scan_is_the_oracles(case)
        checks.gradients_are_the_oracles(case)


@all_scans
def test_float32_error_of_long_sequences(isa, rule, decay):
    case = normalised_case(rule, decay, B=1, T=1500, heads=(1, 1, 1), K=16, V=20, feature_map=("ELU1",))
    for x, y in zip(scan(case), exact_scan(case), strict=True):
        assert relative_error(x, y) < TOLERANCE["forward", "float32"]
    checks.gradients_are_the_oracles(case)
    checks.vjp_is_scan_and_backward(case)


@pytest.mark.parametrize("name", ["B", "T", "heads", "K", "V"])
@all_scans
def test_zero_sizes(isa, rule, decay, name):
    case = normalised_case(rule, decay, **{name: (0, 0, 0) if name == "heads" else 0})
    for one in (case, case.but(initial_state=None, dfinal_state=None)):
        checks.scan_is_the_oracles(one)
        checks.gradients_are_the_oracles(one)
        checks.every_result_is_written(one)
    scan(make_case(rule))  # the fixture wants a call
    if name == "T":
        assert_bits_equal(scan(case)[1], case.initial_state)
        assert_bits_equal(gradients(case).dinitial_state, case.dfinal_state)
    if name == "V":
        state = case.first_state()
        steps(case, state)
        assert state.shape[-1] == 1
        assert relative_error(state, scan(case)[1]) < REORDERED[state.dtype]


@all_scans
@pytest.mark.parametrize("seed", range(3))
def test_normalisers_of_any_sign(isa, rule, decay, seed):
    """Features of both signs: divisors near zero cost digits, not meaning."""
    case = normalised_case(rule, decay, T=13, K=4, V=18, dtype=np.float64, seed=seed)
    rng = np.random.default_rng(seed)
    case = case.but(
        q=case.q * rng.choice([-1, 1], case.q.shape), k=case.k * rng.choice([-1, 1], case.k.shape)
    )
    exact = [*exact_scan(case), *exact_gradients(case)]
    for x, y in zip(checks.results(case), exact, strict=True):
        if y is not None:
            assert relative_error(x, y) < CENTRAL_DIFFERENCE


# The accumulator.


@all_scans
@pytest.mark.parametrize("dtype", PRECISE)
def test_the_accumulator_is_a_linear_scan_of_ones(isa, rule, decay, dtype):
    """z = a z + k: beta, values and the rule never enter."""
    case = normalised_case(rule, decay, T=30, K=9, V=20, dtype=dtype, gate="reset")
    ones = case.but(
        rule="linear",
        v=np.ones_like(case.v[..., :1]),
        beta=None,
        initial_state=np.ascontiguousarray(case.initial_state[..., 20:]),
        do=case.do[..., :1],
        attention_norm=False,
    )
    _, state = scan(case)
    assert relative_error(state[..., 20:], scan(ones)[1]) < REORDERED[state.dtype]
    other = case.but(beta=0.3 * case.beta, v=-2 * case.v)
    assert_bits_equal(scan(other)[1][..., 20], state[..., 20])


@rules
def test_a_constant_value_is_read_as_it_is(isa, rule):
    """Weights that sum to one: o = scale v by the linear rule, and by either at the first token."""
    case = normalised_case(rule, "scalar", T=20, K=9, V=20, dtype=np.float64, eps=0.0, state=False, scale=3.0)
    case = case.but(v=np.broadcast_to(case.v[:, :1], case.v.shape), beta=np.ones_like(case.beta))
    o, _ = scan(case)
    exact = 3 * case.v
    assert relative_error(o[:, :1], exact[:, :1]) < 1e-14
    if rule == "linear":
        assert relative_error(o, exact) < 1e-14


def test_the_first_token_predicts_nothing(isa):
    """z = 0: v~ = 0 with eps and without, the delta rule writes what the linear rule writes."""
    for eps in (0.0, 1e-6, 1.0):
        case = normalised_case("delta", "scalar", T=1, K=9, V=37, state=False, eps=eps)
        checks.assert_same_bits(scan(case), scan(case.but(rule="linear")))
        checks.gradients_are_the_oracles(case)


def quadrants(case, order):
    """Rows of two entries in the quadrants of this order, whose DPFP features have disjoint supports."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])[np.asarray(order)]
    magnitude = 0.5 + np.random.default_rng(0).random((*case.k.shape[:3], 2))
    return (magnitude * signs[:, None]).astype(case.k.dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", PRECISE)
def test_keys_that_share_no_feature_predict_nothing(isa, dtype, eps):
    """v~ = 0 where z.k = 0; where a support comes again, eqs. 27 and 28."""
    options = {"feature_map": ("DPFP", 1), "dtype": dtype, "state": False, "eps": eps}
    case = normalised_case("delta", T=4, K=2, V=37, **options)
    case = case.but(k=quadrants(case, [0, 2, 1, 3]))
    for x, y in zip(scan(case), scan(case.but(rule="linear")), strict=True):
        assert relative_error(x, y) < REORDERED[x.dtype]
    checks.gradients_are_the_oracles(case)

    case = normalised_case("delta", T=7, K=2, V=37, **options)
    case = case.but(k=quadrants(case, [0, 2, 0, 0, 3, 2, 1]))
    checks.scan_is_the_oracles(case)
    checks.gradients_are_the_oracles(case)
    exact = exact_scan(case.but(rule="linear"))[1]
    assert relative_error(scan(case)[1], exact) > 0.01


@all_scans
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_queries_that_share_no_feature_read_nothing(isa, rule, decay, eps):
    """o = 0 where z.q = 0, and no gradient comes from there, whatever do."""
    options = {"feature_map": ("DPFP", 1), "state": False, "eps": eps}
    case = normalised_case(rule, decay, T=8, K=2, V=37, **options)
    keys, queries = [0, 1, 0, 1, 2, 1, 0, 0], [1, 2, 3, 0, 3, 2, 3, 1]
    case = case.but(k=quadrants(case, keys), q=quadrants(case, queries))
    nothing = np.array([query not in keys[: t + 1] for t, query in enumerate(queries)])
    assert nothing.tolist() == [True, True, True, False, True, False, True, False]
    (o, _), result = scan(case), gradients(case)
    assert not np.any(o[:, nothing])
    assert np.all(o[:, ~nothing])
    assert not np.any(result.dq[:, nothing])
    checks.scan_is_the_oracles(case)
    checks.gradients_are_the_oracles(case)
    for anything in (0, np.inf, np.nan):
        silent = case.but(do=np.where(nothing[:, None, None], np.float32(anything), case.do))
        checks.assert_same_bits(gradients(silent), result)


@rules
def test_zero_reads_are_selects(isa, rule):
    """Not even NaN among the values gets through a read without a normaliser."""
    case = normalised_case(rule, T=4, K=2, V=37, feature_map=("DPFP", 1), state=False)
    case = case.but(k=quadrants(case, [0, 1, 2, 3]), q=quadrants(case, [0, 2, 3, 3]))
    case.v[:, 0, :, 5] = np.nan
    o, _ = scan(case)
    assert np.isnan(o[:, 0, :, 5]).all()
    assert not np.any(o[:, 1:3])
    checks.scan_is_the_oracles(case)


@rules
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_a_reset_clears_the_accumulator(isa, rule, decay):
    """After g = -inf everything is as at the start, even after NaN, and nothing flows back."""
    case = normalised_case(rule, decay, T=20, K=9, V=21, feature_map=("ELU1",))
    case.g[:, 8] = -np.inf
    poisoned = case.map(np.copy)
    poisoned.k[:, 5] = np.nan
    fresh = case.at(slice(8, None)).but(initial_state=None)
    o, state = scan(poisoned)
    assert np.isnan(o[:, 5:8]).all()
    for x, y in zip((o[:, 8:], state), scan(fresh), strict=True):
        assert relative_error(x, y) < REORDERED[x.dtype]

    case.do[:, :8] = 0
    result = gradients(case)
    for name in ("dq", "dk", "dv", "dbeta"):
        assert not np.any(getattr(result, name)[:, :8]), name
    assert not np.any(result.dg[:, :9])
    assert not np.any(result.dinitial_state)
    checks.gradients_are_the_oracles(case)


@rules
def test_some_channels_are_reset(isa, rule):
    """z of the other channels goes on."""
    case = normalised_case(rule, "channel", T=15, K=9, V=21)
    case.g[:, ::3, :, ::2] = -np.inf
    checks.scan_is_the_oracles(case)
    checks.gradients_are_the_oracles(case)


@all_scans
@pytest.mark.parametrize("only", ["dfinal_state", "do"])
def test_gradients_through_the_accumulator_alone(isa, rule, decay, only):
    """A loss of z_T alone reaches keys, gates and z_0, and nothing else; one of the outputs reaches z_0."""
    case = normalised_case(rule, decay, T=12, K=5, V=7, dtype=np.float64)
    if only == "dfinal_state":
        case.do[...] = 0
        case.dfinal_state[..., :7] = 0
        result = gradients(case)
        assert not np.any(result.dq)
        assert not np.any(result.dv)
        assert not np.any(result.dbeta)
        assert not np.any(result.dinitial_state[..., :7])
    else:
        case.dfinal_state[...] = 0
        result = gradients(case)
    assert np.all(result.dk)
    assert np.all(result.dinitial_state[..., 7])
    exact = exact_gradients(case)
    for name, x, y in zip(exact._fields, result, exact, strict=True):
        if y is not None:
            assert relative_error(x, y) < 1e-12, name


@pytest.mark.parametrize("dtype", DTYPES)
@rules
def test_first_steps_from_nothing(isa, rule, dtype):
    """Decoding from a zero state, with queries and keys that share no feature at first."""
    case = normalised_case(rule, T=9, K=2, V=37, dtype=dtype, feature_map=("DPFP", 1), state=False)
    keys, queries = [0, 1, 2, 3, 3, 2, 1, 0, 0], [1, 1, 3, 3, 2, 0, 0, 1, 2]
    case = case.but(k=quadrants(case, keys), q=quadrants(case, queries))
    checks.steps_are_the_scan(case)


def test_eps_is_part_of_the_denominator(isa):
    """By hand: v~ = S'^T k / (z'.k + eps), o = scale S^T q / (z.q + eps)."""
    k, q = np.array([[1.0, 2.0], [2.0, 1.0]]).reshape(2, 1, 1, 1, 2)
    state = np.array([[1.0, 4.0], [3.0, 2.0]]).reshape(1, 1, 2, 2)
    v, beta = np.full((1, 1, 1, 1), 5.0), np.full((1, 1, 1), 0.5)
    # S = [1, 3], z = [4, 2]: v~ = 7 / (8 + 2), u = (5 - 0.7) / 2 = 2.15, S = [3.15, 7.3], z = [5, 4].
    o, final = fwp.delta_rule(q, k, v, beta, scale=10.0, initial_state=state, attention_norm=True, eps=2.0)
    np.testing.assert_allclose(final[0, 0], [[3.15, 5], [7.3, 4]], rtol=1e-15)
    np.testing.assert_allclose(o.ravel(), [10 * (2 * 3.15 + 7.3) / (2 * 5 + 4 + 2)], rtol=1e-15)


@pytest.mark.parametrize("qk_norm", [None, "sum"])
def test_reading_back_what_was_written(isa, qk_norm):
    """((s - beta n) v~ + beta n v) / (s + n): the new value's share falls as s grows."""
    options = {"dtype": np.float64, "eps": 0.0, "qk_norm": qk_norm, "feature_map": ("ELU1",)}
    case = normalised_case("delta", B=3, T=1, heads=(1, 1, 1), K=5, V=4, **options)
    case = case.but(q=case.k)
    phi = fwp.feature_maps.ELU1()(case.k)
    phi = phi / phi.sum(axis=-1, keepdims=True) if qk_norm else phi
    sums, n = np.einsum("bthk,bhkv->bthv", phi, case.initial_state), np.sum(phi**2, axis=-1, keepdims=True)
    s, new = sums[..., 4:], case.beta[..., None] * n
    expected = ((s - new) * sums[..., :4] / s + new * case.v) / (s + n)
    np.testing.assert_allclose(scan(case)[0], expected, rtol=1e-12)


def test_the_accumulator_counts_tokens_under_the_sum_norm(isa):
    case = normalised_case("delta", T=50, K=6, V=3, state=False, feature_map=("DPFP", 3), qk_norm="sum")
    z = scan(case)[1][..., 3]
    np.testing.assert_allclose(z.sum(axis=-1), 50, rtol=1e-6)


# Shapes of states.


@EVERY_FUNCTION
def test_states_have_one_more_column(function):
    """V = 6 columns, good without z, are refused by name; V + 1 = 7 are taken."""
    arguments = good(function) | {"attention_norm": True}
    message = refused(function, arguments, fwp.ShapeError)
    assert "V+1=7" in message
    assert "state" in message.split(":")[0]

    def with_z(x):
        return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)

    for name, x in arguments.items():
        if "state" in name:
            arguments[name] = with_z(x)
    if function.kind == "backward":
        out = arguments["out"]
        arguments["out"] = out._replace(dinitial_state=with_z(out.dinitial_state))
    accepted(function, arguments)
    refused(function, arguments | {"attention_norm": False}, fwp.ShapeError)


@rules
def test_an_accumulator_beyond_the_range_is_not_an_empty_one(isa, rule):
    """inf / inf is NaN, and only z.q = 0 makes a read 0."""
    one = np.full((1, 3, 1, 1), 1e160)
    beta = np.ones((1, 3, 1))
    o, _ = SCAN[rule](one, one, np.ones_like(one), beta, attention_norm=True)
    assert np.isnan(o).all()


# The gate of RFA (paper, appendix B), as docs/rules.md writes it.


def gated_by_hand(q, k, v, beta):
    """W_i = (1 - beta) W + beta v (x) phi(k), and z gated alike: W phi(q), and that over z.phi(q)."""
    (B, T, H, K), V = k.shape, v.shape[-1]
    W, z = np.zeros((B, H, V, K)), np.zeros((B, H, K))
    plain, divided = np.zeros((2, B, T, H, V))
    for i in range(T):
        b = beta[:, i, :, None]
        W = (1 - b[..., None]) * W + b[..., None] * v[:, i, :, :, None] * k[:, i, :, None, :]
        z = (1 - b) * z + b * k[:, i]
        plain[:, i] = np.einsum("bhvk,bhk->bhv", W, q[:, i])
        divided[:, i] = plain[:, i] / np.sum(z * q[:, i], axis=-1, keepdims=True)
    return plain, divided


@pytest.mark.parametrize("phi", [fwp.feature_maps.ELU1(), fwp.feature_maps.Softmax()], ids=str)
def test_the_gate_of_rfa(isa, phi):
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((3, 2, 30, 3, 6))
    beta = rng.uniform(0.01, 0.99, (2, 30, 3))
    beta[:, 12] = 1
    with np.errstate(divide="ignore"):
        g = np.log1p(-beta)
    plain, divided = gated_by_hand(phi(q), phi(k), v, beta)
    o, _ = fwp.linear_attention(q, k, v, beta, g, feature_map=phi)
    assert relative_error(o, plain) < 1e-13

    recipe = (phi(q), beta[..., None] * phi(k), v, None, g)
    o, _ = fwp.linear_attention(*recipe, attention_norm=True, eps=0.0)
    assert relative_error(o, divided) < 1e-12


def test_beta_does_not_gate_the_accumulator(isa):
    """So that the recipe above has to pass beta * phi(k), and no beta."""
    rng = np.random.default_rng(4)
    q, k = rng.random((2, 1, 20, 1, 5))
    v, beta = rng.standard_normal((1, 20, 1, 4)), rng.uniform(0.1, 0.9, (1, 20, 1))
    _, divided = gated_by_hand(q, k, v, beta)
    o, _ = fwp.linear_attention(q, k, v, beta, np.log1p(-beta), attention_norm=True, eps=0.0)
    assert relative_error(o, divided) > 0.1
