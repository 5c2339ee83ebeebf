"""Threads, instruction sets, and what this build of the library is."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

from . import _core
from ._core import ArgumentError, DTypeError

MOST_THREADS = 256
MOST_DEVICES = 1 << 16  # no machine has one of this number, or of a larger one


def set_num_threads(n: int) -> None:
    """Set the number of threads that each call uses, at least 1 (else ArgumentError); 256 are the most used.

    The first value comes from ``FWP_NUM_THREADS``, then ``OMP_NUM_THREADS``, each where it is a whole number,
    then the processors this process may use. Results do not depend on it, bit for bit.
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise DTypeError(f"threads: expected an integer, got {type(n).__name__}") from None
    _core.set_num_threads(max(-MOST_THREADS, min(count, MOST_THREADS)))


def get_num_threads() -> int:
    """Return the number of threads that each call uses."""
    return _core.get_num_threads()


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use ``n`` threads inside a ``with`` block. The setting is the process's, not the Python thread's.

    >>> with threads(1):
    ...     get_num_threads()
    1
    """
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


def isa() -> str:
    """Return the instruction set level in use: ``"base"``, ``"v3"`` (AVX2), ``"v4"`` (AVX-512) or ``"neon"``.

    The first choice is the best level of this machine, or ``FWP_ISA``; if that names no level, ArgumentError.
    """
    return _core.isa()


def available_isas() -> tuple[str, ...]:
    """Return the instruction set levels of this build that this machine has, best last."""
    return tuple(_core.available_isas())


class use_isa:
    """Switch the process to an instruction set level, at once; as a context manager, restore it at the end.

    Results are bitwise repeatable within a level and agree to rounding between levels. An unknown or absent
    level is an ArgumentError, a ValueError.

    >>> with use_isa("base"):
    ...     isa()
    'base'
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise DTypeError(f"name: expected a string, got {type(name).__name__}")
        if name not in available_isas():
            raise ArgumentError(f"name: expected one of {', '.join(available_isas())}, got {name}")
        self._name = name
        self._before = _current_isa()
        _core.use_isa(name)

    def __enter__(self) -> use_isa:
        if _current_isa() != self._name:  # entered a while after it was made, or again
            self._before = _current_isa()
            _core.use_isa(self._name)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            _core.use_isa(self._before)


def _current_isa() -> str | None:
    """The level in use, None if FWP_ISA names none and none was chosen since."""
    try:
        return _core.isa()
    except ArgumentError:
        return None


def empty_cache() -> None:
    """Give the memory that is kept warm for the next large results back to the system.

    Results and workspaces of 1 MiB and more are made in the memory of earlier ones that are gone. Up to
    ``FWP_CACHE_MB`` megabytes of it (512; 0: none) are kept, the newest first. Arrays in use are not touched.
    """
    _core.empty_cache()


def _cache_limit() -> int | None:
    """The bytes that may be kept warm, None if FWP_CACHE_MB is no number of megabytes."""
    try:
        return _core.cache_limit()
    except ArgumentError:
        return None


def has_cuda() -> bool:
    """Return whether arrays on an NVIDIA GPU can be used."""
    return _core.cuda_state() == "available"


def check_device(device: int = 0) -> None:
    """Raise a CudaError for what kernels of earlier calls on a CUDA device have found wrong, if they have.

    Offsets and slots that lie in its memory can only be checked by kernels. Every scan, step, map and
    diagnosis on the device first reports what was found by then; after the last one ask here, when its work
    is done (after ``torch.cuda.synchronize()``, say): this waits for nothing. What has been reported is not
    reported again, and of several faults the last one is.

    Parameters
    ----------
    device
        The device's number, from 0 on (else ArgumentError). Where there is no CUDA, DeviceError.
    """
    try:
        number = operator.index(device)
    except TypeError:
        raise DTypeError(f"device: expected an integer, got {type(device).__name__}") from None
    if number < 0:
        raise ArgumentError(f"device: expected a number from 0 on, got {number}")
    _core.check_device(min(number, MOST_DEVICES))


@overload
def show_config(mode: None = None) -> None: ...
@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...
def show_config(mode: str | None = None) -> dict[str, Any] | None:
    """Print version, build, threads, memory and CUDA state, or return them with ``mode="dict"``.

    ``isa`` is None, and ``block_size`` 0, if FWP_ISA names no level of this machine. ``block_size`` is the
    number of tokens taken per pass over the fast weight at the level in use.
    ``cache_idle`` bytes of memory are kept warm for the next results, at most ``cache_limit``; that is None
    if FWP_CACHE_MB is no number.
    """
    if mode not in (None, "dict"):
        raise ArgumentError(f"mode: expected None or 'dict', got {mode!r}")
    config = {
        "version": _core.__version__,
        "compiler": _core.compiler(),
        "isa": _current_isa(),
        "available_isas": available_isas(),
        "block_size": _core.block_size(),
        "threads": get_num_threads(),
        "cache_limit": _cache_limit(),
        "cache_idle": _core.cache_idle(),
        "cuda": _core.cuda_state(),
    }
    if mode == "dict":
        return config
    for name, value in config.items():
        print(f"{name:<15}{' '.join(value) if isinstance(value, tuple) else value}")
    return None


def get_include() -> str:
    """Return the folder to add to a compiler's include path for ``fwp/fwp.h`` and ``fwp/fwp.hpp``."""
    return _installed("include")


def get_cmake_dir() -> str:
    """Return the folder of the CMake package, for ``-Dfwp_core_DIR=...``."""
    return _installed("lib", "cmake", "fwp_core")


def _installed(*parts: str) -> str:
    # An editable install has a second folder for what the build made.
    import fwp_core

    for folder in fwp_core.__path__:
        path = Path(folder, *parts)
        if path.is_dir():
            return str(path)
    raise FileNotFoundError(f"{Path(*parts)} is not installed with fwp_core")
