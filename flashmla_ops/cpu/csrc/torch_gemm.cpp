// flashmla::gemm and flashmla::bmm on the CPU, through torch's stable ABI; checks as in flashmla_ops/ops/gemm.py.
#include <algorithm>

#include "flashmla/torch_checks.h"

namespace {

using namespace flashmla;

constexpr const char* kActivations[] = {"none", "relu", "gelu", "silu", "silu_mul"};  // in the order of the enum

struct GemmArguments {
  const Tensor &a, &weight;
  const std::optional<Tensor>&bias, &residual, &weight_scale;
  const std::string& activation;
  ScalarType out_dtype;
};

FlashmlaActivation activation_of(const Check& check, const std::string& name) {
  for (int i = 0; i < 5; i++) {
    if (name == kActivations[i]) return FlashmlaActivation(i);
  }
  check.fail("activation", "one of none, relu, gelu, silu, silu_mul", name);
}

void check_row_vector(const Check& check, const char* name, const Tensor& tensor, ScalarType type, int64_t rows) {
  check.dims(name, tensor, 1, "[n]");
  check.dtype(name, tensor, type);
  check.on_cpu(name, tensor);
  check.contiguous_rows(name, tensor);
  check.size(name, tensor, 0, rows, " elements, as weight");
}

// The shape of out.
std::vector<int64_t> check_gemm(const GemmArguments& g) {
  const Check check{"gemm"};
  const bool gated = activation_of(check, g.activation) == FLASHMLA_SILU_MUL;
  if (g.a.dim() < 1) check.fail("a", "shape [..., k]", "0 dimensions");
  check.floating("a", g.a);
  const bool panels = g.weight.dim() == 3;
  if (g.weight.dim() != 2 && !panels) {
    check.fail("weight", "shape [n, k] or [n / 16, k, 16]", text(g.weight.dim(), " dimensions"));
  }
  if (g.weight.scalar_type() != ScalarType::Char && !is_floating(g.weight.scalar_type())) {
    check.fail("weight", "float32, bfloat16, float16 or int8", name_of(g.weight.scalar_type()));
  }
  check.on_cpu("weight", g.weight);
  if (!panels) check.contiguous_rows("weight", g.weight);
  if (panels && (g.weight.size(2) != FLASHMLA_PANEL || !g.weight.is_contiguous())) {
    check.fail("weight", "contiguous [n / 16, k, 16]", text(shape_of(g.weight), ", strides ", strides_of(g.weight)));
  }
  const int64_t rows = g.weight.size(0) * (panels ? FLASHMLA_PANEL : 1), k = g.weight.size(1);
  if (g.a.size(-1) != k) check.fail("a", text("rows of ", k, " elements, as weight"), text(g.a.size(-1)));
  if (gated && g.weight.size(0) % 2 != 0) {
    check.fail("weight", text("an even number of ", panels ? "panels" : "rows", " with silu_mul"),
               text(g.weight.size(0)));
  }
  if (!g.weight_scale && g.weight.scalar_type() == ScalarType::Char) {
    check.fail("weight", "weight_scale with int8", "none");
  }
  if (g.weight_scale) check_row_vector(check, "weight_scale", *g.weight_scale, ScalarType::Float, rows);
  if (g.bias) check_row_vector(check, "bias", *g.bias, g.a.scalar_type(), rows);
  if (!is_floating(g.out_dtype)) check.fail("out_dtype", "float32, bfloat16 or float16", name_of(g.out_dtype));
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < g.a.dim() - 1; i++) shape.push_back(g.a.size(i));
  shape.push_back(gated ? rows / 2 : rows);
  if (g.residual) {
    check.dtype("residual", *g.residual, g.out_dtype);
    check.on_cpu("residual", *g.residual);
    check.shape("residual", *g.residual, shape);
  }
  return shape;
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

void check_out(const Check& check, const Tensor& out, ScalarType type, const std::vector<int64_t>& shape,
               std::initializer_list<std::pair<const char*, const Tensor*>> inputs) {
  check.dtype("out", out, type);
  check.on_cpu("out", out);
  check.shape("out", out, shape);
  check.apart("out", out, inputs);
}

// Whether the two are one: each element of `a` is read before it is written in its place.
bool same_elements(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && shape_of(a) == shape_of(b) && strides_of(a) == strides_of(b);
}

// Whether rows of n contiguous elements, all one stride apart, are written where `out` lies.
bool has_rows(const Tensor& out, int64_t n) { return Rows(out, n).tensor.const_data_ptr() == out.const_data_ptr(); }

// The product in `out`, or in a tensor of its own where torch computes it.
Tensor gemm_in(const GemmArguments& g, const std::vector<int64_t>& shape, const Tensor& out) {
  const auto& [a, weight, bias, residual, weight_scale, activation, out_dtype] = g;
  FlashmlaGemm call{};
  call.activation = activation_of(Check{"gemm"}, activation);
  call.k = weight.size(1), call.n = shape.back(), call.m = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) call.m *= shape[i];
  if (call.m == 0 || call.n == 0) return out;
  const Rows rows(a, call.k);
  std::optional<Rows> added;
  if (residual) added.emplace(*residual, call.n);
  call.a_dtype = dtype_of(a), call.weight_dtype = dtype_of(weight), call.out_dtype = dtype_of(out);
  call.a = rows.tensor.const_data_ptr(), call.a_stride = rows.stride;
  call.weight = weight.const_data_ptr(), call.weight_stride = weight.stride(0);
  call.weight_panels = weight.dim() == 3;
  call.weight_scale = weight_scale ? weight_scale->const_data_ptr<float>() : nullptr;
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
  const bool narrow = g.out_dtype != ScalarType::Float && flashmla_multiplies(call.a_dtype);
  const ScalarType type = narrow ? a.scalar_type() : ScalarType::Float;
  const Tensor left = torch::stable::to(torch::stable::reshape(a, {call.m, call.k}), type);
  const Tensor right = torch::stable::to(weight, type);
  const Tensor product = torch::stable::matmul(left, torch::stable::transpose(right, 0, 1));
  if (!epilogue && type == g.out_dtype) {
    return torch::stable::view(product, shape);
  }
  raise_if(flashmla_gemm_epilogue(&call, product.const_data_ptr(), dtype_of(product), &threads, message), message);
  return out;
}

Tensor gemm(const Tensor& a, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
            std::optional<Tensor> weight_scale, std::string activation, std::optional<ScalarType> out_dtype) {
  const GemmArguments g{a, weight, bias, residual, weight_scale, activation, out_dtype.value_or(a.scalar_type())};
  const std::vector<int64_t> shape = check_gemm(g);
  return gemm_in(g, shape, new_tensor(shape, g.out_dtype));
}

void gemm_out(const Tensor& a, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::optional<Tensor> weight_scale, std::string activation, std::optional<ScalarType> out_dtype,
              Tensor out) {
  const GemmArguments g{a, weight, bias, residual, weight_scale, activation, out_dtype.value_or(a.scalar_type())};
  const std::vector<int64_t> shape = check_gemm(g);
  const Tensor* added = residual && !same_elements(out, *residual) ? &*residual : nullptr;
  check_out(Check{"gemm"}, out, g.out_dtype, shape,
            {{"a", &a},
             {"weight", &weight},
             {"bias", given(bias)},
             {"residual", added},
             {"weight_scale", given(weight_scale)}});
  const Tensor result = gemm_in(g, shape, has_rows(out, shape.back()) ? out : new_tensor(shape, g.out_dtype));
  if (result.const_data_ptr() != out.const_data_ptr()) torch::stable::copy_(out, result);
}

// The shape of out.
std::vector<int64_t> check_bmm(const Tensor& a, const Tensor& weight) {
  const Check check{"bmm"};
  check.dims("a", a, 3, "[batch, m, k]");
  check.floating("a", a);
  check.dims("weight", weight, 3, "[batch, k, n]");
  check.dtype("weight", weight, a.scalar_type());
  check.on_cpu("weight", weight);
  check.size("weight", weight, 0, a.size(0), " batch entries, as a");
  if (weight.size(1) != a.size(2)) check.fail("weight", text("k ", a.size(2), ", as a"), text(weight.size(1)));
  return {a.size(0), a.size(1), weight.size(2)};
}

// The product in `out`, or in a tensor of its own where torch computes it.
Tensor bmm_in(const Tensor& a, const Tensor& weight, const Tensor& out) {
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

Tensor bmm(const Tensor& a, const Tensor& weight) {
  return bmm_in(a, weight, new_tensor(check_bmm(a, weight), a.scalar_type()));
}

void bmm_out(const Tensor& a, const Tensor& weight, Tensor out) {
  const std::vector<int64_t> shape = check_bmm(a, weight);
  check_out(Check{"bmm"}, out, a.scalar_type(), shape, {{"a", &a}, {"weight", &weight}});
  const bool in_place = out.stride(2) == 1 || shape[2] == 1;
  const Tensor result = bmm_in(a, weight, in_place ? out : new_tensor(shape, a.scalar_type()));
  if (result.const_data_ptr() != out.const_data_ptr()) torch::stable::copy_(out, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm.out", TORCH_BOX(&gemm_out));
  m.impl("bmm", TORCH_BOX(&bmm));
  m.impl("bmm.out", TORCH_BOX(&bmm_out));
}
