"""A Case of the tests on JAX arrays."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

import fwp_core as fwp

SCAN = {"linear": fwp.linear_attention, "delta": fwp.delta_rule}
BACKWARD = {"linear": fwp.linear_attention_backward, "delta": fwp.delta_rule_backward}
STEP = {"linear": fwp.linear_attention_step, "delta": fwp.delta_rule_step}
INPUTS = ("q", "k", "v", "beta", "g", "initial_state")


def precision(dtype):
    """JAX has float64 only where it was asked for."""
    if np.dtype(dtype) != np.float64:
        return contextlib.nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def inputs(case):
    """What can be differentiated, by name; absent arrays are not there."""
    given = dict(zip(INPUTS, (*case.inputs, case.initial_state), strict=True))
    return {name: jnp.asarray(x) for name, x in given.items() if x is not None}


def function(case, scan=None, **options):
    """The scan of the case as a function of such a dictionary."""
    fixed = {name: value for name, value in case.options.items() if name != "initial_state"}
    return lambda given: (scan or SCAN[case.rule])(**given, **fixed, **options)


def cotangents(case, results):
    """Those of (o, final_state)."""
    dfinal_state = jnp.zeros_like(results[1]) if case.dfinal_state is None else jnp.asarray(case.dfinal_state)
    return jnp.asarray(case.do), dfinal_state


def gradients(case, **options):
    """By differentiation of the scan, in the order of Gradients."""
    results, pullback = jax.vjp(function(case, **options), inputs(case))
    (found,) = pullback(cotangents(case, results))
    return [found.get(name) for name in INPUTS]


def arrays(results):
    """As NumPy's."""
    return [None if x is None else np.asarray(x) for x in results]
