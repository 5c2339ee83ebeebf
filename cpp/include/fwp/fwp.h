/* fwp.h: the C interface of fwp_core, fast weight programmers with hand-written gradients.
 *
 * One recurrence per head, state S [K,V] (the paper's W transposed; Schlag, Irie, Schmidhuber 2021):
 *
 *     S'  = diag(a_t) S_{t-1}          a_t = 1, or exp(g_t) with g_t one number or K numbers     decay
 *     u_t = beta_t v_t                                                                           linear
 *     u_t = beta_t (v_t - S'^T k_t)                                                              delta
 *     S_t = S' + k_t u_t^T                                                                       write
 *     o_t = scale * S_t^T q_t                                                                    read
 *
 * Before it, optionally, every row of q and k goes through a feature map and then a normalisation; and reads may be
 * divided by the keys gathered so far (fwp_options).
 *
 * Conventions of every function below
 *   - Returns FWP_OK (0) or an error code; fwp_last_error() then holds the message for this thread.
 *   - Nothing is computed and no output is touched before every check has passed. After FWP_INTERRUPTED
 *     the contents of the outputs are unspecified.
 *   - Tensors are DLPack tensors, all on the CPU or all on one CUDA device; cu_seqlens and state_indices may be on the
 *     CPU beside tensors of a device. Strides count elements; any strides on B, N, T and H are read in
 *     place, and on the K axis of a state; the last axis of size K or V must be contiguous (stride 1, or size at
 *     most 1). strides == NULL means compact row-major. An absent tensor is a NULL pointer.
 *   - q, k, v share one dtype: float32, float64, float16 or bfloat16; beta and g have that dtype or float32.
 *     Accumulation and states are float32 (float64 for float64). o has v's dtype, each gradient has its input's
 *     dtype. Halves are widened exactly where they are read, and each result is rounded once, to nearest even.
 *   - Inputs may alias each other. Outputs may not overlap an input or another output.
 *   - Results are bitwise equal for any number of threads, any memory layout and any batch around a sequence,
 *     for one instruction set level and build.
 *   - workspace: NULL (the library's own: up to 1 MiB is kept for the thread's next call, so that steps allocate
 *     nothing), or memory aligned to 64 bytes of at least the size that the *_workspace query of the same call
 *     returned; of a device, if the tensors are. stream: NULL for CPU tensors, else the cudaStream_t on which the work
 *     is put; nothing waits for the device, as a capture in a CUDA graph demands. What only kernels can see they put
 *     right: offsets in cu_seqlens on a device are clamped to such as start with 0, never fall and end with T, and
 *     sequences with slots that are none in state_indices are left out. The next call reports it as FWP_CUDA_ERROR,
 *     or fwp_device_check.
 *   - Structs start with struct_size; set it with the FWP_..._INIT macros, so that fields can be added later. Fields
 *     beyond those that this version knows must be zero.
 */
#ifndef FWP_H
#define FWP_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(FWP_BUILD)
#define FWP_API __declspec(dllexport)
#else
#define FWP_API __declspec(dllimport)
#endif
#else
#define FWP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
#define FWP_NOEXCEPT noexcept
extern "C" {
#else
#define FWP_NOEXCEPT
#endif

/* The tensor descriptor of DLPack 1.x. A program that also uses dlpack.h includes it before this header. */
#ifndef DLPACK_DLPACK_H_
typedef enum { kDLCPU = 1, kDLCUDA = 2 } DLDeviceType;

typedef struct {
  DLDeviceType device_type;
  int32_t device_id;
} DLDevice;

typedef enum { kDLInt = 0U, kDLUInt = 1U, kDLFloat = 2U, kDLBfloat = 4U } DLDataTypeCode;

typedef struct {
  uint8_t code; /* a DLDataTypeCode */
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} DLTensor;
#endif

#define FWP_ABI_VERSION 1

/* ---- errors ---- */

enum {
  FWP_OK = 0,
  FWP_SHAPE_ERROR = 1,
  FWP_DTYPE_ERROR = 2,
  FWP_DEVICE_ERROR = 3,
  FWP_UNSUPPORTED_ERROR = 4,
  FWP_ARGUMENT_ERROR = 5,
  FWP_READ_ONLY_ERROR = 6,
  FWP_CUDA_ERROR = 7,
  FWP_OUT_OF_MEMORY = 8,
  FWP_INTERRUPTED = 9,
  FWP_INTERNAL_ERROR = 10
};

typedef struct fwp_error_info {
  int code;
  const char* name;        /* the Python class, "ShapeError" */
  const char* python_base; /* the built-in it also is, "ValueError" */
  const char* meaning;
} fwp_error_info;

/* The one table of errors, *count entries. Codes without a class of their own (out of memory, interrupted,
 * internal) carry the name of the Python built-in that stands for them. */
FWP_API const fwp_error_info* fwp_error_table(size_t* count) FWP_NOEXCEPT;
/* Code of the last error of this thread, for functions that return something else; FWP_OK if there was none. */
FWP_API int fwp_last_status(void) FWP_NOEXCEPT;
/* Its message; empty if there was none. Valid until the thread's next call. */
FWP_API const char* fwp_last_error(void) FWP_NOEXCEPT;

/* ---- arguments ---- */

/* Feature maps phi of a row x of size n; K is their number of features.
 *
 *     RELU      max(x, 0)                                                            K = n
 *     ELU1      x + 1 for x > 0, else exp(x)                                         K = n
 *     SOFTMAX   exp(x) / sum(exp(x))                                                 K = n
 *     DPFP      r_i r_{i-j mod 2n}, j = 1..nu, i = 0..2n-1, r = [max(x,0); max(-x,0)]  K = 2 n nu, 1 <= nu <= 2n - 1
 *     FAVOR     [exp(R x - |x|^2/2) + eps; exp(-R x - |x|^2/2) + eps] / sqrt(2m)     K = 2m
 *
 * R is projection [m,n], of the dtype of states, read at every call. Before a norm, with eps 0, the rows of FAVOR are
 * taken relative to their largest feature, which the norm divides out, so that none underflows. Fields that a map does
 * not name are ignored. */
enum { FWP_MAP_RELU = 1, FWP_MAP_ELU1 = 2, FWP_MAP_SOFTMAX = 3, FWP_MAP_DPFP = 4, FWP_MAP_FAVOR = 5 };
typedef struct fwp_feature_map {
  size_t struct_size;
  int kind;
  int nu;
  double eps;
  const DLTensor* projection;
} fwp_feature_map;
#define FWP_FEATURE_MAP_INIT {sizeof(fwp_feature_map), 0, 0, 0.0, NULL}

/* Normalisations of a row of phi(q) or phi(k): x / sum(x), x / |x|. A row that has no norm becomes 0. */
enum { FWP_NORM_NONE = 0, FWP_NORM_SUM = 1, FWP_NORM_L2 = 2 };

/* interrupt is polled by the calling thread every few milliseconds; non-zero stops the call with
 * FWP_INTERRUPTED. It must not throw. Steps are not interrupted.
 * feature_map: NULL for none; q and k then have rows of its n, everything else of its K.
 * attention_norm: 0, or 1 for z' = a z, z_t = z' + k_t, with S'^T k_t / (z'.k_t + eps) in place of S'^T k_t (delta) and
 * o_t = scale * S_t^T q_t / (z_t.q_t + eps), both 0 where the product with z is 0. States and their gradients are then
 * [N,H,K,V+1], and z is the last column.
 * check_only: 1 checks the shapes, dtypes and values of a call and computes nothing. The data of tensors, but for
 * cu_seqlens and state_indices, is then neither read nor written, may overlap, and may be any aligned address that is
 * not NULL: what a compiler asks that has shapes only. */
typedef struct fwp_options {
  size_t struct_size;
  double scale;
  int (*interrupt)(void* interrupt_data);
  void* interrupt_data;
  const fwp_feature_map* feature_map;
  int qk_norm;
  int attention_norm;
  double eps;
  int check_only;
  int reserved; /* 0 */
} fwp_options;
#define FWP_OPTIONS_INIT {sizeof(fwp_options), 1.0, NULL, NULL, NULL, FWP_NORM_NONE, 0, 1e-6, 0, 0}

/* q [B,T,Hq,K]  k [B,T,Hk,K]  v [B,T,Hv,V]  beta [B,T,H]  g [B,T,H] or [B,T,H,K]  h0 [N,H,K,V]
 * H = max(Hq,Hk,Hv); every head count divides H, and head h reads q head h / (H/Hq), and so on.
 * cu_seqlens: int32 or int64 [N+1], then B = 1; starts with 0, never falls, ends with T. Else N = B.
 * For *_step the T axis may be left out, and h0 and cu_seqlens are NULL.
 * state_indices: int32 or int64 [B], for *_step only: sequence b has the state of slot state_indices[b] in a pool
 * [S,H,K,V], or, at -1, none: its outputs are zero. No slot may be given twice. NULL: sequence b has slot b.
 * beta is required by the delta rule; g and h0 may be NULL (no decay, zero state). */
typedef struct fwp_inputs {
  size_t struct_size;
  const DLTensor* q;
  const DLTensor* k;
  const DLTensor* v;
  const DLTensor* beta;
  const DLTensor* g;
  const DLTensor* h0;
  const DLTensor* cu_seqlens;
  const DLTensor* state_indices;
} fwp_inputs;
#define FWP_INPUTS_INIT {sizeof(fwp_inputs), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL}

/* o [B,T,H,V] required; hT [N,H,K,V] and checkpoints may be NULL. checkpoints: a compact 1-d tensor of the
 * state's dtype with the number of elements that fwp_checkpoints returns; handed to *_bwd it spares
 * the backward pass its own forward sweep. Its layout is private and holds for one ISA level. */
typedef struct fwp_outputs {
  size_t struct_size;
  const DLTensor* o;
  const DLTensor* hT;
  const DLTensor* checkpoints;
} fwp_outputs;
#define FWP_OUTPUTS_INIT {sizeof(fwp_outputs), NULL, NULL, NULL}

/* d_o [B,T,H,V] required; d_hT [N,H,K,V] and checkpoints may be NULL. */
typedef struct fwp_cotangents {
  size_t struct_size;
  const DLTensor* d_o;
  const DLTensor* d_hT;
  const DLTensor* checkpoints;
} fwp_cotangents;
#define FWP_COTANGENTS_INIT {sizeof(fwp_cotangents), NULL, NULL, NULL}

/* Each has its input's shape and dtype and is overwritten, never added to; NULL: not wanted. */
typedef struct fwp_gradients {
  size_t struct_size;
  const DLTensor* dq;
  const DLTensor* dk;
  const DLTensor* dv;
  const DLTensor* dbeta;
  const DLTensor* dg;
  const DLTensor* dh0;
} fwp_gradients;
#define FWP_GRADIENTS_INIT {sizeof(fwp_gradients), NULL, NULL, NULL, NULL, NULL, NULL}

/* ---- scans ---- */

/* Forward. Cost: 4KV (linear) or 6KV (delta) flops per token and head, O(K V) scratch per thread. */
FWP_API int fwp_linear_fwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_outputs* outputs,
                           void* workspace, size_t workspace_bytes, void* stream) FWP_NOEXCEPT;
FWP_API int fwp_delta_fwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_outputs* outputs,
                          void* workspace, size_t workspace_bytes, void* stream) FWP_NOEXCEPT;

/* Backward: exact gradients of sum(o * d_o) + sum(hT * d_hT). Inputs as given to the forward call. */
FWP_API int fwp_linear_bwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_cotangents* cotangents,
                           const fwp_gradients* gradients, void* workspace, size_t workspace_bytes,
                           void* stream) FWP_NOEXCEPT;
FWP_API int fwp_delta_bwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_cotangents* cotangents,
                          const fwp_gradients* gradients, void* workspace, size_t workspace_bytes,
                          void* stream) FWP_NOEXCEPT;

/* Decoding: one token, q,k [B,H,K], v [B,H,V], beta [B,H], g [B,H] or [B,H,K], o [B,H,V], or a few, with the shapes
 * of a scan; q decides which. state [B,H,K,V], or [S,H,K,V] with state_indices, is updated in place; slots that no
 * sequence has are neither read nor written. One token has the same result, bit for bit, in either form. */
FWP_API int fwp_linear_step(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* state,
                            const DLTensor* o, void* workspace, size_t workspace_bytes, void* stream) FWP_NOEXCEPT;
FWP_API int fwp_delta_step(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* state,
                           const DLTensor* o, void* workspace, size_t workspace_bytes, void* stream) FWP_NOEXCEPT;

/* Probes of a scan with these inputs, [B,T,H,FWP_PROBES] of the dtype of states, token by token. With k and q after
 * feature map and normalisation, v~ = S'^T k what the key retrieves before the write (divided by z'.k + eps with
 * attention_norm), w~ = S^T k after it (by z.k + eps), and z' = a z, z = z' + k whether or not attention_norm is on:
 *
 *     0 |v|^2    1 |v~|^2    2 v.v~    3 |v - v~|^2    4 |v - w~|^2    5 |S|^2 after the write
 *     6 |k|^2    7 sum(k)    8 s = z'.k    9 c = z.q    10 sum(|z|)    11 max(z)
 *     12 channels to which k adds without any effect, z' + k == z' though k is not 0 */
enum { FWP_PROBES = 13 };
FWP_API int fwp_linear_diagnose(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* probes,
                                void* workspace, size_t workspace_bytes, void* stream) FWP_NOEXCEPT;
FWP_API int fwp_delta_diagnose(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* probes,
                               void* workspace, size_t workspace_bytes, void* stream) FWP_NOEXCEPT;

/* Bytes of workspace that the call with these inputs takes, with the current number of threads and ISA level. */
FWP_API int fwp_linear_fwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) FWP_NOEXCEPT;
FWP_API int fwp_delta_fwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) FWP_NOEXCEPT;
FWP_API int fwp_linear_bwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) FWP_NOEXCEPT;
FWP_API int fwp_delta_bwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) FWP_NOEXCEPT;
FWP_API int fwp_linear_diagnose_workspace(const fwp_options* options, const fwp_inputs* inputs,
                                          size_t* bytes) FWP_NOEXCEPT;
FWP_API int fwp_delta_diagnose_workspace(const fwp_options* options, const fwp_inputs* inputs,
                                         size_t* bytes) FWP_NOEXCEPT;
FWP_API int fwp_linear_step_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) FWP_NOEXCEPT;
FWP_API int fwp_delta_step_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) FWP_NOEXCEPT;
/* Elements of the checkpoints tensor for these inputs (the same for both rules). */
FWP_API int fwp_checkpoints(const fwp_options* options, const fwp_inputs* inputs, int64_t* elements) FWP_NOEXCEPT;

/* ---- feature maps alone ---- */

/* K of rows of size n. */
FWP_API int fwp_feature_size(const fwp_feature_map* map, int64_t n, int64_t* size) FWP_NOEXCEPT;
/* y [M,K] = phi(x [M,n]) row by row, and d_x from d_y; all of one dtype. Halves are float32 inside. Memory: a few rows
 * per thread. These calls cannot be interrupted. */
FWP_API int fwp_feature_map_fwd(const fwp_feature_map* map, const DLTensor* x, const DLTensor* y,
                                void* stream) FWP_NOEXCEPT;
FWP_API int fwp_feature_map_bwd(const fwp_feature_map* map, const DLTensor* d_y, const DLTensor* x, const DLTensor* d_x,
                                void* stream) FWP_NOEXCEPT;

/* ---- library ---- */

FWP_API int fwp_abi_version(void) FWP_NOEXCEPT;
FWP_API const char* fwp_version(void) FWP_NOEXCEPT;
FWP_API const char* fwp_compiler(void) FWP_NOEXCEPT;

/* Threads used by a call, 1 to 256 (more count as 256). Starts from FWP_NUM_THREADS, then OMP_NUM_THREADS, then the
 * affinity mask and the cgroup quota. */
FWP_API int fwp_set_num_threads(int threads) FWP_NOEXCEPT;
FWP_API int fwp_get_num_threads(void) FWP_NOEXCEPT;

/* Instruction set levels, best last: "base", "v3" (AVX2, FMA), "v4" (AVX-512) or "base", "neon". The list of
 * those built and present in this machine ends with NULL. fwp_use_isa switches the whole process at once;
 * FWP_ISA sets the first choice; if it names none of the list, fwp_isa returns NULL and scans fail with
 * FWP_ARGUMENT_ERROR until a level is chosen. fwp_isa_calls counts the calls that ran at a level. */
FWP_API const char* const* fwp_available_isas(void) FWP_NOEXCEPT;
FWP_API const char* fwp_isa(void) FWP_NOEXCEPT;
FWP_API int fwp_use_isa(const char* name) FWP_NOEXCEPT;
FWP_API uint64_t fwp_isa_calls(const char* name) FWP_NOEXCEPT;
/* Tokens taken per pass over the state at the current level (the block size). */
FWP_API int fwp_block_size(void) FWP_NOEXCEPT;
/* Rate of independent fused multiply-adds in one thread at the current level, in flop/s: the yardstick of the
 * benchmarks. bits: 32 or 64. Takes about `seconds`; 0 if bits is neither. */
FWP_API double fwp_fma_peak(int bits, double seconds) FWP_NOEXCEPT;

/* Memory for tensors and workspaces, aligned to 64 bytes, contents unspecified; used as C's malloc, realloc and free.
 * Blocks of 1 MiB and more that are not in use stay warm for the next call, of this library's own workspaces too, up to
 * FWP_CACHE_MB megabytes (512; 0: none), the newest first. If that is not a whole number, fwp_cache_limit and calls
 * that need a large block fail with FWP_ARGUMENT_ERROR. A failed allocation returns NULL and leaves a message. */
FWP_API void* fwp_allocate(size_t bytes) FWP_NOEXCEPT;
FWP_API void* fwp_reallocate(void* memory, size_t bytes) FWP_NOEXCEPT;
FWP_API void fwp_free(void* memory) FWP_NOEXCEPT;
/* Bytes of memory that may stay warm, and that do now; fwp_empty_cache hands those back to the system. */
FWP_API int fwp_cache_limit(size_t* bytes) FWP_NOEXCEPT;
FWP_API size_t fwp_cache_idle(void) FWP_NOEXCEPT;
FWP_API void fwp_empty_cache(void) FWP_NOEXCEPT;

/* Memory of a CUDA device for tensors and workspaces, in the order of a stream, aligned to 256 bytes; contents
 * unspecified. Up to FWP_CACHE_MB megabytes stay with the library's pool of that device. A failed allocation returns
 * NULL, and fwp_last_status() says why: FWP_OUT_OF_MEMORY, or FWP_CUDA_ERROR or FWP_DEVICE_ERROR. */
FWP_API void* fwp_device_allocate(int device, size_t bytes, void* stream) FWP_NOEXCEPT;
FWP_API void fwp_device_free(int device, void* memory, void* stream) FWP_NOEXCEPT;
/* Copies between memory of the device and of the host, or within either, in the order of a stream. A copy into memory
 * that malloc made is done when the call returns. */
FWP_API int fwp_device_copy(int device, void* to, const void* from, size_t bytes, void* stream) FWP_NOEXCEPT;
/* What is put on the stream `to` from now on waits for what is on the stream `from`; the call does not. */
FWP_API int fwp_device_wait(int device, void* from, void* to) FWP_NOEXCEPT;
/* Reports what only kernels find wrong, offsets and slots in memory of the device, in earlier calls whose work is done:
 * FWP_CUDA_ERROR, once, and the last of several. Every scan, step, map and diagnosis on the device does so, too, before
 * it begins. Waits for nothing. */
FWP_API int fwp_device_check(int device) FWP_NOEXCEPT;

/* State of the CUDA back end, a library of its own that is opened at first use (libfwp_core_cuda beside this one, or
 * FWP_CUDA_PLUGIN), in words: "available"; "emulated" on the host, for tests; else why it cannot be used, as "not
 * built". */
FWP_API const char* fwp_cuda_state(void) FWP_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif /* FWP_H */
