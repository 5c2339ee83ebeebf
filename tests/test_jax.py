"""The library on JAX arrays: the bits of the NumPy path under every transformation, and loud errors."""

import functools
import importlib.util
import re
import threading
from pathlib import Path

import cases
import numpy as np
import pytest
from cases import DTYPES, MAPS, make_case
from checks import assert_same_bits
from processes import run_python
from tolerances import TOLERANCE, assert_close, relative_error

import fwp_core as fwp

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from jax_cases import BACKWARD, INPUTS, SCAN, STEP, arrays, cotangents, function, gradients, inputs, precision

import fwp_core.jax

# What XLA raises for the error of a custom call depends on its version, and on whether it waits for the call.
XLA_ERRORS = (RuntimeError, ValueError)
ROOT = Path(__file__).parents[1]
SMALL = {"B": 2, "T": 5, "K": 3, "V": 4, "heads": (1, 1, 1)}


def bits(case):
    """Results and gradients of the case by NumPy."""
    return [*cases.scan(case), *cases.gradients(case)]


def on_jax(case):
    """The same by JAX."""
    return arrays([*function(case)(inputs(case)), *gradients(case)])


VARIANTS = {
    "plain": {},
    "scalar gates": {"decay": "scalar"},
    "channel gates": {"decay": "channel", "gate": "mixed"},
    "grouped heads": {"heads": (2, 1, 4), "decay": "scalar"},
    "no state": {"state": False},
    "packed": {"lengths": (3, 0, 9), "decay": "channel"},
    "attention norm": {"feature_map": ("ELU1",), "attention_norm": True, "eps": 1e-3, "qk_norm": "sum"},
    "l2": {"qk_norm": "l2", "scale": 0.25},
    "empty": {"T": 0},
}


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_have_the_bits_of_numpy(rule, variant):
    case = make_case(rule, **VARIANTS[variant])
    assert_same_bits(on_jax(case), bits(case))


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(rule, dtype):
    case = make_case(rule, "channel", dtype=dtype, gate_dtype=np.float32 if dtype != np.float64 else dtype)
    with precision(dtype):
        results = on_jax(case)
    assert_same_bits(results, bits(case))


@pytest.mark.parametrize("spec", MAPS, ids=str)
@pytest.mark.parametrize("norm", [None, "sum"])
def test_every_feature_map(spec, norm):
    case = make_case("delta", feature_map=spec, qk_norm=norm, T=6)
    assert_same_bits(on_jax(case), bits(case))


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_jit_changes_no_bit(rule):
    case = make_case(rule, "scalar")
    results = arrays(jax.jit(function(case))(inputs(case)))
    traced = jax.jit(lambda given: jax.vjp(function(case), given)[1](cotangents(case, cases.scan(case)))[0])
    found = traced(inputs(case))
    assert_same_bits([*results, *arrays(found.get(name) for name in INPUTS)], bits(case))


def test_linear_attention_without_beta():
    case = make_case("linear", beta=False, state=False)
    assert_same_bits(on_jax(case), bits(case))


def test_results_are_jax_arrays():
    case = make_case()
    o, final_state = function(case)(inputs(case))
    assert isinstance(o, jax.Array)
    assert isinstance(final_state, jax.Array)
    assert fwp.jax is fwp_core.jax


def test_subnormal_numbers_are_not_flushed():
    """XLA computes with them flushed to zero, on whose threads the kernel runs."""
    q = np.full((1, 1, 1, 1), 1.0, np.float32)
    v = np.full((1, 1, 1, 1), 1e-40, np.float32)
    o, _ = jax.jit(fwp.linear_attention)(*map(jnp.asarray, (q, q, v)))
    assert_same_bits(arrays([o]), [fwp.linear_attention(q, q, v)[0]])
    assert np.asarray(o).view(np.uint32).all()


# Gradients.


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize(
    "options",
    [
        {"decay": "scalar"},
        {"decay": "channel", "lengths": (2, 0, 3)},
        {"feature_map": ("DPFP", 1), "qk_norm": "sum"},
    ],
    ids=str,
)
def test_gradients_by_differences(rule, options):
    case = make_case(rule, **SMALL | options, dtype=np.float64)
    with precision(np.float64):
        check_grads(function(case), (inputs(case),), order=1, modes=["rev"])


SECOND = [
    ("delta", {"decay": "channel", "heads": (2, 1, 1)}),
    ("linear", {"feature_map": ("ELU1",), "attention_norm": True}),
]
MORE = [
    {"decay": "scalar"},
    {"lengths": (2, 0, 2)},
    {"feature_map": ("FAVOR", 2), "qk_norm": "sum"},
    {"feature_map": ("DPFP", 2), "qk_norm": "l2", "state": False},
]
SECOND += [pytest.param(rule, more, marks=pytest.mark.slow) for rule in ("linear", "delta") for more in MORE]


@pytest.mark.parametrize(("rule", "options"), SECOND, ids=str)
def test_second_derivatives(rule, options):
    """Of a scan that says so, against differences of first ones; first ones keep their bits."""
    case = make_case(rule, **SMALL | {"T": 4, "B": 1} | options, dtype=np.float64)
    scan = {"linear": fwp.jax.linear_attention, "delta": fwp.jax.delta_rule}[rule]
    with precision(np.float64):
        twice = function(case, scan, twice_differentiable=True)
        first = jax.jit(lambda given: jax.vjp(twice, given)[1](cotangents(case, cases.scan(case)))[0])
        found = first(inputs(case))
        assert_same_bits(arrays(found.get(name) for name in INPUTS), list(cases.gradients(case)))
        check_grads(first, (inputs(case),), order=1, modes=["rev"])


def test_second_derivatives_of_halves():
    case = make_case(**SMALL, dtype=np.float16)
    given = inputs(case)

    def energy(q):
        o, _ = fwp.jax.delta_rule(**given | {"q": q}, twice_differentiable=True)
        return jnp.sum(o.astype(jnp.float32) ** 2)

    second = jax.jit(jax.grad(lambda q: jnp.sum(jax.grad(energy)(q).astype(jnp.float32) ** 2)))(given["q"])
    assert second.dtype == jnp.float16
    # o is linear in q: o = M q for every token, so that energy has the Hessian 2 M^T M.
    rows = _read_outs(case)[:, :, 0]
    first = 2 * jnp.einsum("btkv,btlv,btl->btk", rows, rows, given["q"][:, :, 0].astype(jnp.float32))
    exact = 4 * jnp.einsum("btkv,btlv,btl->btk", rows, rows, first)
    assert relative_error(second[:, :, 0], exact) < 8 * TOLERANCE["gradient", "float16"]


def _read_outs(case):
    """The states [B,T,H,K,V] after every token."""
    wide = case.map(lambda x: x.astype(np.float32))
    return jnp.stack([cases.scan(wide.at(slice(t + 1)))[1] for t in range(case.v.shape[1])], axis=1)


@pytest.mark.slow
def test_third_derivatives():
    """Of a sum of cubes of o, which is linear in v."""
    case = make_case(**SMALL | {"T": 2, "B": 1}, state=False)
    given = inputs(case)

    def run(v):
        return fwp.jax.delta_rule(**given | {"v": v}, twice_differentiable=True)[0]

    def along(f):
        return lambda v: jnp.vdot(jax.grad(f)(v), v)

    v = given["v"]
    third = jax.jit(along(along(along(lambda v: jnp.sum(run(v) ** 3)))))(v)
    assert relative_error(third, 27 * jnp.sum(run(v) ** 3)) < TOLERANCE["gradient", "float32"]


@pytest.mark.parametrize("used", ["o", "final_state"])
def test_a_result_that_nobody_uses_has_no_cotangent(used):
    case = make_case("delta", "scalar")
    given = inputs(case)
    index = ("o", "final_state").index(used)
    found = jax.grad(lambda given: jnp.sum(function(case)(given)[index]))(given)
    o, final_state = (np.zeros_like(x) for x in cases.scan(case))
    (o, final_state)[index][...] = 1
    expected = cases.gradients(case.but(do=o, dfinal_state=final_state))
    assert_same_bits(arrays(found.get(name) for name in INPUTS), list(expected))


def test_gradients_of_some_inputs_only():
    case = make_case("delta", "scalar")
    given = inputs(case)
    whole = gradients(case)
    for i, name in enumerate(INPUTS):
        results, pullback = jax.vjp(lambda x, name=name: function(case)(given | {name: x}), given[name])
        assert_same_bits(arrays(pullback(cotangents(case, results))), arrays([whole[i]]))


def test_checkpoint_and_scan_and_cond():
    case = make_case("delta", "scalar")
    results = cases.scan(case)
    for wrap in (jax.checkpoint, lambda f: lambda given: jax.lax.cond(True, f, f, given)):
        pullback = jax.vjp(jax.jit(wrap(function(case))), inputs(case))[1]
        (found,) = pullback(cotangents(case, results))
        assert_same_bits(arrays(found.get(name) for name in INPUTS), list(cases.gradients(case)))


def test_differentiated_inside_of_a_scan():
    """Segment after segment, the state going through: the gradient of the whole."""
    case = make_case("delta", T=12)
    given = inputs(case)
    start = given.pop("initial_state")

    def segments(given, start):
        parts = {name: jnp.moveaxis(x.reshape(2, 3, 4, *x.shape[2:]), 1, 0) for name, x in given.items()}

        def segment(state, part):
            return fwp.delta_rule(**part, initial_state=state)[::-1]

        state, o = jax.lax.scan(segment, start, parts)
        return jnp.moveaxis(o, 0, 1).reshape(case.do.shape), state

    results, pullback = jax.vjp(segments, given, start)
    grads, dstart = pullback(cotangents(case, results))
    for name, exact in zip(INPUTS, cases.exact_gradients(case), strict=True):
        if exact is not None:
            assert_close(np.asarray({**grads, "initial_state": dstart}[name]), exact, "gradient", name)


# vmap.


def stacked(case, count=3):
    """Samples that differ, along a new first axis, and each by itself."""
    singles = [make_case(case.rule, "scalar", seed=seed) for seed in range(count)]
    return {name: jnp.stack([inputs(single)[name] for single in singles]) for name in inputs(case)}, singles


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_vmap_is_a_loop(rule):
    case = make_case(rule, "scalar")
    together, singles = stacked(case)

    def both(given):
        results, pullback = jax.vjp(function(case), given)
        found = pullback(cotangents(case, results))[0]
        return [*results, *(found.get(name) for name in INPUTS)]

    found = jax.vmap(both)(together)
    for n, single in enumerate(singles):
        expected = bits(single.but(do=case.do, dfinal_state=case.dfinal_state))
        assert_same_bits([np.asarray(x[n]) for x in found], expected)


@pytest.mark.parametrize(
    "shared", [("beta",), ("q", "initial_state"), ("k", "v", "beta", "g", "initial_state")]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_with_inputs_that_have_no_axis(shared, axis):
    case = make_case("delta", "scalar")
    together, _ = stacked(case)
    axes = {name: None if name in shared else axis for name in together}
    mixed = {
        name: inputs(case)[name] if name in shared else jnp.moveaxis(x, 0, axis)
        for name, x in together.items()
    }
    grad = jax.grad(lambda given: sum(map(jnp.sum, function(case)(given))))
    found = jax.vmap(grad, in_axes=(axes,))(mixed)
    for n in range(3):
        one = {name: inputs(case)[name] if name in shared else together[name][n] for name in together}
        assert_same_bits(arrays(x[n] for x in found.values()), arrays(grad(one).values()))


def test_vmap_over_cotangents_only_and_twice():
    """One forward pass, whose checkpoints every sample of the backward pass shares."""
    case = make_case("delta", "scalar", T=40)
    results, pullback = jax.vjp(function(case), inputs(case))
    do, dfinal_state = cotangents(case, results)
    many = jnp.stack([do, 2 * do, -do])
    found = jax.vmap(lambda do: pullback((do, dfinal_state))[0])(many)
    for n in range(3):
        assert_same_bits(
            arrays(x[n] for x in found.values()), arrays(pullback((many[n], dfinal_state))[0].values())
        )

    together, _ = stacked(case, 2)

    def rows(given):
        results, pullback = jax.vjp(function(case), given)
        do, dfinal_state = jnp.ones_like(results[0]), jnp.ones_like(results[1])
        return jax.vmap(lambda scale: pullback((scale * do, dfinal_state))[0]["k"])(jnp.arange(3.0))

    found = jax.vmap(rows)(together)
    for n in range(2):
        assert_same_bits(arrays([found[n]]), arrays([rows({name: x[n] for name, x in together.items()})]))


def test_vmap_of_packed_sequences_and_projections():
    case = make_case("delta", lengths=(3, 0, 9))
    other = np.array([0, 5, 6, 12])
    given = inputs(case)
    offsets = jnp.array([case.cu_seqlens, other])
    o, final_state = jax.vmap(lambda c: fwp.delta_rule(**given, cu_seqlens=c))(offsets)
    for n, lengths in enumerate((case.cu_seqlens, other)):
        assert_same_bits(arrays([o[n], final_state[n]]), list(cases.scan(case.but(cu_seqlens=lengths))))

    case = make_case("linear", state=False)
    R = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    favor = fwp.feature_maps.FAVOR

    def mapped(R):
        o, pullback = jax.vjp(
            lambda v: fwp.linear_attention(**inputs(case) | {"v": v}, feature_map=favor(R))[0], case.v
        )
        return o, *pullback(jnp.asarray(case.do))

    o, dv = jax.vmap(mapped)(jnp.asarray(R))
    for n in range(2):
        expected = bits(case.but(feature_map=("FAVOR", R[n])))
        assert_same_bits(arrays([o[n], dv[n]]), [expected[0], expected[4]])


# Meshes.


def placed(case, mesh, spec):
    """The inputs on a mesh, all but the state sharded; the state is on every device."""
    given = {name: (x, spec) for name, x in inputs(case).items()}
    given["initial_state"] = given["initial_state"][0], PartitionSpec()
    return {name: jax.device_put(x, NamedSharding(mesh, s)) for name, (x, s) in given.items()}


def check_on_mesh(mesh, spec):
    """Scan, gradients, vjp, a step and a map have the bits of NumPy; gradients lie as what they are of."""
    case = make_case("delta", "scalar", B=4, T=6, V=5)
    given = placed(case, mesh, spec)
    do, dfinal_state = cotangents(case, cases.scan(case))

    def by_vjp(given):
        results, pullback = fwp.vjp(fwp.delta_rule, **given)
        return [*results, *pullback(do, dfinal_state)]

    def by_jax(given):
        results, pullback = jax.vjp(function(case), given)
        (found,) = pullback((do, dfinal_state))
        return [*results, *(found.get(name) for name in INPUTS)]

    for call in (by_vjp, by_jax, jax.jit(by_vjp), jax.jit(by_jax)):
        assert_same_bits(arrays(call(given)), bits(case))
    by = jax.jit(lambda given: jax.grad(lambda given: sum(map(jnp.sum, function(case)(given))))(given))(given)
    for name, x in given.items():
        assert jax.typeof(by[name]) == jax.typeof(x) or OLD
    state, expected = given.pop("initial_state"), case.first_state()
    o, after = fwp.delta_rule_step(**given, state=state)
    assert_same_bits(arrays([o, after]), [cases.steps(case, expected), expected])
    if spec[:1] == ("x",):
        phi = fwp.feature_maps.DPFP(2)
        assert_same_bits(arrays([phi(given["q"])]), [phi(case.q)])


def meshes(devices):
    """One of every kind of axes that this JAX has."""
    kinds = [{}]
    if hasattr(jax.sharding, "AxisType"):
        kinds = [{"axis_types": (getattr(jax.sharding.AxisType, name),)} for name in ("Explicit", "Auto")]
    return [jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices], **kind) for kind in kinds]


OLD = jax.__version_info__ < (0, 9)  # whose custom calls have results without a sharding
SPECS = [PartitionSpec(*axes) for axes in (("x",), (None, "x"), ())]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_arrays_on_a_mesh_of_one_device(spec):
    for mesh in meshes(1):
        check_on_mesh(mesh, spec)
        q = jax.device_put(jnp.ones((4, 6, 2, 3)), NamedSharding(mesh, spec))
        dq = jax.grad(lambda q: jnp.sum(fwp.linear_attention(q, q, q)[0]))(q)
        assert jax.typeof(dq) == jax.typeof(q) or OLD


def test_arrays_on_meshes_of_two_devices():
    code = """if True:
        import test_jax
        for mesh in test_jax.meshes(2):
            for spec in test_jax.SPECS:
                test_jax.check_on_mesh(mesh, spec)
        print("checked")
    """
    child = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=2", timeout=300)
    assert child.stdout == "checked\n", child.stderr


# Packed sequences.


def test_offsets_may_be_anything_of_integers():
    case = make_case("delta", lengths=(3, 0, 9))
    given, expected = inputs(case), cases.scan(case)
    small = case.cu_seqlens.astype(np.uint8)
    on_device = [jnp.array(small), jnp.array(case.cu_seqlens)]
    for offsets in (list(case.cu_seqlens), tuple(map(int, small)), small, *on_device):
        assert_same_bits(arrays(fwp.delta_rule(**given, cu_seqlens=offsets)), list(expected))
    traced = jax.jit(lambda given, offsets: fwp.delta_rule(**given, cu_seqlens=offsets))
    for offsets in on_device:
        assert_same_bits(arrays(traced(given, offsets)), list(expected))


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0, 7, 3, 12], "never fall, got 7 before 3"),
        ([1, 12], "start with 0"),
        ([0, 11], "end with T=12, got 11"),
    ],
)
def test_wrong_offsets(offsets, words):
    """Known, an error of this library; traced, one of XLA with its message."""
    case = make_case("delta", lengths=(3, 0, 9), state=False)
    given = inputs(case)
    for known in (offsets, jnp.array(offsets)):
        with pytest.raises(fwp.ArgumentError, match=f"cu_seqlens: expected .*{words}"):
            fwp.delta_rule(**given, cu_seqlens=known)
    traced = jax.jit(lambda given, offsets: fwp.delta_rule(**given, cu_seqlens=offsets))
    with pytest.raises(XLA_ERRORS, match=f"ArgumentError: cu_seqlens: expected .*{words}"):
        jax.block_until_ready(traced(given, jnp.array(offsets)))
    assert np.isfinite(traced(given, jnp.array([0, 12]))[0]).all()


def test_offsets_without_an_axis():
    """Traced or not: an error of this library."""
    given = inputs(make_case("delta", B=1, state=False))
    for call in (fwp.delta_rule, jax.jit(fwp.delta_rule)):
        with pytest.raises(fwp.ShapeError, match=r"cu_seqlens: expected .*, got \(\)"):
            call(**given, cu_seqlens=jnp.array(3))


# Steps.


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_steps_return_the_state(rule):
    case = make_case(rule, "channel", dtype=np.float32)
    state, expected = jnp.asarray(case.first_state()), case.first_state()
    before = np.array(state)
    o, after = STEP[rule](*(None if x is None else jnp.asarray(x) for x in case.inputs), state=state)
    assert_same_bits(arrays([o, after]), [cases.steps(case, expected), expected])
    assert_same_bits(arrays([state]), [before])


def test_decoding_is_a_scan_of_steps():
    case = make_case("delta", "scalar")

    def step(state, token):
        return fwp.delta_rule_step(*token, state=state)[::-1]

    tokens = tuple(jnp.moveaxis(jnp.asarray(x), 1, 0) for x in case.inputs)
    state, o = jax.jit(lambda state: jax.lax.scan(step, state, tokens))(jnp.asarray(case.first_state()))
    expected = case.first_state()
    rows = [cases.step(case, t, expected) for t in range(case.v.shape[1])]
    assert_same_bits(arrays([jnp.moveaxis(o, 0, 1), state]), [np.stack(rows, 1), expected])


def test_a_donated_state_is_updated_in_place():
    case = make_case("delta", T=1)
    tokens = tuple(None if x is None else jnp.asarray(x[:, 0]) for x in case.inputs)
    step = jax.jit(lambda tokens, state: fwp.delta_rule_step(*tokens, state=state), donate_argnums=1)
    state = jax.block_until_ready(jnp.array(case.first_state()))
    where = state.unsafe_buffer_pointer()
    o, after = step(tokens, state)
    assert after.unsafe_buffer_pointer() == where
    assert state.is_deleted()
    expected = case.first_state()
    assert_same_bits(arrays([o, after]), [cases.step(case, 0, expected), expected])


def test_inputs_are_read_in_place():
    """A compiled call takes no memory of the size of q; one that does shows that this would be seen."""
    child = run_python("""if True:
        import jax, jax.numpy as jnp, fwp_core as fwp
        from memory import peak

        fwp.set_num_threads(1)
        wide, narrow = (1, 200_000, 1, 64), (1, 200_000, 1, 1)
        kinds = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (wide, wide, narrow)]
        plain = jax.jit(fwp.linear_attention).lower(*kinds).compile()
        copying = jax.jit(lambda q, k, v: fwp.linear_attention(q + 1, k, v)).lower(*kinds).compile()
        arrays = jax.block_until_ready([jnp.ones(kind.shape) for kind in kinds])
        assert all(x.unsafe_buffer_pointer() % 64 == 0 for x in arrays)
        marks = [peak()]
        for call in (plain, copying):
            jax.block_until_ready(call(*arrays))
            marks.append(peak())
        print(*((b - a) / arrays[0].nbytes for a, b in zip(marks, marks[1:])))
    """)
    assert child.returncode == 0, child.stderr
    plain, copying = map(float, child.stdout.split())
    assert plain < 0.5
    assert plain + copying > 0.9


def test_slots_of_a_pool_known_and_traced():
    case = make_case("delta", T=1).at(0)
    pool = np.random.default_rng(0).standard_normal((4, 2, 16, 16)).astype(np.float32)
    tokens = tuple(None if x is None else jnp.asarray(x) for x in case.inputs)
    expected = pool.copy()
    o = fwp.delta_rule_step(*case.inputs, state=expected, state_indices=[3, -1])
    step = jax.jit(lambda slots: fwp.delta_rule_step(*tokens, state=jnp.asarray(pool), state_indices=slots))
    for found in (
        fwp.delta_rule_step(*tokens, state=jnp.asarray(pool), state_indices=[3, -1]),
        step(jnp.array([3, -1])),
        [x[0] for x in jax.vmap(step)(jnp.array([[3, -1], [0, 1]]))],
    ):
        assert_same_bits(arrays(found), [o, expected])
    with pytest.raises(fwp.ArgumentError, match="state_indices: expected every slot at most once"):
        fwp.delta_rule_step(*tokens, state=jnp.asarray(pool), state_indices=[1, 1])
    with pytest.raises(XLA_ERRORS, match="ArgumentError: state_indices: expected slots from 0 to S-1=3"):
        jax.block_until_ready(step(jnp.array([4, 0])))


def test_vmap_of_a_step():
    case = make_case("delta", T=1).at(0)
    tokens = [jnp.asarray(x) for x in case.inputs[:4]]
    state = np.random.default_rng(0).standard_normal((3, 2, 2, 16, 16)).astype(np.float32)
    o, after = jax.vmap(lambda state: fwp.delta_rule_step(*tokens, state=state))(jnp.asarray(state))
    for n in range(3):
        expected = state[n].copy()
        assert_same_bits(
            arrays([o[n], after[n]]), [fwp.delta_rule_step(*case.inputs, state=expected), expected]
        )


# Plain calls.


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("jit", [False, True])
def test_backward_and_vjp_are_plain_calls(rule, jit):
    case = make_case(rule, "scalar", qk_norm="l2")
    given = inputs(case)
    initial_state = given.pop("initial_state")
    options = case.options | {"initial_state": initial_state}
    dfinal_state = jnp.asarray(case.dfinal_state)

    def backward(do, given):
        return BACKWARD[rule](do, **given, dfinal_state=dfinal_state, **options)

    def pulled_back(do, given):
        results, pullback = fwp.vjp(SCAN[rule], **given, **options)
        return results, pullback(do, dfinal_state), pullback(do)

    if jit:
        backward, pulled_back = jax.jit(backward), jax.jit(pulled_back)
    found = backward(jnp.asarray(case.do), given)
    assert isinstance(found, fwp.Gradients)
    assert_same_bits(arrays(found), list(cases.gradients(case)))
    results, again, without = pulled_back(jnp.asarray(case.do), given)
    assert_same_bits(arrays([*results, *again]), bits(case))
    assert_same_bits(arrays(without), list(cases.gradients(case.but(dfinal_state=None))))


@pytest.mark.parametrize("spec", MAPS, ids=str)
def test_feature_maps_alone(spec):
    rng = np.random.default_rng(0)
    spec = cases.with_projection(spec, 3, np.float32, rng)
    phi = cases.library_map(spec)
    x = rng.standard_normal((2, 5, 3)).astype(np.float32)
    dy = rng.standard_normal((2, 5, phi.dim(3))).astype(np.float32)
    expected = [phi(x), phi.backward(dy, x)]
    args = jnp.asarray(x), jnp.asarray(dy)

    def both(x, dy):
        return phi(x), phi.backward(dy, x)

    for call in (both, jax.jit(both), jax.vmap(both), jax.vmap(jax.vmap(both))):
        assert_same_bits(arrays(call(*args)), expected)
    assert phi(args[0][0, 0]).shape == (phi.dim(3),)
    with pytest.raises(fwp.ShapeError, match=r"dy: expected shape \(2, 5, \d+\), got \(2, 5, 1\)"):
        phi.backward(args[1][..., :1], args[0])
    with pytest.raises(fwp.DTypeError, match="x: expected dtype .*, got int32"):
        phi(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(fwp.UnsupportedError, match="feature_forward: expected arguments without"):
        jax.grad(lambda x: jnp.sum(phi(x)))(args[0])


def test_the_projection_is_an_operand():
    """Another one needs no other program; it may be traced, in either place, and of NumPy."""
    case = make_case("linear", feature_map=("FAVOR", 5), qk_norm="sum", state=False)
    R, favor, traces = case.feature_map[1], fwp.feature_maps.FAVOR, []

    @jax.jit
    def run(R):
        traces.append(R)
        phi = favor(R, eps=0.5)
        assert phi.dim(16) == 10
        assert repr(phi) == "FAVOR(<float32 (5, 16)>, eps=0.5)"
        assert phi.projection is R
        return fwp.linear_attention(**inputs(case), feature_map=phi)[0]

    for n in (1, 2, 3):
        expected = cases.scan(case.but(feature_map=("FAVOR", n * R, 0.5), qk_norm=None))[0]
        assert_same_bits(arrays([run(n * R)]), [expected])
        phi = favor(jnp.asarray(n * R), 0.5)
        assert_same_bits(arrays([fwp.linear_attention(**inputs(case), feature_map=phi)[0]]), [expected])
    assert len(traces) == 1
    with pytest.raises(fwp.ShapeError, match="projection: expected shape"):
        fwp.linear_attention(**inputs(case), feature_map=favor(jnp.ones((5, 7))))
    with pytest.raises(fwp.DTypeError, match="projection: expected dtype float32, got float64"):
        fwp.linear_attention(**inputs(case), feature_map=favor(R.astype(np.float64)))


def test_a_projection_that_is_closed_over_is_a_constant():
    case = make_case("linear", feature_map=("FAVOR", 5), state=False)
    R = case.feature_map[1].copy()
    phi = fwp.feature_maps.FAVOR(R)
    run = jax.jit(lambda given: fwp.linear_attention(**given, feature_map=phi))
    expected = arrays(run(inputs(case)))
    R[...] = 0
    assert_same_bits(arrays(run(inputs(case))), expected)


def test_no_derivative_by_the_projection():
    case = make_case("linear", state=False)
    favor = fwp.feature_maps.FAVOR

    def loss(R):
        return jnp.sum(fwp.linear_attention(**inputs(case), feature_map=favor(R))[0])

    R = jnp.ones((5, 16))
    with pytest.raises(fwp.UnsupportedError, match="projection: expected an array without a derivative"):
        jax.grad(loss)(R)
    assert not np.any(jax.grad(lambda R: loss(jax.lax.stop_gradient(R)))(R))


def test_feature_maps_are_static_arguments():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(phi, x):
        traces.append(phi)
        return phi(x)

    x = jnp.ones((2, 3))
    maps = fwp.feature_maps
    R = np.ones((2, 3), np.float32)
    for make in (maps.ReLU, maps.Softmax, lambda: maps.DPFP(2), lambda: maps.DPFP(3), lambda: maps.FAVOR(R)):
        assert make() == make()
        assert hash(make()) == hash(make())
        run(make(), x)
        run(make(), x)
    assert len(traces) == 5
    assert maps.DPFP(1) != maps.DPFP(2)
    assert maps.ReLU() != maps.ELU1()
    assert maps.ReLU() != 1
    assert maps.FAVOR(R) != maps.FAVOR(R.copy())
    assert maps.FAVOR(R) != maps.FAVOR(R, eps=1.0)


def test_diagnose_takes_known_arrays():
    case = make_case("delta", "scalar", feature_map=("FAVOR", 5), qk_norm="sum")
    expected = fwp.diagnose(fwp.delta_rule, *case.inputs, **case.options).probes()
    phi = fwp.feature_maps.FAVOR(jnp.asarray(case.feature_map[1]))
    given = inputs(case)
    for feature_map in (phi, cases.library_map(case.feature_map)):
        found = fwp.diagnose(fwp.delta_rule, **given, feature_map=feature_map, qk_norm="sum")
        assert_same_bits(list(found.probes().values()), list(expected.values()))
    with pytest.raises(fwp.UnsupportedError, match="q: expected an array with values, got a tracer"):
        jax.jit(lambda q: fwp.diagnose(fwp.delta_rule, **given | {"q": q}).contrast)(given["q"])
    with pytest.raises(fwp.ArgumentError, match="fn: expected fwp_core.delta_rule"):
        fwp.diagnose(max, **given)


# Errors.


def test_forward_mode_is_refused():
    case = make_case()
    given = inputs(case)
    with pytest.raises(fwp.UnsupportedError, match="delta_rule: expected derivatives in reverse mode"):
        jax.jvp(function(case), (given,), (given,))
    with pytest.raises(fwp.UnsupportedError, match="delta_rule: expected derivatives in reverse mode"):
        jax.jacfwd(lambda q: fwp.delta_rule(**given | {"q": q})[0])(given["q"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(jax.jit(function(case)), (given,), (given,))


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_second_derivatives_have_to_be_asked_for(rule):
    case = make_case(rule)
    given = inputs(case)

    def energy(q):
        return jnp.sum(SCAN[rule](**given | {"q": q})[0] ** 2)

    name = SCAN[rule].__name__
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(
            fwp.UnsupportedError, match=f"{name}: .*fwp_core.jax.{name}.*twice_differentiable=True"
        ):
            jax.grad(lambda q, wrap=wrap: jnp.sum(wrap(jax.grad(energy))(q) ** 2))(given["q"])


def test_plain_calls_have_no_derivative():
    case = make_case(T=1)
    given, state = inputs(case), jnp.asarray(case.first_state())
    q = given.pop("q")
    given.pop("initial_state")

    def step(q):
        return fwp.delta_rule_step(q, **given, state=state)[0]

    def backward(q):
        return fwp.delta_rule_backward(jnp.asarray(case.do), q, **given).dk

    def scan(q):
        return fwp.vjp(fwp.delta_rule, q, **given)[0][0]

    for call, name in ((step, "delta_rule_step"), (backward, "delta_rule_backward"), (scan, "delta_rule")):
        with pytest.raises(fwp.UnsupportedError, match=f"^{name}: expected arguments without a derivative"):
            jax.grad(lambda q, call=call: jnp.sum(call(q)))(q)
        jax.grad(lambda q, call=call: jnp.sum(call(jax.lax.stop_gradient(q))))(q)


REFUSED = [
    (
        {"k": lambda x: x[:, :5]},
        fwp.ShapeError,
        r"k: expected shape \(B=2, T=13, Hk, K=16\), got \(2, 5, 2, 16\)",
    ),
    ({"beta": lambda x: x[..., None]}, fwp.ShapeError, r"beta: expected shape \(B=2, T=13, H=2\), got"),
    ({"initial_state": lambda x: x[:1]}, fwp.ShapeError, "initial_state: expected shape"),
    ({"q": lambda x: x[0]}, fwp.ShapeError, "q: expected shape"),
    ({"v": lambda x: x.astype(jnp.float16)}, fwp.DTypeError, "v: expected dtype float32, got float16"),
    ({"q": lambda x: x.astype(jnp.int32)}, fwp.DTypeError, "q: expected dtype float32, .*, got int32"),
    (
        {"q": lambda x: x.astype(jnp.complex64)},
        fwp.DTypeError,
        "q: expected dtype .*, got complex64",
    ),
    (
        {"k": lambda x: np.ones((2, 13, 2, 16), np.float32)},
        fwp.DTypeError,
        "k: expected a jax.Array, got numpy.ndarray",
    ),
    ({"beta": lambda x: 1.0}, fwp.DTypeError, "beta: expected a jax.Array, got float"),
    ({"beta": lambda x: None}, fwp.DTypeError, "beta: expected a jax.Array, got None"),
    ({"g": lambda x: [1.0]}, fwp.DTypeError, "g: expected a jax.Array, got list"),
    ({"scale": lambda x: "1"}, fwp.DTypeError, "scale: expected a number, got str"),
    ({"qk_norm": lambda x: "l1"}, fwp.ArgumentError, "qk_norm: expected None, 'sum' or 'l2', got 'l1'"),
    ({"eps": lambda x: -1.0}, fwp.ArgumentError, "eps: expected a finite number of 0 or more, got -1"),
    ({"attention_norm": lambda x: 1}, fwp.DTypeError, "attention_norm: expected True or False, got int"),
    ({"feature_map": lambda x: "relu"}, fwp.DTypeError, "feature_map: expected None or an object"),
    ({"cu_seqlens": lambda x: [0.0, 13.0]}, fwp.DTypeError, "cu_seqlens: expected integers, got float"),
    (
        {"cu_seqlens": lambda x: jnp.array([0.0, 13.0])},
        fwp.DTypeError,
        "cu_seqlens: expected integers, got dtype",
    ),
    ({"cu_seqlens": lambda x: [0, 13]}, fwp.ArgumentError, "cu_seqlens: expected B=1"),
    (
        {"out": lambda x: jnp.ones(3)},
        fwp.ReadOnlyError,
        "out: expected None, because JAX arrays are",
    ),
    ({"final_state_out": lambda x: np.ones(3)}, fwp.ReadOnlyError, "final_state_out: expected None"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=[words[:30] for *_, words in REFUSED])
def test_wrong_arguments_are_refused_when_traced(change, error, words):
    case = make_case("delta", "scalar")
    (name, wrong), *_ = change.items()
    given = inputs(case)
    with pytest.raises(error, match=words):
        fwp.delta_rule(**given | {name: wrong(given.get(name))})
    with pytest.raises(error, match=words):
        jax.jit(lambda given: fwp.delta_rule(**given | {name: wrong(given.get(name))}))(given)


def test_wrong_arguments_of_the_other_functions():
    case = make_case("delta")
    given, do = inputs(case), jnp.asarray(case.do)
    with pytest.raises(fwp.ShapeError, match="do: expected shape"):
        fwp.delta_rule_backward(do[:1], **given)
    with pytest.raises(fwp.DTypeError, match="do: expected a jax.Array, got numpy"):
        fwp.jax.delta_rule_backward(case.do, **given)
    with pytest.raises(fwp.ShapeError, match="dfinal_state: expected shape"):
        fwp.delta_rule_backward(do, **given, dfinal_state=do)
    with pytest.raises(fwp.ReadOnlyError, match="out: expected None"):
        fwp.delta_rule_backward(do, **given, out=fwp.Gradients(*[None] * 6))
    with pytest.raises(fwp.ArgumentError, match="fn: expected fwp_core.delta_rule"):
        fwp.vjp(max, **given)
    _, pullback = fwp.vjp(fwp.jax.delta_rule, **given)
    with pytest.raises(fwp.ShapeError, match="do: expected shape"):
        pullback(do[:1])
    state = given.pop("initial_state")
    with pytest.raises(fwp.ShapeError, match="state: expected shape"):
        fwp.delta_rule_step(**given, state=state[..., :1])
    with pytest.raises(fwp.DTypeError, match="state: expected a jax.Array, got numpy"):
        fwp.delta_rule_step(**given, state=case.first_state())
    with pytest.raises(fwp.ReadOnlyError, match="out: expected None"):
        fwp.delta_rule_step(**given, state=state, out=do)
    with pytest.raises(fwp.DTypeError, match="q: expected a jax.Array, got numpy.ndarray"):
        fwp.jax.delta_rule(case.q, case.k, case.v, case.beta)


# Levels and threads.


def test_programs_outlive_a_switch_of_the_level():
    """Checkpoints hold for one level: a compiled backward pass does without those of another."""
    case = make_case("delta", "scalar", T=70, K=24, V=40)
    run = jax.jit(function(case))
    split = jax.jit(lambda given: jax.vjp(function(case), given)[1])
    for level in fwp.available_isas():
        with fwp.use_isa(level):
            assert_same_bits(arrays(run(inputs(case))), list(cases.scan(case)))
            pullback = jax.block_until_ready(split(inputs(case)))
        for other in fwp.available_isas():
            with fwp.use_isa(other):
                (found,) = pullback((jnp.asarray(case.do), jnp.asarray(case.dfinal_state)))
                expected = cases.gradients(case)
                assert_same_bits(arrays(found.get(name) for name in INPUTS), list(expected))


def test_several_threads_at_once():
    case = make_case("delta", "scalar", T=64)
    run = jax.jit(jax.grad(lambda given: sum(map(jnp.sum, function(case)(given)))))
    expected = arrays(run(inputs(case)).values())
    failures = []

    def work():
        for _ in range(20):
            try:
                assert_same_bits(arrays(run(inputs(case)).values()), expected)
            except BaseException as error:
                failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_float32_scan_is_the_oracles():
    """Not only NumPy's bits: the oracle's values."""
    case = make_case("delta", "channel", T=50)
    for x, exact in zip(on_jax(case), [*cases.exact_scan(case), *cases.exact_gradients(case)], strict=True):
        if exact is not None:
            assert relative_error(x, exact, floor=1.0) < TOLERANCE["gradient", "float32"]


# What is written about it.


def test_the_benchmark_of_calls(capsys):
    path = ROOT / "benchmarks" / "jax_call.py"
    spec = importlib.util.spec_from_file_location("jax_call", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--calls", "5"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 12
    assert all(float(row.split()[-2]) > 0 for row in rows)


def test_the_example_learns():
    spec = importlib.util.spec_from_file_location("jax_training", ROOT / "examples" / "jax_training.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(steps=60)
    assert before < 0.25
    assert after > 0.9


def test_the_page_runs():
    """Every block of code, in order, in one process."""
    page = (ROOT / "docs" / "jax.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    if not hasattr(jax, "shard_map"):
        blocks = [block for block in blocks if "shard_map" not in block]
    exec("\n".join(blocks), {})


def test_export_with_the_target_named():
    case = make_case("delta", state=False)
    given = inputs(case)
    export = pytest.importorskip("jax.export")
    safe = export.DisabledSafetyCheck.custom_call("fwp_core.delta_rule")
    exported = export.export(jax.jit(function(case)), disabled_checks=[safe])(given)
    assert_same_bits(arrays(exported.call(given)), list(cases.scan(case)))
