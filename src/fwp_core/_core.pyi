from collections.abc import Sequence
from typing import Any, Final, TypeVar

_Array = TypeVar("_Array")  # one framework in a call, and its kind comes back

__version__: Final[str]
ERRORS: Final[tuple[tuple[int, str, str, str], ...]]

class FwpError(Exception): ...
class ShapeError(FwpError, ValueError): ...
class DTypeError(FwpError, TypeError): ...
class DeviceError(FwpError, BufferError): ...
class UnsupportedError(FwpError, NotImplementedError): ...
class ArgumentError(FwpError, ValueError): ...
class ReadOnlyError(FwpError, BufferError): ...
class CudaError(FwpError, RuntimeError): ...

class AbstractArray:
    def __init__(self, shape: Sequence[int], dtype: str, /) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

class FeatureMap:
    def __init__(self, kind: int, nu: int, eps: float, projection: Any, /) -> None: ...

class Array:
    """Memory of the library's own, of the CPU or of a CUDA device, that any framework can take over."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any: ...
    def __copy__(self) -> Array: ...
    def __deepcopy__(self, memo: Any) -> Array: ...

def live_tensors() -> int: ...
def to_numpy(name: str, x: Any, /) -> Any: ...
def to_integers(name: str, x: Any, /) -> Any: ...
def kept_integers(name: str, x: Any, /) -> Any: ...
def feature_parameters(map: FeatureMap, /) -> tuple[int, float, Any]: ...
def feature_size(map: FeatureMap, n: int, /) -> int: ...
def feature_forward(map: FeatureMap, x: _Array, /) -> _Array: ...
def feature_backward(map: FeatureMap, dy: _Array, x: _Array, /) -> _Array: ...
def xla_targets(platform: str, /) -> dict[str, Any]: ...
def scan_options(
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    /,
) -> tuple[int, bool, float, float]: ...
def compiler() -> str: ...
def set_num_threads(threads: int, /) -> None: ...
def get_num_threads() -> int: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str, /) -> None: ...
def isa_calls(name: str, /) -> int: ...
def block_size() -> int: ...
def fma_peak(dtype: str, seconds: float, /) -> float: ...
def cache_limit() -> int: ...
def cache_idle() -> int: ...
def empty_cache() -> None: ...
def cuda_state() -> str: ...
def check_device(device: int, /) -> None: ...
def linear_attention(
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    initial_state: _Array | None,
    cu_seqlens: Any,
    out: _Array | None,
    final_state_out: _Array | None,
    with_checkpoints: bool,
    /,
) -> tuple[_Array, _Array, _Array | None]: ...
def linear_attention_backward(
    do: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    dfinal_state: _Array | None,
    out: tuple[_Array | None, ...] | None,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    initial_state: _Array | None,
    cu_seqlens: Any,
    checkpoints: _Array | None,
    /,
) -> tuple[_Array, _Array, _Array, _Array | None, _Array | None, _Array | None]: ...
def linear_attention_step(
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    state: _Array,
    state_indices: Any,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    out: _Array | None,
    /,
) -> _Array: ...
def delta_rule(
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    initial_state: _Array | None,
    cu_seqlens: Any,
    out: _Array | None,
    final_state_out: _Array | None,
    with_checkpoints: bool,
    /,
) -> tuple[_Array, _Array, _Array | None]: ...
def linear_attention_diagnose(
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    initial_state: _Array | None,
    cu_seqlens: Any,
    /,
) -> _Array: ...
def delta_rule_diagnose(
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    initial_state: _Array | None,
    cu_seqlens: Any,
    /,
) -> _Array: ...
def delta_rule_backward(
    do: _Array,
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    dfinal_state: _Array | None,
    out: tuple[_Array | None, ...] | None,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    initial_state: _Array | None,
    cu_seqlens: Any,
    checkpoints: _Array | None,
    /,
) -> tuple[_Array, _Array, _Array, _Array | None, _Array | None, _Array | None]: ...
def delta_rule_step(
    q: _Array,
    k: _Array,
    v: _Array,
    beta: _Array | None,
    g: _Array | None,
    state: _Array,
    state_indices: Any,
    feature_map: FeatureMap | None,
    qk_norm: str | None,
    attention_norm: bool,
    eps: float,
    scale: float,
    out: _Array | None,
    /,
) -> _Array: ...
