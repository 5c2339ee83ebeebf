"""Make models of Hugging Face transformers use this library on the CPU.

>>> from fwp_core.compat.transformers import patch, unpatch  # doctest: +SKIP
>>> patch()  # doctest: +SKIP
('transformers.models.qwen3_next.modeling_qwen3_next', ...)

Models with a gated delta rule or Kimi Delta Attention call two functions of their own module: one for
sequences, in prefill and training, and one for a token, in decoding. :func:`patch` puts this library in their
place. Layers look the functions up by name whenever they run, so it makes no difference whether a model was
made before or after, and nothing of the model changes.

Calls on CPU tensors are computed here, those on any other device by the function that was there before. That
function also gets packed sequences, which those of torch refuse: the convolution of the layer, which is not
replaced, would mix neighbouring ones.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .._core import ArgumentError, UnsupportedError
from . import fla

__all__ = ["patch", "patched", "unpatch"]

Function = Callable[..., Any]

MODELS = (
    "bailing_hybrid",
    "glm5_next",
    "kimi_linear",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen4_exp",
)
FUNCTIONS: dict[str, Function] = {
    "torch_chunk_gated_delta_rule": fla.chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": fla.fused_recurrent_gated_delta_rule,
    "chunk_kimi_delta_attention": fla.chunk_kda,
    "recurrent_kimi_delta_attention": fla.fused_recurrent_kda,
}

INPUTS = ("query", "key", "value")
PACKED = ("cu_seqlens", "seq_idx")  # arguments that say where packed sequences begin

Place = tuple[ModuleType, str]  # a function, by the name that its module has for it
_replaced: dict[Place, tuple[Function, Function]] = {}  # what was there, and what is there


def patch(*models: str) -> tuple[str, ...]:
    """Let models of the installed transformers compute their fast weights here, on the CPU.

    Doing it twice is doing it once.

    Parameters
    ----------
    models : str
        Names out of ``MODELS``, such as "qwen3_next"; without any, all that the installed version has. Their
        modules are imported, which may take seconds.

    Returns
    -------
    modules : tuple of str
        Names of all modules of which functions are replaced.

    Raises
    ------
    ImportError
        There is no transformers.
    ArgumentError
        A name is not one of ``MODELS``.
    UnsupportedError
        The installed version has none of these models, or they do not have these functions.

    Notes
    -----
    Nothing is patched where there is an error.
    """
    found = [(module, name) for module in _modules(models) for name in FUNCTIONS if hasattr(module, name)]
    if not found:
        asked = ", ".join(models or MODELS)
        raise UnsupportedError(
            f"models: expected transformers to have the functions of {asked}, got none of them"
        )
    for module, name in found:
        if (module, name) not in _replaced:
            original = getattr(module, name)
            replacement = _on_cpu(FUNCTIONS[name], original)
            setattr(module, name, replacement)
            _replaced[module, name] = original, replacement
    return tuple(dict.fromkeys(module.__name__ for module, _ in _replaced))


def unpatch() -> None:
    """Undo :func:`patch`; what others have replaced since stays as it is."""
    _restore(set(_replaced))


@contextmanager
def patched(*models: str) -> Iterator[tuple[str, ...]]:
    """Use :func:`patch` within a with statement, and :func:`unpatch` after it what was not patched before."""
    before = set(_replaced)
    try:
        yield patch(*models)
    finally:
        _restore(set(_replaced) - before)


def _restore(places: Iterable[Place]) -> None:
    for place in places:
        module, name = place
        original, replacement = _replaced.pop(place)
        if getattr(module, name) is replacement:
            setattr(module, name, original)


def _modules(models: tuple[str, ...]) -> list[ModuleType]:
    for model in models:
        if model not in MODELS:
            raise ArgumentError(f"models: expected names out of {', '.join(MODELS)}, got {model!r}")
    import_module("transformers")
    return [
        import_module(f"transformers.models.{model}.modeling_{model}")
        for model in models or MODELS
        if find_spec(f"transformers.models.{model}")
    ]


def _on_cpu(ours: Function, original: Function) -> Function:
    """``ours``, a function of fla, with the arguments of ``original``, if it is to compute them."""
    names = tuple(inspect.signature(original).parameters)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        wrong = len(arguments) < len(args) + len(kwargs) or not {*INPUTS} <= arguments.keys()
        packed = any(arguments.get(name) is not None for name in PACKED)
        if wrong or packed or arguments["query"].device.type != "cpu":
            return original(*args, **kwargs)
        arguments.pop("chunk_size", None)  # any is good there
        q, k, v = (arguments.pop(name) for name in INPUTS)
        if q.dtype == k.dtype == v.dtype:
            return ours(q, k, v, **arguments)
        o, final_state = ours(q.float(), k.float(), v.float(), **arguments)
        return o.to(q.dtype), final_state

    return function
