"""Hypothesis strategies: cases of every size and option, and every way an array can lie in memory."""

import numpy as np
from cases import DECAYS, DTYPES, GATES, MAPS, NORMS, RULES, make_case
from hypothesis import strategies as st

# Around the block of tokens (about 6), the value tile (16 to 64) and whatever else may have an edge.
TIMES = (0, 1, 2, 5, 6, 7, 12, 13, 31, 64, 65)
SIZES = (0, 1, 3, 5, 8, 16, 17, 31, 33, 64, 65, 100)
HEADS = ((1, 1, 1), (2, 2, 2), (1, 4, 2), (6, 2, 3), (4, 1, 4), (0, 0, 0))
LENGTHS = ((), (0,), (5,), (0, 7, 0), (1, 1, 6, 0, 13), (33, 2))
SCALES = (1.0, 0.125, -2.0)
# With feature maps, of which the largest makes six features of an entry.
FEATURE_TIMES = (0, 1, 2, 5, 7, 13, 31)
FEATURE_SIZES = (0, 1, 3, 8, 17, 33)


@st.composite
def cases(draw, *, rules=RULES, decays=DECAYS, dtypes=DTYPES, times=TIMES, sizes=SIZES, gates=GATES, **fixed):
    """A Case without features and norms; keyword arguments of make_case may be fixed."""
    dtype = draw(st.sampled_from(dtypes))
    options = {
        "B": st.integers(0, 3),
        "T": st.sampled_from(times),
        "heads": st.sampled_from(HEADS),
        "K": st.sampled_from(sizes),
        "V": st.sampled_from(sizes),
        "gate": st.sampled_from(gates),
        "gate_dtype": st.sampled_from([dtype, np.float32]),
        "beta": st.booleans(),
        "state": st.booleans(),
        "lengths": st.none() | st.sampled_from(LENGTHS),
        "scale": st.sampled_from(SCALES),
        "seed": st.integers(0, 2**16),
    }
    drawn = {name: draw(values) for name, values in options.items() if name not in fixed}
    rule, decay = draw(st.sampled_from(rules)), draw(st.sampled_from(decays))
    return make_case(rule, decay, dtype=dtype, **drawn, **fixed)


@st.composite
def feature_cases(draw, *, maps=(None, *MAPS), norms=NORMS, **fixed):
    """A Case with a feature map, a norm of queries and keys, or none of both."""
    K = draw(st.sampled_from(FEATURE_SIZES))
    possible = [phi for phi in maps if phi is None or phi[0] != "DPFP" or phi[1] < max(2 * K, 2)]
    features = {"feature_map": draw(st.sampled_from(possible)), "qk_norm": draw(st.sampled_from(norms))}
    fixed = {"times": FEATURE_TIMES, "sizes": FEATURE_SIZES} | fixed
    return draw(cases(K=K, **features, **fixed))


# A layout takes an array [B,T,H,...] or [N,H,K,V] and makes one of the same values that lies differently in
# memory, with NaN in all gaps.


def transposed(x):
    """[B,H,T,D] in memory, as attention layers have it."""
    return _filled_like(x, np.empty(_swap(x.shape), x.dtype).swapaxes(1, 2))


def time_major(x):
    return _filled_like(x, np.empty((x.shape[1], x.shape[0], *x.shape[2:]), x.dtype).swapaxes(0, 1))


def every_other(x):
    """Every other index of the first three axes of a larger array."""
    return _view_of_larger(x, slice(1, None, 2))


def reversed_axes(x):
    """Negative strides on the first three axes."""
    return _view_of_larger(x, slice(None, 0, -2))


def sliced_rows(x):
    """Rows cut out of longer ones, starting at an odd element: the packed q, k, v of one projection."""
    if x.ndim == 3:
        return every_other(x)
    base = np.full((*x.shape[:-1], 3 * x.shape[-1] + 2), np.nan, x.dtype)
    return _filled_like(x, base[..., x.shape[-1] + 1 : 2 * x.shape[-1] + 1])


def strided_last_axis(x):
    """The one layout that is copied rather than read in place."""
    base = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    return _filled_like(x, base[..., ::2])


def fortran(x):
    return np.asfortranarray(x)


LAYOUTS = (transposed, time_major, every_other, reversed_axes, sliced_rows, strided_last_axis, fortran)


def _filled_like(x, view):
    view[...] = x
    return view


def _view_of_larger(x, index):
    base = np.full((*(2 * n + 1 for n in x.shape[:3]), *x.shape[3:]), np.nan, x.dtype)
    return _filled_like(x, base[tuple(_exactly(index, n) for n in x.shape[:3])])


def _exactly(index, n):
    """The slice over 2 n + 1 places, which has n of them."""
    assert len(range(2 * n + 1)[index]) == n
    return index


def _swap(shape):
    return (shape[0], shape[2], shape[1], *shape[3:])
