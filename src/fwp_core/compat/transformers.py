"""Make models of Hugging Face transformers use this library on the CPU.

>>> from fwp_core.compat.transformers import patch, unpatch  # doctest: +SKIP
>>> patch()  # doctest: +SKIP
('transformers.models.qwen3_next.modeling_qwen3_next', ...)

Models with a gated delta rule or Kimi Delta Attention call two functions of their own module: one for
sequences, in prefill and training, and one for a token, in decoding. :func:`patch` puts this library in their
place. Layers look the functions up by name whenever they run, so it makes no difference whether a model was
made before or after, and nothing of the model changes.

Calls on CPU tensors are computed here, those on any other device by the function that was there before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .._core import UnsupportedError
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

# (module, name of the function) -> (what was there, what is there)
_replaced: dict[tuple[ModuleType, str], tuple[Function, Function]] = {}


def patch() -> tuple[str, ...]:
    """Let the models of the installed transformers compute their fast weights here, on the CPU.

    They are ``MODELS``, as far as the installed version has them. Doing it twice is doing it once.

    Returns
    -------
    modules : tuple of str
        Names of the modules of which functions are replaced.

    Raises
    ------
    ImportError
        There is no transformers.
    UnsupportedError
        It has none of these models, or they do not have these functions.
    """
    for module in _modules():
        for name, ours in FUNCTIONS.items():
            if hasattr(module, name) and (module, name) not in _replaced:
                original = getattr(module, name)
                replacement = _on_cpu(ours, original)
                setattr(module, name, replacement)
                _replaced[module, name] = original, replacement
    if not _replaced:
        raise UnsupportedError(f"transformers: expected a version with one of {', '.join(MODELS)}, got none")
    return tuple(dict.fromkeys(module.__name__ for module, _ in _replaced))


def unpatch() -> None:
    """Undo :func:`patch`; what others have replaced since stays as it is."""
    for (module, name), (original, replacement) in _replaced.items():
        if getattr(module, name) is replacement:
            setattr(module, name, original)
    _replaced.clear()


@contextmanager
def patched() -> Iterator[tuple[str, ...]]:
    """Use :func:`patch` within a with statement, and leave things as they were."""
    before = bool(_replaced)
    try:
        yield patch()
    finally:
        if not before:
            unpatch()


def _modules() -> Iterator[ModuleType]:
    import_module("transformers")
    for model in MODELS:
        if find_spec(f"transformers.models.{model}"):
            yield import_module(f"transformers.models.{model}.modeling_{model}")


def _on_cpu(ours: Function, original: Function) -> Function:
    """``ours``, a function of fla, with the arguments of ``original``, if they are on the CPU."""
    names = tuple(inspect.signature(original).parameters)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False), **kwargs)
        if arguments["query"].device.type != "cpu":
            return original(*args, **kwargs)
        q, k, v = (arguments.pop(name) for name in ("query", "key", "value"))
        return ours(q, k, v, **arguments)

    return function
