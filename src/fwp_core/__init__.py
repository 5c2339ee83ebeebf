"""Fast weight programmers: linear attention and the delta rule, with hand-written gradients.

A small matrix per head, the fast weight, is written and read at every time step:

>>> import numpy as np
>>> import fwp_core as fwp
>>> rng = np.random.default_rng(0)
>>> q, k, v = rng.standard_normal((3, 1, 16, 2, 8)) / 8**0.5  # [B,T,H,K]
>>> beta = np.full((1, 16, 2), 0.5)
>>> (o, final_state), pullback = fwp.vjp(fwp.delta_rule, q, k, v, beta)
>>> o.shape, final_state.shape
((1, 16, 2, 8), (1, 2, 8, 8))
>>> pullback(np.ones_like(o)).dk.shape
(1, 16, 2, 8)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import feature_maps, reference
from ._core import (
    ArgumentError,
    Array,
    CudaError,
    DeviceError,
    DTypeError,
    FwpError,
    ReadOnlyError,
    ShapeError,
    UnsupportedError,
    __version__,
)
from .config import (
    available_isas,
    check_device,
    empty_cache,
    get_cmake_dir,
    get_include,
    get_num_threads,
    has_cuda,
    isa,
    set_num_threads,
    show_config,
    threads,
    use_isa,
)
from .diagnostics import Diagnostics, diagnose
from .ops import (
    Gradients,
    delta_rule,
    delta_rule_backward,
    delta_rule_step,
    linear_attention,
    linear_attention_backward,
    linear_attention_step,
    vjp,
)

__all__ = [
    "ArgumentError",
    "Array",
    "CudaError",
    "DTypeError",
    "DeviceError",
    "Diagnostics",
    "FwpError",
    "Gradients",
    "ReadOnlyError",
    "ShapeError",
    "UnsupportedError",
    "__version__",
    "available_isas",
    "check_device",
    "delta_rule",
    "delta_rule_backward",
    "delta_rule_step",
    "diagnose",
    "empty_cache",
    "feature_maps",
    "get_cmake_dir",
    "get_include",
    "get_num_threads",
    "has_cuda",
    "isa",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step",
    "reference",
    "set_num_threads",
    "show_config",
    "threads",
    "use_isa",
    "vjp",
]

if not TYPE_CHECKING:  # to a type checker every other name would exist too

    def __getattr__(name: str) -> ModuleType:
        """Import the modules that need a framework when they are asked for."""
        if name in ("torch", "jax", "compat"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
