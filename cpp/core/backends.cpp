#include "backends.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/dispatch.hpp"
#include "error.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__linux__)
#include <link.h>
#endif

namespace fwp::core {
namespace {

// The CUDA back end: null with the reason in words, or there.
struct Plugin {
  const Backend* backend = nullptr;
  std::string state;
};

#if defined(__unix__) || defined(__APPLE__)
#if defined(__APPLE__)
constexpr const char* kFile = "libfwp_core_cuda.dylib";
#else
constexpr const char* kFile = "libfwp_core_cuda.so";
#endif

// FWP_CUDA_PLUGIN, or the file beside this library.
std::string plugin_path() {
  if (const char* const path = std::getenv("FWP_CUDA_PLUGIN"); path != nullptr && *path != '\0') return path;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&cuda_state), &info) == 0 || info.dli_fname == nullptr) return kFile;
  const std::string library = info.dli_fname;
  const size_t slash = library.rfind('/');
  return slash == std::string::npos ? kFile : library.substr(0, slash + 1) + kFile;
}

bool exists(const std::string& path) {
  std::FILE* const file = std::fopen(path.c_str(), "rb");
  if (file != nullptr) std::fclose(file);
  return file != nullptr;
}

#if defined(__linux__)
// Whether the file has all that its header says is to be loaded; the system's loader would find out by a bus error.
bool cut_short(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  ElfW(Ehdr) header;
  if (file == nullptr || std::fread(&header, sizeof header, 1, file.get()) != 1 ||
      std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_phentsize != sizeof(ElfW(Phdr)) ||
      std::fseek(file.get(), static_cast<long>(header.e_phoff), SEEK_SET) != 0)
    return false;  // no library at all, of which the loader says so
  std::vector<ElfW(Phdr)> segments(header.e_phnum);
  if (std::fread(segments.data(), sizeof(ElfW(Phdr)), segments.size(), file.get()) != segments.size()) return true;
  if (std::fseek(file.get(), 0, SEEK_END) != 0) return false;
  const auto bytes = static_cast<uint64_t>(std::ftell(file.get()));
  return std::any_of(segments.begin(), segments.end(), [&](const ElfW(Phdr) & segment) {
    return segment.p_type == PT_LOAD && (segment.p_offset > bytes || segment.p_filesz > bytes - segment.p_offset);
  });
}
#else
bool cut_short(const std::string&) { return false; }
#endif

Plugin open_plugin() {
  const std::string path = plugin_path();
  if (!exists(path)) return {nullptr, std::getenv("FWP_CUDA_PLUGIN") != nullptr ? path + " not found" : "not built"};
  if (cut_short(path)) return {nullptr, path + " is cut short"};
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return {nullptr, dlerror()};
  const auto get = reinterpret_cast<const Backend* (*)()>(dlsym(library, "fwp_cuda_backend"));
  if (get == nullptr) return {nullptr, path + " has no fwp_cuda_backend"};
  const Backend* const found = get();
  if (found == nullptr || found->layout != FWP_LAYOUT || found->backend_bytes != sizeof(Backend) ||
      found->problem_bytes != sizeof(Problem))
    return {nullptr, path + " is of another build than this library"};
  const std::string state = found->state();
  return {state == "available" || state == "emulated" ? found : nullptr, state};
}
#else
Plugin open_plugin() { return {nullptr, "not built"}; }
#endif

std::atomic<bool> opened{false};

const Plugin& plugin() {
  static const Plugin found = open_plugin();
  opened = true;
  return found;
}

}  // namespace

const Backend& backend(const char* name, int device) {
  if (device == kHost) return cpu::backend();
  if (plugin().backend == nullptr)
    fail(FWP_DEVICE_ERROR, name, ": expected memory of the CPU, since CUDA is ", plugin().state, ", got cuda:", device);
  return *plugin().backend;
}

void empty_device_caches() {
  if (opened && plugin().backend != nullptr) plugin().backend->empty_cache();
}

const char* cuda_state() { return plugin().state.c_str(); }

}  // namespace fwp::core
