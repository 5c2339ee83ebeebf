# cython: language_level=3, freethreading_compatible=True
"""The raw-pointer functions of cython_api.pxd: each describes its arrays and makes one call of the C interface."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t


cdef extern from "fwp/fwp.h" nogil:
    ctypedef enum DLDeviceType:
        kDLCPU

    ctypedef enum DLDataTypeCode:
        kDLFloat

    ctypedef struct DLDevice:
        DLDeviceType device_type
        int32_t device_id

    ctypedef struct DLDataType:
        uint8_t code
        uint8_t bits
        uint16_t lanes

    ctypedef struct DLTensor:
        void* data
        DLDevice device
        int32_t ndim
        DLDataType dtype
        int64_t* shape
        int64_t* strides
        uint64_t byte_offset

    ctypedef struct fwp_options:
        double scale

    ctypedef struct fwp_inputs:
        const DLTensor *q
        const DLTensor *k
        const DLTensor *v
        const DLTensor *beta
        const DLTensor *g
        const DLTensor *h0

    ctypedef struct fwp_outputs:
        const DLTensor *o
        const DLTensor *hT

    ctypedef struct fwp_cotangents:
        const DLTensor *d_o
        const DLTensor *d_hT

    ctypedef struct fwp_gradients:
        const DLTensor *dq
        const DLTensor *dk
        const DLTensor *dv
        const DLTensor *dbeta
        const DLTensor *dg
        const DLTensor *dh0

    int fwp_linear_fwd(const fwp_options*, const fwp_inputs*, const fwp_outputs*, void*, size_t, void*)
    int fwp_delta_fwd(const fwp_options*, const fwp_inputs*, const fwp_outputs*, void*, size_t, void*)
    int fwp_linear_bwd(
        const fwp_options*, const fwp_inputs*, const fwp_cotangents*, const fwp_gradients*, void*, size_t, void*)
    int fwp_delta_bwd(
        const fwp_options*, const fwp_inputs*, const fwp_cotangents*, const fwp_gradients*, void*, size_t, void*)
    int fwp_linear_step(const fwp_options*, const fwp_inputs*, const DLTensor*, const DLTensor*, void*, size_t, void*)
    int fwp_delta_step(const fwp_options*, const fwp_inputs*, const DLTensor*, const DLTensor*, void*, size_t, void*)
    const char* fwp_last_error()


# The INIT macros of fwp.h as values, so that struct_size is right.
cdef extern from * nogil:
    """
    static const fwp_options options_init = FWP_OPTIONS_INIT;
    static const fwp_inputs inputs_init = FWP_INPUTS_INIT;
    static const fwp_outputs outputs_init = FWP_OUTPUTS_INIT;
    static const fwp_cotangents cotangents_init = FWP_COTANGENTS_INIT;
    static const fwp_gradients gradients_init = FWP_GRADIENTS_INIT;
    """
    const fwp_options options_init
    const fwp_inputs inputs_init
    const fwp_outputs outputs_init
    const fwp_cotangents cotangents_init
    const fwp_gradients gradients_init


ctypedef int (*Forward)(
    const fwp_options*, const fwp_inputs*, const fwp_outputs*, void*, size_t, void*) noexcept nogil
ctypedef int (*Backward)(
    const fwp_options*, const fwp_inputs*, const fwp_cotangents*, const fwp_gradients*, void*, size_t, void*
) noexcept nogil
ctypedef int (*Step)(
    const fwp_options*, const fwp_inputs*, const DLTensor*, const DLTensor*, void*, size_t, void*) noexcept nogil


# The tensors of one call, at most 15, and the shapes that they point to.
cdef struct Call:
    fwp_options options
    DLDataType dtype
    int rank  # of q, k, v, o: 4 in a scan, 3 in a step, which has no T; one less for beta
    int64_t[4] q_shape
    int64_t[4] v_shape
    int g_rank
    int64_t[4] g_shape
    int64_t[4] state_shape
    int count
    DLTensor[15] tensors


cdef void begin_scan(
    Call* call, int bits, int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale
) noexcept nogil:
    call.options = options_init
    call.options.scale = scale
    call.dtype = DLDataType(kDLFloat, <uint8_t> bits, 1)
    call.rank = 4
    call.q_shape = [B, T, H, K]
    call.v_shape = [B, T, H, V]
    call.g_rank = 3 if G == 1 else 4
    call.g_shape = [B, T, H, G]
    call.state_shape = [B, H, K, V]
    call.count = 0


cdef void begin_step(
    Call* call, int bits, int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale
) noexcept nogil:
    begin_scan(call, bits, B, 1, H, K, V, G, scale)
    call.rank -= 1
    call.g_rank -= 1
    call.q_shape = [B, H, K, 0]
    call.v_shape = [B, H, V, 0]
    call.g_shape = [B, H, G, 0]


cdef const DLTensor* required(Call* call, int ndim, int64_t* shape, const void* data) noexcept nogil:
    cdef DLTensor* t = &call.tensors[call.count]
    call.count += 1
    t.data = <void*> data
    t.device = DLDevice(kDLCPU, 0)
    t.ndim = ndim
    t.dtype = call.dtype
    t.shape = shape
    t.strides = NULL
    t.byte_offset = 0
    return t


cdef const DLTensor* optional(Call* call, int ndim, int64_t* shape, const void* data) noexcept nogil:
    return required(call, ndim, shape, data) if data != NULL else NULL


cdef fwp_inputs inputs(
    Call* call, const void* q, const void* k, const void* v, const void* beta, const void* g, const void* h0
) noexcept nogil:
    cdef fwp_inputs x = inputs_init
    x.q = required(call, call.rank, call.q_shape, q)
    x.k = required(call, call.rank, call.q_shape, k)
    x.v = required(call, call.rank, call.v_shape, v)
    x.beta = optional(call, call.rank - 1, call.q_shape, beta)
    x.g = optional(call, call.g_rank, call.g_shape, g)
    x.h0 = optional(call, 4, call.state_shape, h0)
    return x


cdef int forward(Forward fwp_fwd, Call* call, const fwp_inputs* x, void* o, void* hT) noexcept nogil:
    cdef fwp_outputs y = outputs_init
    y.o = required(call, 4, call.v_shape, o)
    y.hT = optional(call, 4, call.state_shape, hT)
    return fwp_fwd(&call.options, x, &y, NULL, 0, NULL)


cdef int backward(
    Backward fwp_bwd, Call* call, const fwp_inputs* x, const void* d_o, const void* d_hT,
    void* dq, void* dk, void* dv, void* dbeta, void* dg, void* dh0,
) noexcept nogil:
    cdef fwp_cotangents dy = cotangents_init
    cdef fwp_gradients dx = gradients_init
    dy.d_o = required(call, 4, call.v_shape, d_o)
    dy.d_hT = optional(call, 4, call.state_shape, d_hT)
    dx.dq = optional(call, 4, call.q_shape, dq)
    dx.dk = optional(call, 4, call.q_shape, dk)
    dx.dv = optional(call, 4, call.v_shape, dv)
    dx.dbeta = optional(call, 3, call.q_shape, dbeta)
    dx.dg = optional(call, call.g_rank, call.g_shape, dg)
    dx.dh0 = optional(call, 4, call.state_shape, dh0)
    return fwp_bwd(&call.options, x, &dy, &dx, NULL, 0, NULL)


cdef int step(Step fwp_step, Call* call, const fwp_inputs* x, void* state, void* o) noexcept nogil:
    cdef const DLTensor* h = required(call, 4, call.state_shape, state)
    return fwp_step(&call.options, x, h, required(call, 3, call.v_shape, o), NULL, 0, NULL)


cdef const char* last_error() noexcept nogil:
    return fwp_last_error()


cdef int linear_attention_fwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    float* o, float* hT,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 32, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return forward(fwp_linear_fwd, &call, &x, o, hT)


cdef int linear_attention_bwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    const float* d_o, const float* d_hT,
    float* dq, float* dk, float* dv, float* dbeta, float* dg, float* dh0,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 32, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return backward(fwp_linear_bwd, &call, &x, d_o, d_hT, dq, dk, dv, dbeta, dg, dh0)


cdef int linear_attention_step_f32(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta, const float* g,
    float* state, float* o,
) noexcept nogil:
    cdef Call call
    begin_step(&call, 32, B, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, NULL)
    return step(fwp_linear_step, &call, &x, state, o)


cdef int linear_attention_fwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    double* o, double* hT,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 64, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return forward(fwp_linear_fwd, &call, &x, o, hT)


cdef int linear_attention_bwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    const double* d_o, const double* d_hT,
    double* dq, double* dk, double* dv, double* dbeta, double* dg, double* dh0,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 64, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return backward(fwp_linear_bwd, &call, &x, d_o, d_hT, dq, dk, dv, dbeta, dg, dh0)


cdef int linear_attention_step_f64(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta, const double* g,
    double* state, double* o,
) noexcept nogil:
    cdef Call call
    begin_step(&call, 64, B, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, NULL)
    return step(fwp_linear_step, &call, &x, state, o)


cdef int delta_rule_fwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    float* o, float* hT,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 32, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return forward(fwp_delta_fwd, &call, &x, o, hT)


cdef int delta_rule_bwd_f32(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta,
    const float* g, const float* h0,
    const float* d_o, const float* d_hT,
    float* dq, float* dk, float* dv, float* dbeta, float* dg, float* dh0,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 32, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return backward(fwp_delta_bwd, &call, &x, d_o, d_hT, dq, dk, dv, dbeta, dg, dh0)


cdef int delta_rule_step_f32(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const float* q, const float* k, const float* v, const float* beta, const float* g,
    float* state, float* o,
) noexcept nogil:
    cdef Call call
    begin_step(&call, 32, B, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, NULL)
    return step(fwp_delta_step, &call, &x, state, o)


cdef int delta_rule_fwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    double* o, double* hT,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 64, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return forward(fwp_delta_fwd, &call, &x, o, hT)


cdef int delta_rule_bwd_f64(
    int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta,
    const double* g, const double* h0,
    const double* d_o, const double* d_hT,
    double* dq, double* dk, double* dv, double* dbeta, double* dg, double* dh0,
) noexcept nogil:
    cdef Call call
    begin_scan(&call, 64, B, T, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, h0)
    return backward(fwp_delta_bwd, &call, &x, d_o, d_hT, dq, dk, dv, dbeta, dg, dh0)


cdef int delta_rule_step_f64(
    int64_t B, int64_t H, int64_t K, int64_t V, int64_t G, double scale,
    const double* q, const double* k, const double* v, const double* beta, const double* g,
    double* state, double* o,
) noexcept nogil:
    cdef Call call
    begin_step(&call, 64, B, H, K, V, G, scale)
    cdef fwp_inputs x = inputs(&call, q, k, v, beta, g, NULL)
    return step(fwp_delta_step, &call, &x, state, o)
