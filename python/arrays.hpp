// Arrays of any framework as DLTensors: NumPy's through the array struct, a few dozen nanoseconds each, others through
// DLPack. Those of abstract.hpp have no memory: it says what calls with them do. What lies on a CUDA device stays
// there; whether all arrays of a call are on one device is for cpp/core to say.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "fwp/fwp.h"
#include "imports.hpp"

namespace fwp::python {

// One array argument or result of a call. It keeps the array alive; the DLTensor points into it.
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;  // tensor_ points into this object
  Array& operator=(const Array&) = delete;

  // An array of float32, float64, float16 or bfloat16, of the framework of `like` if that is given: exactly a
  // numpy.ndarray (a subclass, as a masked array, may mean more than its data), or what speaks DLPack. On the device of
  // `like` it is ready for work on the stream of that.
  void read(const char* name, pybind11::handle object, const Array* like = nullptr);
  void write(const char* name, pybind11::handle object, const Array* like);  // read-only memory is refused
  // None: absent.
  void read_optional(const char* name, pybind11::handle object, const Array* like = nullptr);
  void write_optional(const char* name, pybind11::handle object, const Array* like);
  // An integer array of any framework, or any sequence of integers; None: absent. On a device they are int32 or int64.
  void read_integers(const char* name, pybind11::handle object, const Array* like = nullptr);

  // New memory in C order, of the framework and on the device of `like`, for work on its stream.
  void make(const Array& like, int rank, const int64_t* shape, DLDataType dtype);
  void make(const Array& like, std::initializer_list<int64_t> shape, DLDataType dtype);

  // Bytes of that memory, for work on the stream of `like`.
  void make_scratch(const Array& like, int64_t bytes);

  bool present() const { return kind_ != Kind::kAbsent; }
  bool abstract() const { return kind_ == Kind::kAbstract; }
  bool on_device() const { return present() && !is_host(tensor_.device); }
  // Whether its framework can be asked for memory of the device: what it has itself made is known to its allocator.
  bool allocates() const {
    return on_device() && (kind_ == Kind::kExchange || (kind_ == Kind::kDlpack && cupy_allocates(object_, stream_)));
  }
  void* stream() const { return stream_.handle; }  // that work with this array is put on, NULL on the CPU
  const DLTensor* tensor() const { return present() ? &tensor_ : nullptr; }
  int rank() const { return present() ? tensor_.ndim : 0; }
  int64_t size(int axis) const { return shape_[axis]; }
  const int64_t* shape() const { return shape_; }
  DLDataType dtype() const { return tensor_.dtype; }
  pybind11::object object() const;  // None if absent
  pybind11::object numpy();         // a copy; of what is on a device when work on its stream is done
  pybind11::object kept();          // a copy, in C order, of its framework if it is on a device, else of NumPy

  // Replaces an array whose last axis is strided by a copy; copy_back writes that copy into a write() array.
  bool make_contiguous();
  void copy_back();
  // Makes one axis of all but the last, [M,n], and the last one contiguous; a copy where strides forbid that. Not for
  // arrays of write(). Without memory there are no rows, so that nothing is done with them.
  void make_rows();

 private:
  static constexpr int kMaxRank = 64;  // NumPy's own limit

  enum class Kind { kAbsent, kNumpy, kExchange, kDlpack, kSequence, kAbstract };

  [[gnu::cold]] void read_foreign(const char* name, pybind11::handle object, bool to_write, const Array* like);
  [[gnu::cold]] void read_abstract(const char* name, pybind11::handle object);
  [[gnu::cold]] void check_float() const;
  void check_framework(const Array& like) const;
  void view_numpy(const char* name, pybind11::handle object, DLDataType dtype);
  void view(const DLTensor& tensor);
  void follow(const Array* like);
  void use_copy();
  bool compact() const;

  // What a plain NumPy array does without.
  struct Extra {
    Managed managed;                  // what a capsule held
    pybind11::object taker;           // an array of the framework that takes over what was made
    pybind11::object original, copy;  // of use_copy: bits in NumPy arrays, or arrays of the framework on a device
    std::unique_ptr<Array> copied;    // on a device: the copy, read
    std::vector<int64_t> integers;    // of a sequence
  };
  [[gnu::cold]] Extra& extra();

  Kind kind_ = Kind::kAbsent;
  bool writable_ = false;
  const char* name_ = "";
  const dlpack::ExchangeApi* exchange_ = nullptr;
  pybind11::object object_;
  Stream stream_;
  std::unique_ptr<Extra> extra_;
  DLTensor tensor_;
  int64_t shape_[kMaxRank];
  int64_t strides_[kMaxRank];
};

}  // namespace fwp::python
