"""JAX arrays on a GPU, where there is one."""

import numpy as np
import pytest
from cases import RULES, exact_gradients, exact_scan, make_case
from tolerances import DEVICE as TOLERANCE
from tolerances import relative_error

import fwp_core as fwp

jax = pytest.importorskip("jax")
import jax_cases  # noqa: E402

jnp = jax.numpy


def has_gpu():
    return fwp.has_cuda() and any(device.platform == "gpu" for device in jax.devices())


pytestmark = pytest.mark.skipif(not has_gpu(), reason="no GPU that JAX and this library can use")
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


def close(x, exact, name=""):
    if exact is None:
        assert x is None, name
        return
    error = relative_error(np.asarray(x), exact, floor=1.0)
    assert error <= TOLERANCE[x.dtype.name], f"{name}: error {error:.3g}"


@EVERY_RULE
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("lengths", [None, (0, 30, 1, 39)])
def test_scans_and_gradients(rule, dtype, lengths):
    case = make_case(rule, "scalar", dtype=dtype, T=70, K=64, V=64, lengths=lengths)
    scan = jax.jit(jax_cases.function(case))
    for x, exact in zip(scan(jax_cases.inputs(case)), exact_scan(case), strict=True):
        assert {device.platform for device in x.devices()} == {"gpu"}
        close(x, exact)
    exact = exact_gradients(case)
    for name, x in zip(exact._fields, jax_cases.gradients(case), strict=True):
        close(x, getattr(exact, name), name)


def test_vmap():
    case = make_case("delta", "scalar", T=20, K=16, V=16, state=False)
    given = {name: jnp.stack([x, 2 * x]) for name, x in jax_cases.inputs(case).items()}
    together = jax.vmap(lambda x: fwp.delta_rule(**x)[0])(given)
    for n in range(2):
        alone = fwp.delta_rule(**{name: x[n] for name, x in given.items()})[0]
        np.testing.assert_array_equal(np.asarray(together[n]), np.asarray(alone))


@EVERY_RULE
def test_steps(rule):
    case = make_case(rule, "scalar", B=3, T=2, K=64, V=64)
    exact_o, exact_state = exact_scan(case)
    state = jnp.asarray(case.first_state())
    step = jax.jit(jax_cases.STEP[rule])
    for t in range(2):
        at = case.at(t)
        o, state = step(*(None if x is None else jnp.asarray(x) for x in at.inputs), state=state)
        close(o, exact_o[:, t])
    close(state, exact_state)


def test_feature_maps():
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    for phi in (fwp.feature_maps.DPFP(2), fwp.feature_maps.FAVOR(jnp.ones((3, 4)))):
        here = (
            phi if phi._parameters.projection is None else fwp.feature_maps.FAVOR(np.ones((3, 4), np.float32))
        )
        close(phi(jnp.asarray(x)), here(x).astype(np.float64))


def test_errors_of_a_program():
    case = make_case("linear", lengths=(2, 3))
    given = jax_cases.inputs(case)

    @jax.jit
    def scan(given, lengths):
        return fwp.linear_attention(**given, cu_seqlens=lengths)

    jax.block_until_ready(scan(given, jnp.array([0, 4, 3])))
    with pytest.raises(Exception, match="CudaError: .*cu_seqlens"):
        jax.block_until_ready(scan(given, jnp.array([0, 2, 5])))
    jax.block_until_ready(scan(given, jnp.array([0, 2, 5])))
