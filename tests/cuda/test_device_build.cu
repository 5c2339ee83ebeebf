// Every primitive in a kernel for the device's compiler: it takes the same text as the host's.
#include "primitives/primitives.cuh"

using namespace fwp::cuda;

template <void mma(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
FWP_DEVICE float product(uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float d[4] = {};
  mma(d, a, b);
  return d[0] + d[1] + d[2] + d[3];
}

FWP_KERNEL void every_primitive(const float* x, float* y) {
  auto* const shared = static_cast<float*>(shared_memory());
  const int i = thread_index();
  const auto offset = static_cast<int64_t>(block_index_x() + block_index_y() + block_index_z()) * block_threads();
  copy_async<16>(shared + 4 * i, x + 4 * (offset + i), 12);
  copy_async<4>(shared + 4 * block_threads() + i, x + i);
  commit_copies();
  wait_copies<0>();
  sync_block();
  uint32_t a[4], t[4];
  load_matrices(a, shared + 4 * lane());
  load_matrices_transposed(t, shared + 4 * lane());
  const uint32_t b[2] = {pack_half(load_shared(shared + i), 1.0f), pack_bfloat(load_shared(shared + i), 1.0f)};
  float sum = product<mma_f16>(a, b) + product<mma_bf16>(t, b);
  const uint32_t c[2] = {to_tf32(sum), to_tf32(1.0f)};
  sum += product<mma_tf32>(a, c);
  sum += to_float(to_half(sum)) + to_float(to_bfloat(sum)) + unpack_half(b[0], 1) + unpack_bfloat(b[1], 0);
  sum = shuffle(sum, warp()) + shuffle_xor(sum, 16);
  sync_warp();
  store_shared(shared + i, sum);
  const Quad four = load_global(reinterpret_cast<const Quad*>(x) + i);
  store_global(y + offset + i, sum + static_cast<float>(four.x[3]));
}
