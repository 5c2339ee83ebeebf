"""The differentiable scan on JAX arrays: first derivatives by the kernels, others of a plain recurrence."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .._core import UnsupportedError
from . import recurrence
from .jax_call import INPUTS, LEVEL, Array, Arrays, Call, Spec, custom_call, varying

_NORMS = (None, "sum", "l2")  # FWP_NORM_... of fwp.h
_KEPT = ("checkpoints", "level")


def forward(call: Call, operands: Arrays, keep: bool) -> tuple[tuple[Array, Array], dict[str, Array]]:
    """Return (o, final_state) and what backward can use of this forward pass.

    That is nothing of packed sequences, which have as many checkpoints as their lengths, which may be traced,
    say, and nothing on other devices than the CPU, where backward makes its own.
    """
    results = {name: call.spec(name) for name in ("o", "final_state")}
    if keep and "cu_seqlens" not in operands and jax.default_backend() == "cpu":
        results |= {"checkpoints": call.spec("checkpoints"), "level": LEVEL}
    made = custom_call(call, "", operands, results)
    return (made["o"], made["final_state"]), {name: made[name] for name in _KEPT if name in made}


def backward(call: Call, operands: Arrays, kept: Arrays, cotangents: Arrays) -> dict[str, Array]:
    """Return the gradients of the operands that have one."""
    results = {name: Spec.of(operands[name]) for name in INPUTS if name in operands}
    return custom_call(call, "_backward", varying({**operands, **kept, **cotangents}), results)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def scan(call: Call, operands: dict[str, Array]) -> tuple[Array, Array]:
    """Return (o, final_state), differentiable in reverse mode."""
    return _scan(call, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(call: Call, operands: dict[str, Array]) -> tuple[Array, Array]:
    return forward(call, operands, keep=False)[0]


def _scan_forward(call: Call, primals: dict[str, Any]) -> Any:
    operands = {name: x.value for name, x in primals.items()}
    if "projection" in primals and primals["projection"].perturbed:
        raise UnsupportedError(
            "projection: expected an array without a derivative, because FAVOR has none for it; "
            "give it jax.lax.stop_gradient of the array"
        )
    if call.derivatives > 1:  # the next derivative goes through this very function
        return _scan(call, operands), (operands, {})
    results, kept = forward(call, operands, keep=True)
    return results, (operands, kept)


def _scan_backward(call: Call, residuals: Any, cotangents: tuple[Any, Any]) -> tuple[dict[str, Any]]:
    operands, kept = residuals
    do, dfinal_state = cotangents
    given = {"do": jnp.zeros(do.shape, do.dtype) if isinstance(do, SymbolicZero) else do}
    if not isinstance(dfinal_state, SymbolicZero):
        given["dfinal_state"] = dfinal_state
    if call.derivatives > 1:
        gradients = _gradients(call, operands, given)
    else:
        gradients = backward(call, operands, kept, given)
    return ({name: gradients.get(name) for name in operands},)


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)


# Derivatives of the gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(call: Call, operands: dict[str, Array], cotangents: dict[str, Array]) -> dict[str, Array]:
    return backward(call, operands, {}, cotangents)


def _gradients_forward(call: Call, operands: Any, cotangents: Any) -> Any:
    return _gradients(call, operands, cotangents), (operands, cotangents)


def _gradients_backward(call: Call, residuals: Any, incoming: Any) -> Any:
    operands, cotangents = residuals
    numbers = {name: x for name, x in operands.items() if name != "cu_seqlens"}

    def plain(numbers: dict[str, Array], cotangents: dict[str, Array]) -> dict[str, Array]:
        (_, final_state), pullback = jax.vjp(lambda given: _plain_scan(call, given), numbers)
        dfinal_state = cotangents.get("dfinal_state")
        dfinal_state = jnp.zeros_like(final_state) if dfinal_state is None else dfinal_state
        (gradients,) = pullback((cotangents["do"], dfinal_state))
        return {name: gradients[name] for name in INPUTS if name in gradients}

    of_numbers, of_cotangents = jax.vjp(plain, numbers, cotangents)[1](incoming)
    return {name: of_numbers.get(name) for name in operands}, of_cotangents


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _plain_scan(call: Call, operands: Arrays) -> tuple[Array, Array]:
    """The scan in operations of JAX, in the dtype of states."""
    precise = {name: x.astype(call.spec("final_state").dtype) for name, x in operands.items()}
    features = call.features and call.features._replace(projection=precise.get("projection"))
    rule = recurrence.Rule(
        call.function == "delta_rule",
        features,
        _NORMS[call.qk_norm],
        call.attention_norm,
        call.eps,
        call.scale,
    )
    q, k, v, beta, g, initial_state = (precise.get(name) for name in INPUTS)
    o, final_state = recurrence.scan(
        jnp, rule, q, k, v, beta, g, initial_state, call.cu_seqlens, jax.lax.scan
    )
    return o.astype(call.spec("o").dtype), final_state
