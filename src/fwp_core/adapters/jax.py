"""The functions of the library on JAX arrays, traced or not, as custom calls of XLA.

:func:`delta_rule` and :func:`linear_attention` are differentiable; all others are plain calls. All but
:func:`diagnose` work under ``jit``, ``vmap``, ``scan`` and ``shard_map``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .. import _core, diagnostics, ops
from .._core import DeviceError, DTypeError, ReadOnlyError, UnsupportedError
from ..diagnostics import Diagnostics
from ..feature_maps import FAVOR, FeatureMap, Parameters
from ..ops import Gradients, QKNorm
from . import jax_autodiff
from .jax_call import INPUTS, Array, Call, Spec, custom_call, varying

Integers: TypeAlias = Any  # a sequence, or an array of any framework
Pullback: TypeAlias = Callable[..., Gradients]
Operands: TypeAlias = dict[str, Array]


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Integers | None = None,
    out: None = None,
    final_state_out: None = None,
    twice_differentiable: bool = False,
) -> tuple[Array, Array]:
    """Run the delta rule over time, as :func:`fwp_core.delta_rule` does, differentiable.

    Parameters
    ----------
    q, k, v, beta, g, initial_state : jax.Array
        As there, traced or not. Gradients flow to all six, from both results, in reverse mode.
    feature_map, qk_norm, attention_norm, eps, scale
        As there; constants of the compiled program. The projection of FAVOR is an operand: a JAX array, which
        may be traced but gets no gradient, or a NumPy array, which is a constant under ``jit``.
    cu_seqlens : sequence of N+1 integers, or integer array, optional
        As there. Where it is traced, its values are checked when the program runs, and a wrong one is an
        error of XLA with this library's message.
    out, final_state_out : None
        JAX arrays are immutable.
    twice_differentiable : bool
        Whether gradients have gradients, of any order. They walk over the tokens in operations of JAX, and
        take memory for all states. First gradients are the same, but for a forward sweep of their own.

    Returns
    -------
    o, final_state : jax.Array
        As there.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        As there, when the call is traced.
    DeviceError
        For an array that is on neither the CPU nor a CUDA device that can be used, and for arrays of several
        devices.
    ReadOnlyError
        For ``out`` and ``final_state_out``.
    UnsupportedError
        For a second derivative without ``twice_differentiable``, a derivative by the projection, and forward
        mode; where that meets the call inside of a program under ``jit``, it is JAX's own TypeError.

    Notes
    -----
    ``vmap`` folds its axis into B, one call of the kernel; packed sequences and projections are called one by
    one. Plain ``jit`` gathers sharded arrays: use ``shard_map``. Running programs cannot be interrupted.
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale)
    arrays = (q, k, v, beta, g, initial_state)
    _refuse_out(out=out, final_state_out=final_state_out)
    return _scan("delta_rule", arrays, options, cu_seqlens, twice_differentiable)


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None = None,
    g: Array | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Integers | None = None,
    out: None = None,
    final_state_out: None = None,
    twice_differentiable: bool = False,
) -> tuple[Array, Array]:
    """Run linear attention over time, as :func:`fwp_core.linear_attention` does, differentiable.

    Parameters, results and errors are those of :func:`delta_rule`; ``beta`` may be None.
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale)
    arrays = (q, k, v, beta, g, initial_state)
    _refuse_out(out=out, final_state_out=final_state_out)
    return _scan("linear_attention", arrays, options, cu_seqlens, twice_differentiable)


def delta_rule_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    dfinal_state: Array | None = None,
    out: None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Integers | None = None,
) -> Gradients:
    """Return the gradients of :func:`delta_rule`, as :func:`fwp_core.delta_rule_backward` does.

    They are not differentiable. ``out`` is refused; errors are those of :func:`delta_rule`.
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale)
    _refuse_out(out=out)
    checked = _checked("delta_rule", (q, k, v, beta, g, initial_state), options, cu_seqlens)
    return _gradients(checked, {}, do, dfinal_state)


def linear_attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None = None,
    g: Array | None = None,
    *,
    dfinal_state: Array | None = None,
    out: None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Integers | None = None,
) -> Gradients:
    """Return the gradients of :func:`linear_attention`; see :func:`delta_rule_backward`."""
    options = (feature_map, qk_norm, attention_norm, eps, scale)
    _refuse_out(out=out)
    checked = _checked("linear_attention", (q, k, v, beta, g, initial_state), options, cu_seqlens)
    return _gradients(checked, {}, do, dfinal_state)


def vjp(
    fn: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None = None,
    g: Array | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Integers | None = None,
    out: None = None,
    final_state_out: None = None,
) -> tuple[tuple[Array, Array], Pullback]:
    """Run ``fn`` forward and return its results with a function for its gradients; see :func:`fwp_core.vjp`.

    Neither is differentiable; under ``grad`` call ``fn`` itself.
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale)
    _refuse_out(out=out, final_state_out=final_state_out)
    checked = _checked(
        ops.rule_of(fn, delta_rule, linear_attention), (q, k, v, beta, g, initial_state), options, cu_seqlens
    )
    results, kept = jax_autodiff.forward(checked.call, checked.operands, keep=True)

    def pullback(do: Array, dfinal_state: Array | None = None, out: None = None) -> Gradients:
        _refuse_out(out=out)
        return _gradients(checked, kept, do, dfinal_state)

    return results, pullback


def delta_rule_step(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    state: Array,
    state_indices: Integers | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    out: None = None,
) -> tuple[Array, Array]:
    """Take one token of :func:`delta_rule`, or a few, as :func:`fwp_core.delta_rule_step` does.

    Returns
    -------
    o, state : jax.Array
        The output, and the state after the step. Under ``jax.jit`` with the state's argument donated, or
        inside of a loop of JAX, it has the memory of the one before; else that is copied.

    Notes
    -----
    Not differentiable. ``state_indices`` may be traced, and is then checked as ``cu_seqlens`` is.
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale)
    _refuse_out(out=out)
    return _step("delta_rule", (q, k, v, beta, g), options, state, state_indices)


def linear_attention_step(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None = None,
    g: Array | None = None,
    *,
    state: Array,
    state_indices: Integers | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    out: None = None,
) -> tuple[Array, Array]:
    """Take one token of :func:`linear_attention`, or a few; see :func:`delta_rule_step`."""
    options = (feature_map, qk_norm, attention_norm, eps, scale)
    _refuse_out(out=out)
    return _step("linear_attention", (q, k, v, beta, g), options, state, state_indices)


def diagnose(
    fn: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None = None,
    g: Array | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Array | None = None,
    cu_seqlens: Integers | None = None,
) -> Diagnostics:
    """Return what happens in a scan, as :func:`fwp_core.diagnose` does, as NumPy arrays.

    Traced arrays are an UnsupportedError.
    """
    function = ops.rule_of(fn, delta_rule, linear_attention)
    arrays = dict(zip(INPUTS, (q, k, v, beta, g, initial_state), strict=True))
    _core.scan_options(feature_map, qk_norm, attention_norm, eps, scale)
    operands = _operands(arrays, _required(function)) | _projection(feature_map)
    for name, x in operands.items():
        if isinstance(x, jax.core.Tracer):
            raise UnsupportedError(
                f"{name}: expected an array with values, got a tracer; "
                "call diagnose outside of jit, grad and vmap"
            )
    values: dict[str, Any] = {name: np.asarray(x) for name, x in operands.items()}
    if feature_map is not None and "projection" in values:
        feature_map = FAVOR(values.pop("projection"), feature_map._parameters.eps)
    return diagnostics.diagnose(
        getattr(ops, function),
        **values,
        feature_map=feature_map,
        qk_norm=qk_norm,
        attention_norm=attention_norm,
        eps=eps,
        scale=scale,
        cu_seqlens=cu_seqlens,
    )


def feature_forward(feature_map: FeatureMap, x: Array) -> Array:
    """Return the features of every row of x [..., n], not differentiable."""
    operands = _operands({"q": x}, ("q",), q="x") | _projection(feature_map)
    y = _core.feature_forward(_abstract_map(feature_map), abstract(x))
    return _map("feature_forward", feature_map, operands, "o", y)


def feature_backward(feature_map: FeatureMap, dy: Array, x: Array) -> Array:
    """Return the gradient of sum(phi(x) * dy) with respect to x, not differentiable."""
    operands = _operands({"q": x, "do": dy}, ("q", "do"), q="x", do="dy") | _projection(feature_map)
    dx = _core.feature_backward(_abstract_map(feature_map), abstract(dy), abstract(x))
    return _map("feature_backward", feature_map, operands, "q", dx)


def abstract(x: Array) -> _core.AbstractArray:
    """Return what the compiled module has to know of an array to check a call."""
    return _core.AbstractArray(x.shape, str(x.dtype))


described = abstract


# Checks. All of them are made when a call is traced, those of shapes by the compiled module.


class _Checked(NamedTuple):
    """A scan that may be called."""

    call: Call
    operands: Operands
    arrays: tuple[Any, ...]  # q, k, v, beta, g without memory
    options: tuple[Any, ...]  # the options, initial_state and cu_seqlens, as the compiled module checked them


def _checked(
    function: str, arrays: tuple[Any, ...], options: tuple[Any, ...], cu_seqlens: Integers
) -> _Checked:
    numbers = _core.scan_options(*options)
    operands = _operands(dict(zip(INPUTS, arrays, strict=True)), _required(function))
    *inputs, initial_state = (None if x is None else abstract(x) for x in arrays)
    offsets = _stand_in(cu_seqlens, _some_offsets, operands["q"])
    known = (_abstract_map(options[0]), *options[1:], initial_state, offsets)
    results = getattr(_core, function)(*inputs, *known, None, None, True)
    operands |= _projection(options[0]) | _integers(cu_seqlens=cu_seqlens)
    call = Call(
        function,
        4,
        tuple(zip(("o", "final_state", "checkpoints"), map(Spec.of, results), strict=True)),
        _features(options[0]),
        *numbers,
    )
    return _Checked(call, varying(operands), tuple(inputs), known)


def _required(function: str) -> tuple[str, ...]:
    return ("q", "k", "v", "beta") if function == "delta_rule" else ("q", "k", "v")


def _operands(arrays: dict[str, Any], required: tuple[str, ...], **names: str) -> Operands:
    """Return those that are there: JAX arrays on one device, or traced. ``names``: for messages."""
    for name, x in arrays.items():
        if not isinstance(x, jax.Array) and (x is not None or name in required):
            raise DTypeError(f"{names.get(name, name)}: expected a jax.Array, got {_kind(x)}")
    operands = {name: x for name, x in arrays.items() if x is not None}
    home = None
    for name, x in operands.items():
        if isinstance(x, jax.core.Tracer):
            continue
        devices = x.devices()
        _check_platform(names.get(name, name), devices)
        if x.committed:
            home = home or devices
            if devices != home:
                raise DeviceError(
                    f"{names.get(name, name)}: expected an array on {_list(home)}, as others are, "
                    f"got one on {_list(devices)}"
                )
    return operands


def _check_platform(name: str, devices: set[Any]) -> None:
    platforms = {device.platform for device in devices}
    if not platforms <= {"cpu", "gpu", "cuda"}:
        raise DeviceError(
            f"{name}: expected an array on the CPU or a CUDA device, got one on {_list(devices)}"
        )
    if platforms != {"cpu"} and (state := _core.cuda_state()) not in ("available", "emulated"):
        raise DeviceError(
            f"{name}: expected an array on the CPU, since CUDA is {state}, got one on {_list(devices)}"
        )


def _list(devices: set[Any]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _kind(x: object) -> str:
    return "None" if x is None else f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")


def _refuse_out(**outputs: object) -> None:
    for name, x in outputs.items():
        if x is not None:
            raise ReadOnlyError(f"{name}: expected None, because JAX arrays are immutable, got {_kind(x)}")


def _stand_in(integers: Integers, some: Callable[[Any, Array], Any], q: Array) -> Any:
    """Integers to check a call with: those given, or, where they are traced, right ones of their shape."""
    if not isinstance(integers, jax.Array):
        return integers
    if not isinstance(integers, jax.core.Tracer):
        return np.asarray(integers)
    wide = np.issubdtype(integers.dtype, np.integer)
    return some(np.zeros(integers.shape, np.int64 if wide else integers.dtype), q)


def _some_offsets(zeros: Any, q: Array) -> Any:
    if zeros.ndim:  # a number is refused as one
        zeros[1:] = q.shape[1] if q.ndim > 1 else 0
    return zeros


def _no_slots(zeros: Any, q: Array) -> Any:
    return zeros - 1


def _integers(**given: Integers) -> Operands:
    return {name: jnp.asarray(x, dtype=int) for name, x in given.items() if x is not None}


# Feature maps.


def _projection(feature_map: FeatureMap | None) -> Operands:
    projection = None if feature_map is None else feature_map._parameters.projection
    if projection is None:
        return {}
    if not isinstance(projection, (jax.Array, np.ndarray)):
        raise DTypeError(f"projection: expected a jax.Array or a numpy.ndarray, got {_kind(projection)}")
    return {"projection": jnp.asarray(projection)}


def _abstract_map(feature_map: FeatureMap | None) -> Any:
    """The map with a projection without memory."""
    if feature_map is None or not isinstance(feature_map._parameters.projection, np.ndarray):
        return feature_map
    kind, nu, eps, projection = feature_map._parameters
    return _core.FeatureMap(kind, nu, eps, _core.AbstractArray(projection.shape, str(projection.dtype)))


def _features(feature_map: FeatureMap | None) -> Parameters | None:
    return None if feature_map is None else feature_map._parameters._replace(projection=None)


def _map(function: str, feature_map: FeatureMap, operands: Operands, name: str, result: Any) -> Array:
    """Call a function of rows, the first axes of which are one to it."""
    rows = {key: x if key == "projection" else x.reshape(-1, x.shape[-1]) for key, x in operands.items()}
    made = Spec((rows["q"].shape[0], result.shape[-1]), result.dtype)
    call = Call(function, 2, ((name, made),), _features(feature_map), 0, False, 0.0, 1.0)
    return custom_call(call, "", varying(rows), dict(call.results))[name].reshape(result.shape)


# Calls.


def _scan(
    function: str, arrays: tuple[Any, ...], options: tuple[Any, ...], cu_seqlens: Integers, twice: bool
) -> tuple[Array, Array]:
    call, operands, *_ = _checked(function, arrays, options, cu_seqlens)
    call = replace(call, derivatives=2 if twice else 1)
    if twice and cu_seqlens is not None:
        if isinstance(cu_seqlens, jax.core.Tracer):
            raise UnsupportedError(
                "cu_seqlens: expected integers that are known when the call is traced, because of "
                "twice_differentiable, got a tracer"
            )
        call = replace(call, cu_seqlens=tuple(map(int, cu_seqlens)))
    try:
        o, final_state = jax_autodiff.scan(call, operands)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise UnsupportedError(
            f"{function}: expected derivatives in reverse mode, as of jax.grad, jax.vjp or jax.jacrev, "
            "got forward mode, which it has none for"
        ) from error
    return o, final_state


def _gradients(checked: _Checked, kept: Operands, do: Any, dfinal_state: Any) -> Gradients:
    call, operands, arrays, options = checked
    cotangents = _operands({"do": do, "dfinal_state": dfinal_state}, ("do",))
    final = None if dfinal_state is None else abstract(dfinal_state)
    getattr(_core, f"{call.function}_backward")(abstract(do), *arrays, final, None, *options, None)
    gradients = jax_autodiff.backward(call, operands, kept, cotangents)
    return Gradients(*(gradients.get(name) for name in INPUTS))


def _step(
    function: str, arrays: tuple[Any, ...], options: tuple[Any, ...], state: Any, state_indices: Integers
) -> tuple[Array, Array]:
    numbers = _core.scan_options(*options)
    named = dict(zip(INPUTS, arrays, strict=False)) | {"state": state}
    operands = _operands(named, (*_required(function), "state"))
    inputs = (None if x is None else abstract(x) for x in arrays)
    slots = _stand_in(state_indices, _no_slots, operands["q"])
    known = (abstract(state), slots, _abstract_map(options[0]), *options[1:])
    o = getattr(_core, f"{function}_step")(*inputs, *known, None)
    operands |= _projection(options[0]) | _integers(state_indices=state_indices)
    results = (("o", Spec.of(o)), ("final_state", Spec.of(state)))
    call = Call(function, operands["q"].ndim, results, _features(options[0]), *numbers)
    made = custom_call(call, "_step", varying(operands), dict(results), aliases=("state", "final_state"))
    return made["o"], made["final_state"]
