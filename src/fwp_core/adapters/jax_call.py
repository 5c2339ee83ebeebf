"""One call of a scan on JAX arrays as data, and the custom calls of XLA for it.

Nothing here is differentiable. A custom call is a function of python/xla.cpp, registered when the first one
is traced: after the backends of JAX have started, which a target that JAX refuses must not prevent.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np

from .. import _core
from .._core import UnsupportedError
from ..feature_maps import Parameters

Array: TypeAlias = jax.Array  # a tracer is one too
Arrays: TypeAlias = Mapping[str, Array]  # by name; what is absent is not there

# What has a gradient; then all operands and results, in the order of python/xla.cpp.
INPUTS = ("q", "k", "v", "beta", "g", "initial_state")
OPERANDS = (
    *INPUTS,
    "cu_seqlens",
    "state_indices",
    "projection",
    "state",
    "do",
    "dfinal_state",
    "checkpoints",
    "level",
)
RESULTS = ("o", "final_state", "checkpoints", "level", *INPUTS)  # gradients by the names of what they are of


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a result."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, x: Any) -> Spec:
        return cls(tuple(x.shape), str(x.dtype))


LEVEL = Spec((), "int32")


@dataclass(frozen=True)
class Call:
    """The options of a call and the shapes of its results: all that a compiled program fixes, hashable."""

    function: str
    rank: int  # of q
    results: tuple[tuple[str, Spec], ...]
    features: Parameters | None  # without the projection, an operand
    qk_norm: int
    attention_norm: bool
    eps: float
    scale: float
    derivatives: int = 0  # how many there are: 0 of a plain call, 1, or 2 for any number
    cu_seqlens: tuple[int, ...] | None = None  # where they are needed as numbers

    def spec(self, name: str) -> Spec:
        return dict(self.results)[name]


_lock = threading.Lock()


@functools.cache
def _registered() -> None:
    jax.devices()
    for platform in ("cpu", "CUDA"):
        for name, handler in _core.xla_targets(platform).items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)


def custom_call(
    call: Call,
    suffix: str,
    operands: Arrays,
    results: Mapping[str, Spec],
    aliases: tuple[str, str] | None = None,
) -> dict[str, Array]:
    """Call the function of this name with the operands and return its results, by name.

    ``aliases`` names an operand and the result that takes its memory where that is free.
    """
    taken = tuple(name for name in OPERANDS if name in operands)
    made = tuple((name, results[name]) for name in RESULTS if name in results)
    values = _opaque(call, suffix, taken, made, aliases, *(operands[name] for name in taken))
    return dict(zip((name for name, _ in made), values, strict=True))


def varying(operands: Arrays) -> dict[str, Array]:
    """Return the operands such that, inside of shard_map, all vary over the same axes of the mesh."""
    axes = {name: _axes(x) for name, x in operands.items()}
    union = frozenset[str]().union(*axes.values())
    missing = {name: tuple(sorted(union - own)) for name, own in axes.items()}
    return {name: _spread(x, missing[name]) if missing[name] else x for name, x in operands.items()}


def _axes(x: Array) -> frozenset[str]:
    """Those over which x varies: called vma up to JAX 0.8."""
    kind = jax.typeof(x)
    axes: frozenset[str] = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return axes


def _spread(x: Array, axes: tuple[str, ...]) -> Array:
    lax: Any = jax.lax
    spread: Array = lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)
    return spread


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3, 4))
def _called(
    call: Call,
    suffix: str,
    taken: tuple[str, ...],
    made: tuple[tuple[str, Spec], ...],
    aliases: tuple[str, str] | None,
    *operands: Array,
) -> Sequence[Array]:
    with _lock:
        _registered()
    features = call.features or Parameters(0)
    places = {}
    if aliases is not None:
        places = {taken.index(aliases[0]): [name for name, _ in made].index(aliases[1])}
    kinds = dict(zip(taken, map(jax.typeof, operands), strict=True))
    sources = {aliases[1]: aliases[0]} if aliases is not None else {}
    target = jax.ffi.ffi_call(
        f"fwp_core.{call.function}{suffix}",
        tuple(_kind(spec, kinds.get(sources.get(name, name), kinds[taken[0]])) for name, spec in made),
        vmap_method="broadcast_all",
        input_output_aliases=places,
    )
    return target(
        *operands,
        operands=_mask(OPERANDS, taken),
        results=_mask(RESULTS, [name for name, _ in made]),
        rank=call.rank,
        map=features.kind,
        nu=features.nu,
        map_eps=features.eps,
        qk_norm=call.qk_norm,
        attention_norm=call.attention_norm,
        eps=call.eps,
        scale=call.scale,
    )


def _kind(spec: Spec, like: Any) -> Any:
    """The type of a result: sharded as ``like`` where it has that shape, else on all devices of its mesh.

    Inside of shard_map it varies over the same axes of the mesh.
    """
    of: Any = jax.sharding
    sharding = like.sharding
    if like.shape != spec.shape:
        sharding = of.NamedSharding(sharding.mesh, of.PartitionSpec(*[None] * len(spec.shape)))
    return like.update(shape=spec.shape, dtype=np.dtype(spec.dtype), weak_type=False, sharding=sharding)


def _not_differentiable(call: Call, suffix: str, *_: Any) -> Any:
    if call.derivatives:
        raise UnsupportedError(
            f"{call.function}: expected no derivative but the first, in reverse mode; "
            f"fwp_core.jax.{call.function}(..., twice_differentiable=True) has others"
        )
    raise UnsupportedError(
        f"{call.function}{suffix}: expected arguments without a derivative, because a plain call has none; "
        "give it jax.lax.stop_gradient of them"
    )


_called.defjvp(_not_differentiable)
_opaque = jax.jit(_called, static_argnums=(0, 1, 2, 3, 4), inline=True)  # fast without an outer jit, too


def _mask(names: tuple[str, ...], present: Iterable[str]) -> np.int64:
    mask: np.int64 = np.int64(sum(1 << names.index(name) for name in present))
    return mask
