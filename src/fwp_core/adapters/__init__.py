"""Which part of the package answers for an array: one module per framework that differentiates or compiles.

NumPy arrays, and arrays that speak DLPack and nothing more, go to the compiled module as they are. An adapter
module, ``torch`` or ``jax``, has functions of the names and signatures of the public ones, and
``feature_forward(map, x)`` and ``feature_backward(map, dy, x)``. It is imported when its first array comes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np

# Frameworks with an adapter module of their name, and the type of their arrays, tracers included.
_ARRAY_TYPES = {"torch": "Tensor", "jax": "Array"}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def adapter(x: object) -> ModuleType | None:
    """Return the adapter module of this array, None where it needs none.

    A framework that nobody has imported owns no array, so this imports none.
    """
    if type(x) is np.ndarray:
        return None
    for name, array_type in _ARRAY_TYPES.items():
        kind = getattr(sys.modules.get(name), array_type, None)
        if isinstance(kind, type) and isinstance(x, kind):  # another module may stand under the name
            return _imported(name)
    return None


def _imported(name: str) -> ModuleType:
    # By statements: torch.compile follows those, and not importlib.
    if name == "torch":
        from . import torch

        return torch
    from . import jax

    return jax


def described(x: Any) -> Any:
    """Return the array as the compiled module reads it: of JAX, which traces programs, its description."""
    return getattr(adapter(x), "described", lambda x: x)(x)


def routed_by(argument: str) -> Callable[[_Function], _Function]:
    """Decorate a public function: this argument's adapter, if it has one, takes the call."""

    def decorate(function: _Function) -> _Function:
        position = list(inspect.signature(function).parameters).index(argument)
        name = function.__name__

        @functools.wraps(function)
        def routed(*args: Any, **kwargs: Any) -> Any:
            x = args[position] if len(args) > position else kwargs.get(argument)
            if type(x) is np.ndarray or (owner := adapter(x)) is None:
                return function(*args, **kwargs)
            return getattr(owner, name)(*args, **kwargs)

        return cast(_Function, routed)

    return decorate
