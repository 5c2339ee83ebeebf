"""Drop-ins: what other projects call a fast weight, computed by this library.

- ``fla``: the functions of flash-linear-attention, on CPU tensors (needs torch)
- ``transformers``: ``patch()`` makes models of Hugging Face transformers use this library on the CPU
- ``onnx``: the operator LinearAttention of ONNX, on NumPy arrays

Each is imported when it is first asked for.
"""

from importlib import import_module
from types import ModuleType

__all__ = ["fla", "onnx", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
