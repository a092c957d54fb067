// What the files that register operators with torch share: argument checks, with the words of flashmla_ops/ops, and the
// way to torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "flashmla/interface.h"
#include "flashmla/overlap.h"

namespace flashmla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <class Of>
std::string listed(int64_t n, Of of) {
  std::ostringstream stream;
  for (int64_t i = 0; i < n; i++) stream << (i ? ", " : "[") << of(i);
  stream << (n ? "]" : "[]");
  return stream.str();
}

inline std::string shape_of(const Tensor& tensor) {
  return listed(tensor.dim(), [&](int64_t i) { return tensor.size(i); });
}

inline std::string strides_of(const Tensor& tensor) {
  return listed(tensor.dim(), [&](int64_t i) { return tensor.stride(i); });
}

inline const Tensor* given(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

inline Extent extent_of(const Tensor& tensor) { return Extent(tensor, int64_t(tensor.element_size())); }

// Checks of one operator's arguments, or of element `index` of its lists. Messages are built only when a check fails.
struct Check {
  const char* op;
  int64_t index = -1;

  std::string name(const char* argument) const { return index < 0 ? argument : text(argument, "[", index, "]"); }
  [[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& actual) const {
    throw std::runtime_error(
        text("flashmla::", op, ": argument '", name(argument), "': expected ", expected, ", got ", actual));
  }
  void dims(const char* argument, const Tensor& tensor, int64_t n, const char* shape) const {
    if (tensor.dim() != n) fail(argument, text("shape ", shape), text(tensor.dim(), " dimensions"));
  }
  void dtype(const char* argument, const Tensor& tensor, ScalarType type) const {
    if (tensor.scalar_type() != type) fail(argument, name_of(type), name_of(tensor.scalar_type()));
  }
  void floating(const char* argument, const Tensor& tensor) const {
    const ScalarType type = tensor.scalar_type();
    if (!is_floating(type)) fail(argument, "float32, bfloat16 or float16", name_of(type));
  }
  void on_cpu(const char* argument, const Tensor& tensor) const {
    if (!tensor.is_cpu()) fail(argument, "device cpu", "another device");
  }
  void contiguous_rows(const char* argument, const Tensor& tensor) const {
    if (tensor.stride(-1) != 1 && tensor.size(-1) != 1) {
      fail(argument, "a contiguous last dimension", text("stride ", tensor.stride(-1)));
    }
  }
  // Of a tensor that is written: that it does not overlap itself, nor any of the others.
  void apart(const char* argument, const Tensor& tensor,
             std::initializer_list<std::pair<const char*, const Tensor*>> others) const {
    const Extent written = extent_of(tensor);
    if (!tensor.is_contiguous() && overlaps_itself(written)) {
      fail(argument, "elements that share no memory",
           text("sizes ", shape_of(tensor), ", strides ", strides_of(tensor)));
    }
    for (const auto& [name, other] : others) {
      if (other && overlap(written, extent_of(*other))) fail(argument, text("memory apart from ", name), "an overlap");
    }
  }
  void size(const char* argument, const Tensor& tensor, int64_t dim, int64_t wanted, const char* rest) const {
    if (tensor.size(dim) != wanted) fail(argument, text(wanted, rest), text(tensor.size(dim)));
  }
  void same_pages(const Tensor& kv_cache, const Tensor& k_cache, int64_t dims) const {
    for (int64_t i = 0; i < dims; i++) {
      if (k_cache.size(i) != kv_cache.size(i)) {
        fail("k_cache", text("size ", kv_cache.size(i), " in dimension ", i, ", as kv_cache"), text(k_cache.size(i)));
      }
    }
  }
  void shape(const char* argument, const Tensor& tensor, const std::vector<int64_t>& wanted) const {
    bool same = tensor.dim() == int64_t(wanted.size());
    for (size_t i = 0; same && i < wanted.size(); i++) same = tensor.size(int64_t(i)) == wanted[i];
    if (same) return;
    const auto expected = listed(int64_t(wanted.size()), [&](int64_t i) { return wanted[size_t(i)]; });
    fail(argument, "shape " + expected, shape_of(tensor));
  }
};

inline FlashmlaDType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FLASHMLA_F32;
    case ScalarType::BFloat16:
      return FLASHMLA_BF16;
    case ScalarType::Char:
      return FLASHMLA_I8;
    default:
      return FLASHMLA_F16;
  }
}

// Uninitialised and contiguous, straight from the allocator: through the dispatcher this costs a microsecond more.
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  constexpr int64_t kMaxDims = 64;  // as torch
  int64_t strides[kMaxDims];
  const int64_t dims = int64_t(sizes.size());
  if (dims > kMaxDims) throw std::runtime_error("flashmla: a tensor of more than 64 dimensions");
  for (int64_t i = dims - 1, stride = 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[size_t(i)], 1);
  }
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                        : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_int32();
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dims, sizes.data(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle)) {
    throw std::runtime_error("flashmla: out of memory");
  }
  return Tensor(handle);
}

inline FlashmlaRuntime runtime() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t n, FlashmlaBody body, void* context) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

inline void raise_if(int failed, const char* message) {
  if (failed) throw std::runtime_error(message);
}

}  // namespace flashmla
