# cython: language_level=3
from fwp_core cimport cython_api


def remember(double[::1] key, double[::1] value):
    """Write one value under one key with the delta rule, without the GIL, and read it back."""
    cdef double[::1] output = value.copy()
    cdef double beta = 1
    cdef int status
    with nogil:
        status = cython_api.delta_rule_fwd_f64(
            1, 1, 1, key.shape[0], value.shape[0], 1, 1.0,
            &key[0], &key[0], &value[0], &beta, NULL, NULL, &output[0], NULL)
    if status != 0:
        raise RuntimeError(cython_api.last_error().decode())
    return list(output)
