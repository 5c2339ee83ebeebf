// What kernels are written in: each primitive once as PTX (device.cuh) and once for the host emulator (host.cuh), under
// the same name. A kernel touches shared and global memory through them only, so that the emulator sees it.
//
//   FWP_KERNEL FWP_DEVICE                    before a kernel, before a function of kernels
//   FWP_BOUNDS(threads, blocks)              after FWP_KERNEL: of a block, and of blocks at once; it bounds registers
//   FWP_PARAMETER                            before the type of a struct that is a kernel's parameter
//   FWP_UNROLL                               before a loop whose variables shall be registers
//   thread_index() block_index_x() .. block_threads() lane() warp()
//   shared_memory()                          dynamic shared memory of the block, aligned to 16 bytes
//   fresh(x)                                 x, an integer or a pointer, hidden from the compiler: in a loop, what
//                                            follows from it is computed again instead of kept in registers
//   sync_block() sync_warp()
//   load_shared(p) store_shared(p, x) load_global(p) store_global(p, x)     p aligned to sizeof x: 2, 4, 8 or 16 bytes
//   raise(flag)                              *flag = 1, by any number of threads; for kernels after this one to read
//   copy_async<bytes>(shared, global, valid) commit_copies() wait_copies<groups_left>()
//                                            the first `valid` bytes come from global memory, the rest are zeros
//   shuffle(x, lane) shuffle_xor(x, mask)    32-bit and 64-bit x of another lane; all 32 lanes call
//   load_matrices(r, row) load_matrices_transposed(r, row)
//                                            ldmatrix: four 8x8 matrices of 16-bit numbers; lane 8m+i gives the address
//                                            of row i of matrix m, and gets in r[m] elements (l/4, 2(l%4)), (.., +1)
//   mma_f16 mma_bf16 (d, a, b)               d[16][8] += a[16][16] b[16][8], float32 accumulators
//   mma_tf32 (d, a, b)                       d[16][8] += a[16][8] b[8][8]
//                                            fragments of lane l, g = l/4, t = l%4:
//                                              d[r]: row g + 8(r/2), column 2t + r%2
//                                              a[r], 16 bits: row g + 8(r%2), columns 2t + 8(r/2), 2t + 8(r/2) + 1
//                                              b[r], 16 bits: rows 2t + 8r, 2t + 8r + 1, column g
//                                              a[r], tf32: row g + 8(r%2), column t + 4(r/2); b[r]: row t + 4r, column
//                                              g
//   Half BFloat: storage.  to_float(x) to_half(x) to_bfloat(x)   round to nearest even
//   pack_half(lo, hi) pack_bfloat(lo, hi)    two rounded numbers in 32 bits, lo in the lower half
//   unpack_half(x, i) unpack_bfloat(x, i)
//   to_tf32(x)                               the bits of x rounded to 10 bits of mantissa
//   exponential(x) square_root(x)            float and double; to an ulp or two, correctly rounded
#pragma once

#include <cstdint>

namespace fwp::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
// Sixteen bytes: the widest access.
struct alignas(16) Quad {
  uint32_t x[4];
};

constexpr int kWarpSize = 32;

}  // namespace fwp::cuda

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "host.cuh"
#endif
