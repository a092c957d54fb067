// flashmla::gemm and flashmla::bmm on the CPU, through torch's stable ABI.
#include <algorithm>

#include "flashmla/contracts.h"

namespace {

using namespace flashmla;

constexpr const char* kActivations[] = {"none", "relu", "gelu", "silu", "silu_mul"};  // in the order of the enum

FlashmlaActivation activation_of(std::string_view name) {
  return FlashmlaActivation(std::find(std::begin(kActivations), std::end(kActivations), name) - kActivations);
}

// [..., k] as rows of k contiguous elements, `stride` elements apart; a copy only where the strides leave no other way.
struct Rows {
  Tensor tensor;
  int64_t stride;

  Rows(const Tensor& given, int64_t columns) : tensor(given), stride(columns) {
    const int64_t dims = given.dim();
    bool regular = given.stride(-1) == 1 || columns == 1;
    for (int64_t i = 0; i + 2 < dims; i++) {
      regular &= given.size(i) == 1 || given.stride(i) == given.stride(i + 1) * given.size(i + 1);
    }
    if (!regular) {
      tensor = torch::stable::contiguous(given);
    } else if (dims > 1) {
      stride = given.stride(-2);
    }
  }
};

// Whether rows of n contiguous elements, all one stride apart, are written where `out` lies.
bool has_rows(const Tensor& out, int64_t n) { return Rows(out, n).tensor.const_data_ptr() == out.const_data_ptr(); }

// The product in `out`, or in a tensor of its own where torch computes it.
Tensor gemm_in(const GemmArguments& g, const Result& result, const Tensor& out) {
  const auto& [a, weight, bias, residual, weight_scale, activation, _] = g;
  const auto& [shape, out_dtype] = result;
  FlashmlaGemm call{};
  call.activation = activation_of(activation);
  call.weight_dtype = dtype_of(weight);
  const bool int4 = call.weight_dtype == FLASHMLA_I4;
  call.k = weight.size(1) * (int4 ? FLASHMLA_INT4S : 1), call.n = shape.back(), call.m = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) call.m *= shape[i];
  if (call.m == 0 || call.n == 0) return out;
  const Rows rows(a, call.k);
  std::optional<Rows> added;
  if (residual) added.emplace(*residual, call.n);
  call.a_dtype = dtype_of(a), call.out_dtype = dtype_of(out);
  call.a = rows.tensor.const_data_ptr(), call.a_stride = rows.stride;
  call.weight = weight.const_data_ptr(), call.weight_stride = weight.stride(0);
  call.weight_panels = weight.dim() == 3;
  if (int4) {
    call.group_scale = weight_scale->const_data_ptr(), call.group_dtype = dtype_of(*weight_scale);
    call.weight_groups = weight_scale->size(1);
  } else {
    call.weight_scale = weight_scale ? weight_scale->const_data_ptr<float>() : nullptr;
  }
  call.bias = bias ? bias->const_data_ptr() : nullptr;
  call.residual = added ? added->tensor.const_data_ptr() : nullptr, call.residual_stride = added ? added->stride : 0;
  call.out = out.mutable_data_ptr(), call.out_stride = Rows(out, call.n).stride;

  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  const bool epilogue = call.activation != FLASHMLA_NONE || bias || residual || weight_scale;
  if (call.m <= FLASHMLA_SMALL_ROWS || call.weight_panels) {
    raise_if(flashmla_gemm(&call, &threads, message), message);
    return out;
  }
  // Many rows: torch's product, then the epilogue alone.
  const bool narrow = out_dtype != ScalarType::Float && flashmla_multiplies(call.a_dtype);
  const ScalarType type = narrow ? a.scalar_type() : ScalarType::Float;
  const Tensor left = torch::stable::to(torch::stable::reshape(a, {call.m, call.k}), type);
  const Tensor right = torch::stable::to(weight, type);
  const Tensor product = torch::stable::matmul(left, torch::stable::transpose(right, 0, 1));
  if (!epilogue && type == out_dtype) {
    return torch::stable::view(product, shape);
  }
  raise_if(flashmla_gemm_epilogue(&call, product.const_data_ptr(), dtype_of(product), &threads, message), message);
  return out;
}

Tensor gemm(const GemmArguments& g) {
  const auto results = check(g);
  return gemm_in(g, results[0], new_tensor(results[0]));
}

void gemm_out(const GemmArguments& g, Tensor out) {
  const auto results = check(g);
  check_outs(g, results, {Input{"out", &out}}, "", "residual");
  const Tensor result = gemm_in(g, results[0], has_rows(out, out.size(-1)) ? out : new_tensor(results[0]));
  if (result.const_data_ptr() != out.const_data_ptr()) torch::stable::copy_(out, result);
}

// The product in `out`, or in a tensor of its own where torch computes it.
Tensor bmm_in(const BmmArguments& arguments, const Tensor& out) {
  const auto& [a, weight] = arguments;
  FlashmlaBmm call{};
  call.dtype = dtype_of(a);
  call.batch = a.size(0), call.m = a.size(1), call.k = a.size(2), call.n = weight.size(2);
  if (call.m > FLASHMLA_SMALL_ROWS) {
    const ScalarType type = flashmla_multiplies(call.dtype) ? a.scalar_type() : ScalarType::Float;
    const Tensor product = torch::stable::matmul(torch::stable::to(a, type), torch::stable::to(weight, type));
    return torch::stable::contiguous(torch::stable::to(product, a.scalar_type()));
  }
  if (call.batch == 0 || call.m == 0 || call.n == 0) return out;
  // Rows of a and of weight (or its columns) must be contiguous: what is not is copied, as torch.bmm would.
  const Tensor left = a.stride(2) == 1 || call.k == 1 ? a : torch::stable::contiguous(a);
  const bool along_n = weight.stride(2) == 1 || call.n == 1, along_k = weight.stride(1) == 1;
  const Tensor right = along_n || along_k ? weight : torch::stable::contiguous(weight);
  call.a = left.const_data_ptr(), call.weight = right.const_data_ptr(), call.out = out.mutable_data_ptr();
  for (int i = 0; i < 2; i++) call.a_stride[i] = left.stride(i), call.out_stride[i] = out.stride(i);
  for (int i = 0; i < 3; i++) call.weight_stride[i] = right.stride(i);
  call.weight_along_k = !along_n && along_k;

  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_bmm(&call, &threads, message), message);
  return out;
}

Tensor bmm(const BmmArguments& a) { return bmm_in(a, new_tensor(check(a)[0])); }

void bmm_out(const BmmArguments& a, Tensor out) {
  const auto results = check(a);
  check_outs(a, results, {Input{"out", &out}});
  const bool in_place = out.stride(2) == 1 || out.size(2) == 1;
  const Tensor result = bmm_in(a, in_place ? out : new_tensor(results[0]));
  if (result.const_data_ptr() != out.const_data_ptr()) torch::stable::copy_(out, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("gemm", TORCH_BOX(&GemmArguments::call<&gemm>));
  m.impl("gemm.out", TORCH_BOX(&GemmArguments::call_out<&gemm_out>));
  m.impl("bmm", TORCH_BOX(&BmmArguments::call<&bmm>));
  m.impl("bmm.out", TORCH_BOX(&BmmArguments::call_out<&bmm_out>));
}
