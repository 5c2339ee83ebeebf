"""Feature maps: what makes the keys and queries of a fast weight from those of the slow network.

A map phi turns each row of size n into ``phi.dim(n)`` features. Given to a scan as ``feature_map=``, it is
applied inside, forward and backward, and phi(q) and phi(k) never exist for the whole sequence. Called by
itself it returns them, and ``backward`` their gradient. A map of your own is applied outside: pass phi(q) and
phi(k) to the scan and its gradients to your map's.

Formulas and references: Schlag, Irie, Schmidhuber 2021, arXiv 2102.11174, section 5.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _core
from ._core import ArgumentError, DTypeError, ShapeError
from .adapters import adapter, described

__all__ = ["DPFP", "ELU1", "FAVOR", "FeatureMap", "ReLU", "Softmax", "orthogonal_gaussian"]

Array = NDArray[Any]
ArrayT = TypeVar("ArrayT")

# FWP_MAP_... of fwp.h
_RELU, _ELU1, _SOFTMAX, _DPFP, _FAVOR = range(1, 6)
_PROJECTION_DTYPES = ("float32", "float64")


def _integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise DTypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not least <= value < 2**31:
        raise ArgumentError(f"{name}: expected an integer from {least} to 2^31 - 1, got {value}")
    return int(value)


class Parameters(NamedTuple):
    """A feature map as plain data."""

    kind: int  # FWP_MAP_... of fwp.h
    nu: int = 0
    eps: float = 0.0
    projection: Any = None  # [m,n]

    def dim(self, n: int) -> int:
        """Return the number of features of a row of size ``n``."""
        if self.kind == _FAVOR:
            return 2 * int(self.projection.shape[0])
        return 2 * n * self.nu if self.kind == _DPFP else n


class FeatureMap(_core.FeatureMap):
    """What all feature maps can do; see the maps themselves.

    Maps are hashable, and equal where their parameters are; projections where they are the same, not a copy.
    """

    __slots__ = ("_parameters",)  # where a tracing compiler can read them

    def __init__(self, parameters: Parameters) -> None:
        given = parameters.projection
        super().__init__(*parameters[:-1], described(given))
        held = _core.feature_parameters(self)[2]
        in_place = isinstance(given, np.ndarray) and np.may_share_memory(given, held)
        copied = not in_place and not isinstance(held, _core.AbstractArray)
        self._parameters = parameters._replace(projection=held) if copied else parameters

    def dim(self, n: int) -> int:
        """Return the number of features of a row of size ``n``."""
        return _core.feature_size(self, _integer("n", n, 0))

    def __call__(self, x: ArrayT) -> ArrayT:
        """Return the features of every row of x.

        Parameters
        ----------
        x : ndarray [..., n]
            float32, float64, float16 or bfloat16; any strides. Halves are float32 inside, rounded once.

        Returns
        -------
        y : ndarray [..., dim(n)]
            Of x's dtype.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            Before anything is computed.
        """
        y: ArrayT = (adapter(x) or _core).feature_forward(self, x)
        return y

    def backward(self, dy: ArrayT, x: ArrayT) -> ArrayT:
        """Return the gradient of sum(phi(x) * dy) with respect to x.

        Parameters
        ----------
        dy : ndarray [..., dim(n)]
            Gradient with respect to phi(x), of x's dtype.
        x : ndarray [..., n]
            As given to the map.

        Returns
        -------
        dx : ndarray [..., n]
            Of x's dtype.
        """
        dx: ArrayT = (adapter(x) or _core).feature_backward(self, dy, x)
        return dx

    def _arguments(self) -> tuple[Any, ...]:
        return ()

    def _identity(self) -> tuple[Any, ...]:
        return type(self), *self._parameters[:-1], id(self._parameters.projection)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureMap) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._arguments()))})"


class ReLU(FeatureMap):
    """phi(x) = max(x, 0), n features. The gradient at 0 is 0."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Parameters(_RELU))


class ELU1(FeatureMap):
    """phi(x) = x + 1 for x > 0, else exp(x): ELU(x) + 1, n features (Katharopoulos et al. 2020).

    By branches: where x is far below zero the sum would cancel, in half precision from x = -8 on to nothing.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Parameters(_ELU1))


class Softmax(FeatureMap):
    """phi(x) = exp(x) / sum(exp(x)) over the row, n features."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Parameters(_SOFTMAX))


class DPFP(FeatureMap):
    """Deterministic parameter-free projection (paper, eq. 37), 2 n nu features, most of them zero.

    With r = [max(x, 0); max(-x, 0)] of size 2n, feature (j-1) 2n + i is r_i r_{i-j mod 2n}, for j = 1..nu and
    i = 0..2n-1: the order of the paper's own code.

    Parameters
    ----------
    nu : int
        How many shifts, from 1 to 2n - 1; shift n gives zeros, and those beyond it the same products as
        those before.
    """

    __slots__ = ()

    def __init__(self, nu: int = 1) -> None:
        super().__init__(Parameters(_DPFP, nu=_integer("nu", nu, 1)))

    @property
    def nu(self) -> int:
        """How many shifts."""
        return _core.feature_parameters(self)[0]

    def _arguments(self) -> tuple[Any, ...]:
        return (self.nu,)

    def __repr__(self) -> str:
        return f"DPFP(nu={self.nu})"


class FAVOR(FeatureMap):
    """Positive random features of the softmax kernel (eqs. 31 and 32; Choromanski et al. 2021), 2m of them.

    With R the projection, taken in log space::

        phi(x) = [exp(R x - |x|^2/2) + eps; exp(-R x - |x|^2/2) + eps] / sqrt(2m)

    For Gaussian rows of R, phi(q).phi(k) estimates exp(q.k). In a scan with ``qk_norm`` and eps 0, rows are
    taken relative to their largest feature, which the norm divides out again: nothing underflows.

    Parameters
    ----------
    projection : ndarray [m, n]
        The directions R, float32 (float64 where x is). They are read at every call, where they are; those
        whose last axis is not contiguous, and arrays of others than NumPy and JAX, are copied, once. A JAX
        array, which may be traced, is for JAX arrays only; a tensor of torch must require no gradient. For
        arrays on a CUDA device it is one there. See :func:`orthogonal_gaussian`.
    eps : float
        Added to every exponential, so that no row of features is all zero.
    """

    __slots__ = ()

    def __init__(self, projection: Any, eps: float = 0.0) -> None:
        if projection is None:
            raise DTypeError("projection: expected an array, got None")
        if isinstance(eps, bool) or not isinstance(eps, (float, int, np.floating, np.integer)):
            raise DTypeError(f"eps: expected a number, got {type(eps).__name__}")
        if not 0 <= eps < np.inf:
            raise ArgumentError(f"eps: expected a finite number of 0 or more, got {eps}")
        super().__init__(Parameters(_FAVOR, eps=float(eps), projection=projection))
        shape, dtype = tuple(self.projection.shape), str(self.projection.dtype).rpartition(".")[2]
        if dtype not in _PROJECTION_DTYPES:
            raise DTypeError(f"projection: expected dtype float32 or float64, got {dtype}")
        if len(shape) != 2 or shape[0] == 0:
            raise ShapeError(f"projection: expected shape (m, n) with m of at least 1, got {shape}")

    @property
    def projection(self) -> Array:
        """The directions R."""
        held = _core.feature_parameters(self)[2]
        projection: Array = self._parameters.projection if isinstance(held, _core.AbstractArray) else held
        return projection

    @property
    def eps(self) -> float:
        """What is added to every exponential."""
        return _core.feature_parameters(self)[1]

    def _arguments(self) -> tuple[Any, ...]:
        return self.projection, self.eps

    def __repr__(self) -> str:
        return f"FAVOR(<{self.projection.dtype} {self.projection.shape}>, eps={self.eps!r})"


def orthogonal_gaussian(
    m: int, n: int, seed: int | np.random.Generator, dtype: DTypeLike = np.float32
) -> Array:
    """Draw a projection for :class:`FAVOR`: rows distributed as Gaussian ones, orthogonal in groups of n.

    Parameters
    ----------
    m, n : int
        Shape of the projection.
    seed : int or numpy.random.Generator
        The same seed gives the same rows.
    dtype : dtype
        float32, or float64 for float64 keys.

    Returns
    -------
    projection : ndarray [m, n]
    """
    m, n = _integer("m", m, 0), _integer("n", n, 0)
    if np.dtype(dtype).name not in _PROJECTION_DTYPES:
        raise DTypeError(f"dtype: expected float32 or float64, got {np.dtype(dtype)}")
    rng = np.random.default_rng(seed)
    groups = [_rotation(rng, n) for _ in range(0, m, max(n, 1))]
    directions = np.concatenate([*groups, np.empty((0, n))])[:m] if n else np.empty((m, 0))
    lengths = np.linalg.norm(rng.standard_normal((m, n)), axis=1, keepdims=True)
    projection: Array = (directions * lengths).astype(dtype)
    return projection


def _rotation(rng: np.random.Generator, n: int) -> Array:
    """Draw an orthogonal matrix, no direction preferred: the signs that QR leaves open come from R."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    rotation: Array = q * np.where(np.diag(r) < 0, -1, 1)
    return rotation
