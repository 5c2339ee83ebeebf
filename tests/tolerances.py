"""How close is close: every tolerance of the tests, with its reason.

Errors are L2 norms over a whole array, relative to the norm of the exact result. Where the terms of a result
may cancel, the norm of what cancelled counts as well: one per entry, since the test inputs have entries of
order one. Cancellation in dg, where it would matter most, has a test of its own.
"""

import ml_dtypes
import numpy as np

# Forward, float32: the promise for unit keys up to T = 4096. A sequential float32 scan has 3e-7; a block sums
# in another order. float64 keeps the number of units in the last place, and the oracle has as many again.
# Gradients chain two such scans. The float64 gradient is a promise too, far above what is reached.
# Half precisions are float32 inside, and rounded once: half a unit in the last of their 11 or 8 bits.
ROUNDING = {np.dtype(np.float16): 2.0**-11, np.dtype(ml_dtypes.bfloat16): 2.0**-8}
TOLERANCE = {
    ("forward", "float32"): 2e-6,
    ("forward", "float64"): 2 * 2e-6 * 2.0**-29,
    ("forward", "float16"): 2.0**-11 + 2e-6,
    ("forward", "bfloat16"): 2.0**-8 + 2e-6,
    ("gradient", "float32"): 8e-6,
    ("gradient", "float64"): 1e-12,
    ("gradient", "float16"): 2.0**-11 + 8e-6,
    ("gradient", "bfloat16"): 2.0**-8 + 8e-6,
}

# On a CUDA device, where these tests look at the way to the kernels and back. The precision of those, of the
# chunk form's float16 operands, too, is what tests/cuda look at.
DEVICE = {"float32": 1e-5, "float64": 1e-12, "float16": 2.0**-8, "bfloat16": 2.0**-6}
# States of halves, in float32, that tensor cores compute of float16 operands, each rounded twice at most.
TENSOR_CORES = 2.0**-10
# Keys of few entries are much alike, so that tokens write over each other, and their errors add up.
KEYS_ALIKE = 2.0**-9

# A feature, element by element: an exponential, the sum of such, and a division, at few units in the last
# place each. The exponent of FAVOR is a difference, with as many units of its terms.
FEATURE = {np.dtype(np.float32): 6e-7, np.dtype(np.float64): 1.2e-15}

# The same result by another order of summation (a cut elsewhere, a step, linearity): two forward errors.
REORDERED = {np.dtype(np.float32): 4e-6, np.dtype(np.float64): 1e-14}
REORDERED |= {dtype: 2 * error + 4e-6 for dtype, error in ROUNDING.items()}

# A small network around two scans, token by token or at once, in float64: its layers amplify rounding.
NETWORK = 1e-12

# Models of others before and after a patch, float32: their chunks and ours, each with its own rounding.
DROP_IN = 1e-5

# Central differences in float64 with the best step, eps^(1/3): eps^(2/3) = 4e-11 times the third derivative.
CENTRAL_DIFFERENCE = 1e-7
CENTRAL_STEP = 6e-6
# A complex step has no cancellation: what remains is rounding in two sums of a few thousand terms.
COMPLEX_STEP = 1e-13
# <do, J dx> = <J^T do, dx>, relative to the norms: two scans in float64.
ADJOINT = 1e-13


def relative_error(actual, exact, floor=0.0):
    """|actual - exact| / (|exact| + floor sqrt(size)) in L2; inf if not finite at the same places."""
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    dtype = np.result_type(np.float64, actual, exact)
    actual, exact = actual.astype(dtype), exact.astype(dtype)
    finite = np.isfinite(exact)
    if not np.array_equal(np.isfinite(actual), finite):
        return np.inf
    actual, exact = actual[finite], exact[finite]
    error = np.linalg.norm(actual - exact)
    if error == 0:
        return 0.0
    size = np.linalg.norm(exact) + floor * np.sqrt(exact.size)
    return float(error / size) if size > 0 else np.inf


def assert_close(actual, exact, kind, name=""):
    """Compare with the oracle within TOLERANCE, by the precision of the result."""
    error = relative_error(actual, exact, floor=1.0)
    tolerance = TOLERANCE[kind, actual.dtype.name]
    assert error <= tolerance, f"{name}: error {error:.3g} > {tolerance:.3g}"


def assert_gradients_close(actual, exact):
    """Compare two Gradients, absent ones included."""
    for name, x, y in zip(exact._fields, actual, exact, strict=True):
        assert (x is None) == (y is None), name
        if y is not None:
            assert_close(x, y, "gradient", name)


def assert_bits_equal(actual, expected, name=""):
    """The same shape, dtype and bits; a NaN equals itself, 0 and -0 differ."""
    assert actual.dtype == expected.dtype, (name, actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    integer = f"i{actual.dtype.itemsize}"
    different = np.ascontiguousarray(actual).view(integer) != np.ascontiguousarray(expected).view(integer)
    both_nan = np.isnan(actual) & np.isnan(expected)
    count = np.count_nonzero(different & ~both_nan)
    assert count == 0, f"{name}: {count} of {actual.size} elements differ"


def assert_gradients_bits_equal(actual, expected):
    for name, x, y in zip(expected._fields, actual, expected, strict=True):
        assert (x is None) == (y is None), name
        if y is not None:
            assert_bits_equal(x, y, name)
