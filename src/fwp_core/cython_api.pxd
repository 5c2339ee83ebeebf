# The scans on raw pointers, for code that says `from fwp_core cimport cython_api`. No linking, no headers, no GIL.
#
# Arrays are C-contiguous and on the CPU, all with H heads:
#
#     q, k [B,T,H,K]    v, o [B,T,H,V]    beta [B,T,H]    g [B,T,H] if G = 1, [B,T,H,K] if G = K    h0, hT [B,H,K,V]
#
# and gradients have the shapes of their inputs. Step functions leave T out and update state [B,H,K,V] in place.
# NULL: beta (all ones; linear attention only), g (no decay; G is ignored), h0 (zero state), d_hT (zero), and any output
# but o that is not wanted. Outputs are overwritten; they may not overlap anything.
#
# float16 and bfloat16, which Cython has no types for, go through fwp.h.
#
# Each function returns 0, or an error code of fwp.h; last_error() then holds this thread's message.
#
# The signatures, letter by letter, are the binary interface: functions are added, never changed.

from libc.stdint cimport int64_t

cdef const char* last_error() noexcept nogil

cdef int linear_attention_fwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    float* o, float* hT,
) noexcept nogil

cdef int linear_attention_bwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    const float* d_o, const float* d_hT,
    float* dq, float* dk, float* dv, float* dbeta, float* dg, float* dh0,
) noexcept nogil

cdef int linear_attention_step_f32(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta, const float* g,
    float* state, float* o,
) noexcept nogil

cdef int linear_attention_fwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    double* o, double* hT,
) noexcept nogil

cdef int linear_attention_bwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    const double* d_o, const double* d_hT,
    double* dq, double* dk, double* dv, double* dbeta, double* dg, double* dh0,
) noexcept nogil

cdef int linear_attention_step_f64(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta, const double* g,
    double* state, double* o,
) noexcept nogil

cdef int delta_rule_fwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    float* o, float* hT,
) noexcept nogil

cdef int delta_rule_bwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    const float* d_o, const float* d_hT,
    float* dq, float* dk, float* dv, float* dbeta, float* dg, float* dh0,
) noexcept nogil

cdef int delta_rule_step_f32(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta, const float* g,
    float* state, float* o,
) noexcept nogil

cdef int delta_rule_fwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    double* o, double* hT,
) noexcept nogil

cdef int delta_rule_bwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    const double* d_o, const double* d_hT,
    double* dq, double* dk, double* dv, double* dbeta, double* dg, double* dh0,
) noexcept nogil

cdef int delta_rule_step_f64(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta, const double* g,
    double* state, double* o,
) noexcept nogil
