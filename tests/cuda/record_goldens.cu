// Writes what this machine's GPU makes of each primitive: record_goldens FILE, to be kept as
// tests/cuda/goldens/<GPU>.txt.
#include <cstdio>
#include <fstream>

#include "goldens.cuh"

int main(int count, char** arguments) try {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s FILE\n", arguments[0]);
    return 2;
  }
  cudaDeviceProp device;
  if (const cudaError_t status = cudaGetDeviceProperties(&device, 0); status != cudaSuccess)
    throw fwp::cuda::Error(cudaGetErrorString(status));
  std::ofstream file(arguments[1]);
  file << "# " << device.name << ", compute capability " << device.major << '.' << device.minor << '\n';
  fwp::cuda::goldens::record(file);
  file.close();
  if (!file) throw fwp::cuda::Error(std::string("cannot write ") + arguments[1]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
