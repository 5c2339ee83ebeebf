// The primitives as PTX; primitives.cuh says what they do.
#pragma once

#define FWP_KERNEL __global__
#define FWP_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FWP_DEVICE __device__ __forceinline__
#define FWP_PARAMETER const __grid_constant__
#define FWP_UNROLL _Pragma("unroll")
#define FWP_PRAGMA(text) _Pragma(#text)
#define FWP_UNROLL_BY(n) FWP_PRAGMA(unroll n)

namespace fwp::cuda {

FWP_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FWP_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FWP_DEVICE unsigned block_index_x() { return blockIdx.x; }
FWP_DEVICE unsigned block_index_y() { return blockIdx.y; }
FWP_DEVICE unsigned block_index_z() { return blockIdx.z; }
FWP_DEVICE int lane() { return thread_index() % kWarpSize; }
FWP_DEVICE int warp() { return thread_index() / kWarpSize; }
template <class T>
FWP_DEVICE T fresh(T x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one or two registers");
  if constexpr (sizeof(T) == 4)
    asm volatile("" : "+r"(x));
  else
    asm volatile("" : "+l"(x));
  return x;
}

FWP_DEVICE void* shared_memory() {
  extern __shared__ __align__(16) unsigned char fwp_shared[];
  return fwp_shared;
}
FWP_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

FWP_DEVICE void sync_block() { __syncthreads(); }
FWP_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
FWP_DEVICE T load_shared(const T* p) {
  return *p;
}
template <class T>
FWP_DEVICE void store_shared(T* p, T x) {
  *p = x;
}
// Global: told to the compiler, which does not always see it, and would take slower instructions.
template <class T>
FWP_DEVICE T load_global(const T* p) {
  __builtin_assume(__isGlobal(p));
  return *p;
}
template <class T>
FWP_DEVICE void store_global(T* p, T x) {
  __builtin_assume(__isGlobal(p));
  *p = x;
}
FWP_DEVICE void raise(int32_t* flag) { *static_cast<volatile int32_t*>(flag) = 1; }

template <int bytes>
FWP_DEVICE void copy_async(void* shared, const void* global, int valid = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "n"(bytes), "r"(valid));
  }
}
FWP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int groups_left>
FWP_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

template <class T>
FWP_DEVICE T shuffle(T x, int from) {
  return __shfl_sync(0xffffffffu, x, from);
}
template <class T>
FWP_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

FWP_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FWP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

FWP_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FWP_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FWP_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FWP_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
FWP_DEVICE float to_float(BFloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FWP_DEVICE uint32_t pack_half(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
FWP_DEVICE uint32_t pack_bfloat(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
FWP_DEVICE Half to_half(float x) { return {static_cast<uint16_t>(pack_half(x, 0.0f))}; }
FWP_DEVICE BFloat to_bfloat(float x) { return {static_cast<uint16_t>(pack_bfloat(x, 0.0f))}; }
FWP_DEVICE float unpack_half(uint32_t x, int i) { return to_float(Half{static_cast<uint16_t>(x >> (16 * i))}); }
FWP_DEVICE float unpack_bfloat(uint32_t x, int i) { return to_float(BFloat{static_cast<uint16_t>(x >> (16 * i))}); }
FWP_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

FWP_DEVICE float exponential(float x) { return expf(x); }
FWP_DEVICE double exponential(double x) { return exp(x); }
FWP_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
FWP_DEVICE double square_root(double x) { return __dsqrt_rn(x); }

}  // namespace fwp::cuda
