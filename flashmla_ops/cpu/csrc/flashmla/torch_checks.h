// Shared by the files that register operators with torch: the words of contracts, and the way to torch's threads. The
// contracts themselves are translated from those of flashmla_ops/ops, into flashmla/contracts.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flashmla/formats.h"
#include "flashmla/interface.h"
#include "flashmla/overlap.h"
#include "flashmla/summaries.h"

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

inline std::ostream& operator<<(std::ostream& stream, const std::vector<int64_t>& numbers) {
  stream << "[";
  for (size_t i = 0; i < numbers.size(); i++) stream << (i ? ", " : "") << numbers[i];
  return stream << "]";
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); i++) sizes.push_back(tensor.size(i));
  return sizes;
}

inline std::vector<int64_t> strides_of(const Tensor& tensor) {
  std::vector<int64_t> strides;
  for (int64_t i = 0; i < tensor.dim(); i++) strides.push_back(tensor.stride(i));
  return strides;
}

// The shape of a tensor, but for its last dimension.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t size) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.back() = size;
  return sizes;
}

// [..., h_q, s_q] of an out [..., s_q, h_q, d_v].
inline std::vector<int64_t> lse_shape(const Tensor& out) {
  std::vector<int64_t> sizes = sizes_of(out);
  sizes.pop_back();
  std::swap(sizes[sizes.size() - 1], sizes[sizes.size() - 2]);
  return sizes;
}

// Whether the two are one: each element of `a` is read before it is written in its place.
inline bool same_elements(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() && sizes_of(a) == sizes_of(b) &&
         strides_of(a) == strides_of(b);
}

// The number of a row format by its name; 0, native, if there is none of that name.
inline int32_t number_of_format(std::string_view name) {
  for (int32_t i = 1; i < int32_t(std::size(kRowFormats)); i++) {
    if (name == kRowFormats[i].name) return i;
  }
  return 0;
}
inline int64_t row_elements(std::string_view name) { return kRowFormats[number_of_format(name)].elements; }
inline int64_t row_tail(std::string_view name) { return kRowFormats[number_of_format(name)].tail; }
inline int64_t row_bytes(std::string_view name) { return kRowFormats[number_of_format(name)].bytes; }

inline const Tensor* given(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

inline Extent extent_of(const Tensor& tensor) { return Extent(tensor, int64_t(tensor.element_size())); }

// A tensor that an operator returns, as its contract says: contiguous.
struct Result {
  std::vector<int64_t> shape;
  ScalarType dtype;
};

// A tensor among the arguments, by name; null where an optional one is not given.
struct Input {
  std::string_view name;
  const Tensor* tensor;
};

// The words in which contracts are stated, as in flashmla_ops/ops/check.py. They are about one operator's arguments, or
// about element `index` of those that are lists. Messages are built only when a check fails.
struct Check {
  const char* op;
  int64_t index = -1;

  Check at(int64_t i) const { return {op, i}; }
  [[noreturn]] void fail(std::string_view argument, const std::string& expected, const std::string& actual) const {
    const std::string name = index < 0 ? text(argument) : text(argument, "[", index, "]");
    throw std::runtime_error(text("flashmla::", op, ": argument '", name, "': expected ", expected, ", got ", actual));
  }
  void dims(std::string_view argument, const Tensor& tensor, std::string_view shape) const {
    if (tensor.dim() != 1 + std::count(shape.begin(), shape.end(), ',')) {
      fail(argument, text("shape ", shape), text(tensor.dim(), " dimensions"));
    }
  }
  void dtype(std::string_view argument, const Tensor& tensor, ScalarType type) const {
    if (tensor.scalar_type() != type) fail(argument, name_of(type), name_of(tensor.scalar_type()));
  }
  void floating(std::string_view argument, const Tensor& tensor) const {
    const ScalarType type = tensor.scalar_type();
    if (!is_floating(type)) fail(argument, "float32, bfloat16 or float16", name_of(type));
  }
  // Kernels of the CPU run because another tensor is there.
  void device(std::string_view argument, const Tensor& tensor, const Tensor&) const {
    if (!tensor.is_cpu()) fail(argument, "device cpu", "another device");
  }
  void contiguous_rows(std::string_view argument, const Tensor& tensor) const {
    if (tensor.stride(-1) != 1 && tensor.size(-1) != 1) {
      fail(argument, "a contiguous last dimension", text("stride ", tensor.stride(-1)));
    }
  }
  void size(std::string_view argument, const Tensor& tensor, int64_t dim, int64_t wanted, std::string_view unit) const {
    if (tensor.size(dim) != wanted) fail(argument, text(wanted, unit), text(tensor.size(dim)));
  }
  void same_sizes(std::string_view argument, const Tensor& tensor, std::string_view other_name, const Tensor& other,
                  int64_t dims) const {
    for (int64_t i = 0; i < dims; i++) {
      if (tensor.size(i) != other.size(i)) {
        fail(argument, text("size ", other.size(i), " in dimension ", i, ", as ", other_name), text(tensor.size(i)));
      }
    }
  }
  void shape(std::string_view argument, const Tensor& tensor, const std::vector<int64_t>& wanted) const {
    bool same = tensor.dim() == int64_t(wanted.size());
    for (size_t i = 0; same && i < wanted.size(); i++) same = tensor.size(int64_t(i)) == wanted[i];
    if (!same) fail(argument, text("shape ", wanted), text(sizes_of(tensor)));
  }
  // `tensor` is written: it does not overlap itself, nor any of the others.
  void apart(std::string_view argument, const Tensor& tensor, const std::vector<Input>& others) const {
    const Extent written = extent_of(tensor);
    if (!tensor.is_contiguous() && overlaps_itself(written)) {
      fail(argument, "elements that share no memory",
           text("sizes ", sizes_of(tensor), ", strides ", strides_of(tensor)));
    }
    for (const Input& other : others) {
      if (other.tensor && overlap(written, extent_of(*other.tensor))) {
        fail(argument, text("memory apart from ", other.name), "an overlap");
      }
    }
  }
};

// Output tensors are as the results, and apart from each other and from what is read; as Check.outs in Python.
template <class Arguments, size_t N>
void check_outs(const Arguments& a, const std::array<Result, N>& results, const std::array<Input, N>& outs,
                std::string_view contiguous_rows = "", std::string_view in_place = "") {
  const Check check{Arguments::kOp};
  for (size_t i = 0; i < N; i++) {
    check.dtype(outs[i].name, *outs[i].tensor, results[i].dtype);
    check.device(outs[i].name, *outs[i].tensor, *outs[i].tensor);
    check.shape(outs[i].name, *outs[i].tensor, results[i].shape);
  }
  for (const Input& out : outs) {
    if (out.name == contiguous_rows) check.contiguous_rows(out.name, *out.tensor);
  }
  std::vector<Input> read = a.tensors();
  for (const Input& out : outs) {
    std::vector<Input> others;
    for (const Input& each : read) {
      if (each.tensor && !(each.name == in_place && same_elements(*out.tensor, *each.tensor))) others.push_back(each);
    }
    check.apart(out.name, *out.tensor, others);
    read.push_back(out);
  }
}

inline FlashmlaDType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FLASHMLA_F32;
    case ScalarType::BFloat16:
      return FLASHMLA_BF16;
    case ScalarType::Char:
      return FLASHMLA_I8;
    case ScalarType::Int:
      return FLASHMLA_I4;
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

inline Tensor new_tensor(const Result& result) { return new_tensor(result.shape, result.dtype); }

inline FlashmlaRuntime runtime() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t n, FlashmlaBody body, void* context) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

inline void raise_if(int failed, const char* message) {
  if (failed) throw std::runtime_error(message);
}

}  // namespace flashmla
