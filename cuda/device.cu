#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "device.hpp"

#ifdef __CUDACC__
#include <mutex>
#endif

namespace fwp::cuda {

#ifdef __CUDACC__

namespace {

void check(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here, so that nobody meets it again
  throw Error(std::string(name) + ": " + cudaGetErrorString(status));
}

size_t idle_limit() {
  const char* const text = std::getenv("FWP_CACHE_MB");
  const unsigned long long megabytes = text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : 512;
  return static_cast<size_t>(megabytes) << 20;
}

constexpr int kMostDevices = 64;

struct Device {
  std::once_flag once;
  cudaMemPool_t pool = nullptr;
  int32_t* fault = nullptr;
};
Device devices[kMostDevices];

// While this exists, calls that are not for streams do not disturb what this thread captures into a graph.
class BesideCapture {
 public:
  BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCapture(const BesideCapture&) = delete;
  BesideCapture& operator=(const BesideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Made when the device is first used, and kept: streams of the caller may outlive any of our objects.
Device& device_of(int number) {
  if (number < 0 || number >= kMostDevices) throw Error("cuda:" + std::to_string(number) + ": no such device");
  Device& device = devices[number];
  std::call_once(device.once, [&] {
    const BesideCapture beside;
    void* word = nullptr;
    check("cudaHostAlloc", cudaHostAlloc(&word, sizeof(int32_t), cudaHostAllocMapped | cudaHostAllocPortable));
    device.fault = static_cast<int32_t*>(word);
    *device.fault = 0;
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, number};
    check("cudaMemPoolCreate", cudaMemPoolCreate(&device.pool, &properties));
    uint64_t keep = idle_limit();
    check("cudaMemPoolSetAttribute", cudaMemPoolSetAttribute(device.pool, cudaMemPoolAttrReleaseThreshold, &keep));
  });
  return device;
}

}  // namespace

const char* device_state() {
  static const std::string state = [] {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
      cudaGetLastError();
      return std::string(cudaGetErrorString(status));
    }
    for (int i = 0, major = 0; i < count; ++i) {
      if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i) == cudaSuccess && major >= 8)
        return std::string("available");
    }
    cudaGetLastError();
    return std::string("without a device of compute capability 8.0 or newer");
  }();
  return state.c_str();
}

UseDevice::UseDevice(int device) {
  check("cudaGetDevice", cudaGetDevice(&before_));
  if (before_ == device) return;
  check("cudaSetDevice", cudaSetDevice(device));
  changed_ = true;
}

UseDevice::~UseDevice() {
  if (changed_) cudaSetDevice(before_);
}

void* device_allocate(int device, size_t bytes, void* stream) {
  void* memory = nullptr;
  const cudaError_t status =
      cudaMallocFromPoolAsync(&memory, bytes, device_of(device).pool, static_cast<cudaStream_t>(stream));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check("cudaMallocFromPoolAsync", status);
  return memory;
}

void device_free(int, void* memory, void* stream) {
  check("cudaFreeAsync", cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

void device_trim() {
  for (Device& device : devices)
    if (device.pool != nullptr) cudaMemPoolTrimTo(device.pool, 0);
}

void device_copy(void* to, const void* from, size_t bytes, void* stream) {
  check("cudaMemcpyAsync", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

void device_wait(void* from, void* to) {
  cudaEvent_t reached = nullptr;
  check("cudaEventCreate", cudaEventCreateWithFlags(&reached, cudaEventDisableTiming));
  const cudaError_t recorded = cudaEventRecord(reached, static_cast<cudaStream_t>(from));
  const cudaError_t status =
      recorded == cudaSuccess ? cudaStreamWaitEvent(static_cast<cudaStream_t>(to), reached, 0) : recorded;
  cudaEventDestroy(reached);  // when it has been reached
  check("cudaStreamWaitEvent", status);
}

int32_t* fault_word(int device) { return device_of(device).fault; }
int32_t take_fault(int device) { return __atomic_exchange_n(fault_word(device), 0, __ATOMIC_RELAXED); }

#else

const char* device_state() { return "emulated"; }

UseDevice::UseDevice(int device) {
  if (device != 0) throw Error("cuda:" + std::to_string(device) + ": the emulator has the device cuda:0 only");
}
UseDevice::~UseDevice() = default;

void* device_allocate(int, size_t bytes, void*) {
  constexpr size_t kAlignment = 256;
  return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
}
void device_free(int, void* memory, void*) { std::free(memory); }
void device_trim() {}
void device_copy(void* to, const void* from, size_t bytes, void*) { std::memcpy(to, from, bytes); }
void device_wait(void*, void*) {}

int32_t* fault_word(int) {
  static int32_t word = 0;
  return &word;
}
int32_t take_fault(int device) { return std::exchange(*fault_word(device), 0); }

#endif

}  // namespace fwp::cuda
