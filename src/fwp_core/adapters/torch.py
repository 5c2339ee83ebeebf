"""The functions of the library on torch tensors.

:func:`delta_rule` and :func:`linear_attention` are differentiable; all others are plain calls. Under
``torch.compile`` and ``torch.export`` scans and steps are operators of the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .. import _core, diagnostics, ops
from .._core import DeviceError, DTypeError, ShapeError, UnsupportedError
from ..feature_maps import FeatureMap, Parameters
from ..ops import Gradients, QKNorm
from . import torch_ops
from .torch_autograd import refuse_batched, refuse_forward_mode, scan
from .torch_call import FLOATS, STEPS, Call, Offsets, parameters

Integers: TypeAlias = Any  # a sequence, or an array of any framework
Pullback: TypeAlias = Callable[..., Gradients]

_INPUTS = ("q", "k", "v", "beta", "g", "initial_state")
_GRADIENTS = tuple(f"out.{name}" for name in Gradients._fields)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
    out: Tensor | None = None,
    final_state_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the delta rule over time, as :func:`fwp_core.delta_rule` does, differentiable.

    Parameters
    ----------
    q, k, v, beta, g, initial_state : Tensor
        As there. Gradients flow to all six, of any order, in reverse mode; those of the first order are
        exact and cost what :func:`fwp_core.vjp` costs. Higher ones walk over the tokens in operations of
        torch, and take memory for all states. Under ``torch.autocast`` q, k and v are taken in its dtype, as
        for a matrix product, and beta, g and initial_state in float32; float64 stays.
    feature_map, qk_norm, attention_norm, eps, scale
        As there. Under ``torch.compile`` the map is to be made outside the compiled function. The projection
        of FAVOR, a tensor or a NumPy array, gets no gradient; a tensor that requires one is an error.
    cu_seqlens : sequence of N+1 integers, or integer array of any framework, optional
        As there. ``torch.compile`` makes a new graph for another N, not for other lengths in a tensor. Those
        in a tensor on a CUDA device are read there: nothing waits for them, and wrong ones are a CudaError of
        the next call.
    out, final_state_out : Tensor, optional
        As there, where no input requires a gradient; not under ``torch.compile``.

    Returns
    -------
    o, final_state : Tensor
        As there; both are differentiable.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, DeviceError, CudaError
        As there. Subclasses of Tensor, fake and meta tensors, and arrays of other frameworks are refused.
    UnsupportedError
        For forward-mode derivatives, tensors that are sparse, and ``out`` with gradients.

    Notes
    -----
    ``torch.func.vmap`` folds its axis into B, or, for packed sequences, into T: one call of the kernel.
    Inputs must not be changed in place before backward, which raises RuntimeError then.

    The work of tensors on a CUDA device is put on the current stream there, and its memory is that of torch's
    allocator. Calls can be captured in CUDA graphs.
    """
    options = ("delta_rule", feature_map, qk_norm, attention_norm, eps, scale)
    return _scan((q, k, v, beta, g, initial_state), options, cu_seqlens, out, final_state_out)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
    out: Tensor | None = None,
    final_state_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run linear attention over time, as :func:`fwp_core.linear_attention` does, differentiable.

    Parameters, results and errors are those of :func:`delta_rule`; ``beta`` may be None.
    """
    options = ("linear_attention", feature_map, qk_norm, attention_norm, eps, scale)
    return _scan((q, k, v, beta, g, initial_state), options, cu_seqlens, out, final_state_out)


def delta_rule_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    dfinal_state: Tensor | None = None,
    out: Gradients | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
) -> Gradients:
    """Return the gradients of :func:`delta_rule`; see :func:`fwp_core.delta_rule_backward`.

    Not differentiable: tensors that require a gradient are an UnsupportedError while grad mode is on.
    """
    options = ("delta_rule", feature_map, qk_norm, attention_norm, eps, scale)
    return _backward((q, k, v, beta, g, initial_state), options, cu_seqlens, do, dfinal_state, out)


def linear_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    dfinal_state: Tensor | None = None,
    out: Gradients | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
) -> Gradients:
    """Return the gradients of :func:`linear_attention`, as :func:`delta_rule_backward` those of its rule."""
    options = ("linear_attention", feature_map, qk_norm, attention_norm, eps, scale)
    return _backward((q, k, v, beta, g, initial_state), options, cu_seqlens, do, dfinal_state, out)


def vjp(
    fn: Callable[..., tuple[Any, Any]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
    out: Tensor | None = None,
    final_state_out: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Pullback]:
    """Run ``fn`` forward and return its results with a function for its gradients; see :func:`fwp_core.vjp`.

    Neither is differentiable: tensors that require a gradient are an UnsupportedError while grad mode is on.
    """
    check_options(feature_map, eps, scale)
    inputs = _plain(_INPUTS, (q, k, v, beta, g, initial_state))
    options = (_rule(fn), feature_map, qk_norm, attention_norm, eps, scale)
    call = Call(*(*options, _lengths(cu_seqlens), _core.isa()))
    o, final_state, checkpoints = _run_scan(call, inputs, out, final_state_out)

    def pullback(do: Tensor, dfinal_state: Tensor | None = None, out: Gradients | None = None) -> Gradients:
        return _run_backward(call, inputs, do, dfinal_state, out, checkpoints)

    return (o, final_state), pullback


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    state_indices: Integers | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Take one token or a few for decoding, ``state`` updated in place; see :func:`fwp_core.delta_rule_step`.

    Not differentiable: tensors that require a gradient are an UnsupportedError while grad mode is on. Under
    ``torch.autocast`` inputs are taken as by :func:`delta_rule`; the state is float32, or float64.
    """
    options = ("delta_rule", feature_map, qk_norm, attention_norm, eps, scale)
    return _step((q, k, v, beta, g), state, state_indices, options, out)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    state: Tensor,
    state_indices: Integers | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Take one token or a few, as :func:`delta_rule_step` does those of its rule."""
    options = ("linear_attention", feature_map, qk_norm, attention_norm, eps, scale)
    return _step((q, k, v, beta, g), state, state_indices, options, out)


def diagnose(
    fn: Callable[..., tuple[Any, Any]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Integers | None = None,
) -> diagnostics.Diagnostics:
    """Return the probes of :func:`fwp_core.diagnose`, NumPy arrays, measured where the tensors are."""
    rule = getattr(ops, _rule(fn))
    check_options(None, eps, scale)
    *arrays, initial_state = (_precise(x) for x in _plain(_INPUTS, (q, k, v, beta, g, initial_state)))
    measure = inspect.unwrap(diagnostics.diagnose)  # what takes any array
    found: diagnostics.Diagnostics = measure(
        rule,
        *arrays,
        feature_map=feature_map,
        qk_norm=qk_norm,
        attention_norm=attention_norm,
        eps=eps,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=_lengths(cu_seqlens),
    )
    return found


def described(projection: Tensor) -> Tensor:
    """The projection of a feature map as the compiled module, which makes a copy, can read it."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(projection) and not projection.requires_grad:
        projection = functorch.get_unwrapped(projection)  # a constant of that transformation
    _check_projection(projection)
    (projection,) = _plain(("projection",), (projection,))
    return projection


def feature_forward(map: FeatureMap, x: Tensor) -> Tensor:
    """Return the features of every row of x, not differentiable."""
    (x,) = _plain(("x",), (x,))
    y: Tensor = _core.feature_forward(map, x)
    return y


def feature_backward(map: FeatureMap, dy: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of sum(phi(x) * dy) with respect to x, not differentiable."""
    dx: Tensor = _core.feature_backward(map, *_plain(("dy", "x"), (dy, x)))
    return dx


# The kinds of calls.


def _scan(
    inputs: Any, options: Any, cu_seqlens: Any, out: Any, final_state_out: Any
) -> tuple[Tensor, Tensor]:
    check_options(options[1], *options[-2:])
    if traced():
        _refuse_outputs(out=out, final_state_out=final_state_out)
        o, final_state = torch_ops.scan(
            *_autocast(inputs), _integers("cu_seqlens", cu_seqlens), *_as_data(options)
        )
        return o, final_state
    if out is not None or final_state_out is not None:
        call = Call(*(*options, _lengths(cu_seqlens)))
        return _run_scan(call, _plain(_INPUTS, _autocast(inputs)), out, final_state_out)[:2]
    inputs = _autocast(tuple(map(_checked, _INPUTS, inputs)))
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    call = Call(*(*options, _lengths(cu_seqlens), _core.isa() if differentiated else None))
    if differentiated or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return scan(call, *inputs)
    return call.forward(inputs)[:2]  # without Function.apply, which takes longer than all else for a token


def _run_scan(
    call: Call, inputs: Any, out: Any, final_state_out: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    names = ("out", "final_state_out")
    outputs = _plain(names, (out, final_state_out), written=True)
    results = call.forward(inputs, *outputs)
    increment_version([x for x in outputs if x is not None])
    return results


def _backward(
    inputs: Any, options: Any, cu_seqlens: Any, do: Any, dfinal_state: Any, out: Gradients | None
) -> Gradients:
    check_options(options[1], *options[-2:])
    call = Call(*(*options, _lengths(cu_seqlens)))
    return _run_backward(call, _plain(_INPUTS, inputs), do, dfinal_state, out, None)


def _run_backward(
    call: Call, inputs: Any, do: Any, dfinal_state: Any, out: Gradients | None, checkpoints: Tensor | None
) -> Gradients:
    do, dfinal_state = _plain(("do", "dfinal_state"), (do, dfinal_state))
    if isinstance(out, tuple) and len(out) == len(_GRADIENTS):
        out = Gradients(*_plain(_GRADIENTS, out, written=True))
    gradients = Gradients(*call.backward(do, dfinal_state, checkpoints, inputs, out))
    increment_version([x for x in out or () if x is not None])
    return gradients


def _step(inputs: Any, state: Any, state_indices: Any, options: Any, out: Any) -> Tensor:
    check_options(options[1], *options[-2:])
    if traced():
        _refuse_outputs(out=out)
        indices = _integers("state_indices", state_indices)
        o: Tensor = torch_ops.step(*_autocast(inputs), state, indices, *_as_data(options))
        return o
    inputs = _plain(_INPUTS, _autocast(inputs))
    state, out = _plain(("state", "out"), (state, out), written=True)
    rule, *rest = options
    o = STEPS[rule](*inputs, state, state_indices, *rest, out)
    increment_version([state] if out is None else [state, out])
    return o


def _rule(fn: Callable[..., Any]) -> str:
    return ops.rule_of(fn, delta_rule, linear_attention)


# Under a tracer.


def traced() -> bool:
    """Whether operations are recorded: by torch.compile, torch.export, torch.jit.trace or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _as_data(options: Any) -> tuple[Any, ...]:
    """The rule, the map's parameters, and the other options."""
    rule, feature_map, *rest = options
    if isinstance(feature_map, Parameters):
        return rule, *feature_map, *rest
    if feature_map is not None and not isinstance(feature_map, FeatureMap):
        raise DTypeError(
            "feature_map: expected None or an object of fwp_core.feature_maps, got "
            f"{type(feature_map).__name__}"
        )
    return rule, *(parameters(feature_map) or (0, 0, 0.0, None)), *rest


def _integers(name: str, values: Any) -> Tensor | None:
    if values is None:
        return None
    if isinstance(values, (str, bytes, dict, set, frozenset)) or not hasattr(values, "__len__"):
        raise DTypeError(f"{name}: expected a sequence of integers, got {type(values).__name__}")
    integers = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    _check_axes(name, integers)
    return integers


def _refuse_outputs(**outputs: Any) -> None:
    for name, x in outputs.items():
        if x is not None:
            raise UnsupportedError(
                f"{name}: expected None under torch.compile, torch.jit.trace and dispatch modes, "
                f"got {type(x).__name__}"
            )


# Arguments.


def _checked(name: str, x: Any) -> Any:
    """The tensor as the kernels, which see its memory only, can read it."""
    if x is None:
        return None
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        expected = "a torch.Tensor, no subclass" if isinstance(x, Tensor) else "a torch.Tensor, as q"
        raise DTypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise UnsupportedError(f"{name}: expected a strided tensor, got layout {x.layout}")
    if x.dtype not in FLOATS:
        raise DTypeError(f"{name}: expected dtype float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.is_meta:
        raise DeviceError(f"{name}: expected a tensor that has memory, got one on device meta")
    return x.resolve_neg() if x.is_neg() else x


def _plain(names: Sequence[str], tensors: Sequence[Any], written: bool = False) -> tuple[Any, ...]:
    """The tensors for a call that no derivative passes through."""
    return tuple(_undifferentiated(name, x, written) for name, x in zip(names, tensors, strict=False))


def _undifferentiated(name: str, x: Any, written: bool) -> Any:
    if x is None:
        return None
    if written and isinstance(x, Tensor) and x.is_neg():
        raise UnsupportedError(f"{name}: expected a tensor without the negative bit, got one with it")
    x = _checked(name, x)
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedError(
            f"{name}: expected a tensor outside torch.jit.trace, which records no plain call, got one in it; "
            "fwp_core.torch.delta_rule, linear_attention and their steps can be traced"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise UnsupportedError(
            f"{name}: expected a tensor outside torch.func, got one of a transformation; "
            "fwp_core.torch.delta_rule and linear_attention can be transformed"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{name}: expected a tensor that requires no gradient, got one that does; give {name}.detach(), "
            "or differentiate fwp_core.torch.delta_rule or linear_attention, without out="
        )
    _refuse_tangent(x)
    return x


def _refuse_tangent(x: Tensor) -> None:
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and unpack(x).tangent is not None:
        refuse_forward_mode()


def check_options(feature_map: Any, eps: Any, scale: Any) -> None:
    """Refuse those that would silently get no gradient; FAVOR itself refuses such a projection."""
    if isinstance(feature_map, Parameters):
        _check_projection(feature_map.projection)
    for name, x in (("eps", eps), ("scale", scale)):
        if not isinstance(x, Tensor):
            continue
        _refuse_tangent(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"{name}: expected a number, got a tensor that requires a gradient and would get none; "
                + ("multiply the result instead" if name == "scale" else "give eps.item()")
            )


def _check_projection(projection: Any) -> None:
    if isinstance(projection, Tensor) and projection.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "projection: expected a tensor that requires no gradient, got one that does; give a detached one"
        )


def _lengths(cu_seqlens: Integers | None) -> Offsets | None:
    """Integers that a later change of the caller's array does not touch; those of a device stay there."""
    if cu_seqlens is None:
        return None
    batched = isinstance(cu_seqlens, Tensor) and torch._C._functorch.is_batchedtensor(cu_seqlens)
    refuse_batched("cu_seqlens", batched)
    if _on_device(cu_seqlens):
        _check_axes("cu_seqlens", cu_seqlens)
        return cu_seqlens.clone()
    integers = _core.to_integers("cu_seqlens", cu_seqlens)
    _check_axes("cu_seqlens", integers)
    return tuple(integers.tolist())


def offsets(cu_seqlens: Integers, x: Tensor) -> Offsets:
    """cu_seqlens of x [B,T,...], checked where their values can be known without waiting for them."""
    if traced():
        return cast(Tensor, _integers("cu_seqlens", cu_seqlens))
    found = cast(Offsets, _lengths(cu_seqlens))
    if not isinstance(found, Tensor):
        check_call((*x.shape[:2], 0, 0), cu_seqlens=found)
    return found


def check_call(
    shape: Sequence[int],
    qk_norm: Any = None,
    attention_norm: Any = False,
    eps: Any = 1e-6,
    scale: Any = 1.0,
    cu_seqlens: Any = None,
) -> None:
    """Make the checks of a scan with these options on inputs of this shape, without inputs."""
    x = _core.AbstractArray(shape, "float32")
    options = (None, qk_norm, attention_norm, eps, scale)
    _core.linear_attention(x, x, x, None, None, *options, None, cu_seqlens, None, None, False)


def _check_axes(name: str, integers: Any) -> None:
    if integers.ndim != 1:
        expected = "(N+1,)" if name == "cu_seqlens" else "(B,)"
        raise ShapeError(f"{name}: expected shape {expected}, got {tuple(integers.shape)}")


def _on_device(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.device.type != "cpu"


def _precise(x: Tensor | None) -> Tensor | None:
    """In the precision of the states: nothing is rounded."""
    return x if x is None or x.dtype == torch.float64 else x.float()


def _autocast(inputs: Any) -> Any:
    """Under torch.autocast q, k and v in its dtype, as for a matrix product, and the rest in float32."""
    device = inputs[0].device.type if isinstance(inputs[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return inputs
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs):
        return inputs
    dtypes = (*(torch.get_autocast_dtype(device),) * 3, *(torch.float32,) * 3)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST else x
        for x, dtype in zip(inputs, dtypes, strict=False)
    )


_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)
