#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "device.hpp"

#ifdef __CUDACC__
#include <atomic>
#include <mutex>
#endif

namespace fwp::cuda {

#ifdef __CUDACC__

namespace {

void check(const char* name, cudaError_t status) {
  if (const char* const error = error_of(status)) throw Error(std::string(name) + ": " + error);
}

size_t idle_limit() {
  const char* const text = std::getenv("FWP_CACHE_MB");
  const unsigned long long megabytes = text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : 512;
  return static_cast<size_t>(megabytes) << 20;
}

constexpr int kMostDevices = 64;

struct Device {
  std::mutex mutex;  // while something is made
  std::atomic<int32_t*> fault{nullptr};
  std::atomic<cudaMemPool_t> pool{nullptr};
};
Device devices[kMostDevices];

// While this exists, calls that are not for streams do not disturb what this thread captures into a graph.
class BesideCapture {
 public:
  BesideCapture() { error_of(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~BesideCapture() { error_of(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  BesideCapture(const BesideCapture&) = delete;
  BesideCapture& operator=(const BesideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

Device& device_of(int number) {
  if (number < 0 || number >= kMostDevices) throw Error("cuda:" + std::to_string(number) + ": no such device");
  return devices[number];
}

// Made when it is first needed, and kept: streams of the caller may outlive any of our objects.
template <class X, class Make>
X made_once(Device& device, std::atomic<X>& there, const Make& make) {
  if (const X found = there.load()) return found;
  const std::lock_guard<std::mutex> lock(device.mutex);
  if (const X found = there.load()) return found;
  const BesideCapture beside;
  const X made = make();
  there = made;
  return made;
}

cudaMemPool_t pool_of(int number) {
  Device& device = device_of(number);
  return made_once(device, device.pool, [&] {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, number};
    cudaMemPool_t pool = nullptr;
    check("cudaMemPoolCreate", cudaMemPoolCreate(&pool, &properties));
    uint64_t keep = idle_limit();
    error_of(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));  // without it, all is handed back
    return pool;
  });
}

}  // namespace

const char* device_state() {
  static const std::string state = [] {
    int count = 0;
    if (const char* const error = error_of(cudaGetDeviceCount(&count))) return std::string(error);
    for (int i = 0, major = 0; i < count; ++i) {
      if (!error_of(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i)) && major >= 8)
        return std::string("available");
    }
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
  if (changed_) error_of(cudaSetDevice(before_));
}

void* device_allocate(int device, size_t bytes, void* stream) {
  void* memory = nullptr;
  const cudaError_t status =
      cudaMallocFromPoolAsync(&memory, bytes, pool_of(device), static_cast<cudaStream_t>(stream));
  const char* const error = error_of(status);
  if (error == nullptr) return memory;
  if (status == cudaErrorMemoryAllocation) return nullptr;
  throw Error(std::string("cudaMallocFromPoolAsync: ") + error);
}

void device_free(int, void* memory, void* stream) {
  check("cudaFreeAsync", cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

void device_trim() {
  for (Device& device : devices)
    if (const cudaMemPool_t pool = device.pool) error_of(cudaMemPoolTrimTo(pool, 0));
}

void device_copy(void* to, const void* from, size_t bytes, void* stream) {
  check("cudaMemcpyAsync", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

void device_wait(void* from, void* to) {
  cudaEvent_t reached = nullptr;
  check("cudaEventCreate", cudaEventCreateWithFlags(&reached, cudaEventDisableTiming));
  const cudaError_t recorded = cudaEventRecord(reached, static_cast<cudaStream_t>(from));
  const cudaError_t waits =
      recorded == cudaSuccess ? cudaStreamWaitEvent(static_cast<cudaStream_t>(to), reached, 0) : cudaSuccess;
  error_of(cudaEventDestroy(reached));  // when it has been reached
  check("cudaEventRecord", recorded);
  check("cudaStreamWaitEvent", waits);
}

int32_t* fault_word(int number) {
  Device& device = device_of(number);
  return made_once(device, device.fault, [] {
    void* word = nullptr;
    check("cudaHostAlloc", cudaHostAlloc(&word, sizeof(int32_t), cudaHostAllocMapped | cudaHostAllocPortable));
    return new (word) int32_t(0);
  });
}
int32_t take_fault(int device) { return __atomic_exchange_n(fault_word(device), 0, __ATOMIC_RELAXED); }

#else

const char* device_state() { return "emulated"; }

UseDevice::UseDevice(int device) {
  if (device != 0) throw Error("cuda:" + std::to_string(device) + ": the emulator has the device cuda:0 only");
}
UseDevice::~UseDevice() = default;

void* device_allocate(int, size_t bytes, void*) {
  constexpr size_t kAlignment = 256;
  void* const memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (memory != nullptr) std::memset(memory, 0xff, bytes);  // NaN: what is read before it is written is seen
  return memory;
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
