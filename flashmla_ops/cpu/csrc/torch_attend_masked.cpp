// flashmla::attend_masked on the CPU, through torch's stable ABI.
//
// The mask is read first. A sequence whose queries see consecutive keys goes to the kernels of `decode` or `prefill`,
// which read those rows and no others; one whose queries do not goes to torch's scaled_dot_product_attention.
#include <array>
#include <limits>

#include "flashmla/spans.h"
#include "flashmla/torch_decode.h"

namespace {

using namespace flashmla;

constexpr int64_t kMaxDecodeQueries = 64;  // as MAX_DECODE_QUERIES of lowering/passes/calls.py: a matter of speed

struct Arguments {
  const Tensor &q, &kv_cache;
  const std::optional<Tensor>& k_cache;
  const Tensor& mask;
  int64_t d_v, qk_start;
  double softmax_scale;
  bool nan_where_empty;

  int64_t b() const { return q.size(0); }
  int64_t s_q() const { return q.size(1); }
  int64_t h_q() const { return q.size(2); }
  int64_t s_kv() const { return kv_cache.size(1); }
  int64_t element_size() const { return q.scalar_type() == ScalarType::Float ? 4 : 2; }
  // Between neighbours along a dimension of the mask; 0 where they are one element.
  int64_t mask_stride(int64_t dim) const { return mask.size(dim) == 1 ? 0 : mask.stride(dim); }
};

// Calls body with the type that reads the mask's elements.
template <class Body>
auto with_mask(const Tensor& mask, const Body& body) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      return body(BoolMask{});
    case ScalarType::Float:
      return body(FloatMask{});
    case ScalarType::BFloat16:
      return body(Bf16Mask{});
    default:
      return body(F16Mask{});
  }
}

std::vector<Span> spans_of(const Arguments& a) {
  std::vector<Span> spans(size_t(a.b()));
  if (a.mask_stride(1) != 0) return spans;  // heads see different keys
  with_mask(a.mask, [&](auto kind) {
    using Mask = decltype(kind);
    const auto* data = static_cast<const typename Mask::Element*>(a.mask.const_data_ptr());
    for (int64_t i = 0; i < a.b(); i++) {
      const bool same = i > 0 && a.mask_stride(0) == 0;
      spans[size_t(i)] =
          same ? spans[0]
               : span_of<Mask>(data + i * a.mask_stride(0), a.s_q(), a.s_kv(), a.mask_stride(2), a.mask_stride(3));
    }
  });
  return spans;
}

const char* at(const Tensor& tensor, int64_t elements, int64_t element_size) {
  return static_cast<const char*>(tensor.const_data_ptr()) + elements * element_size;
}

class Attend {
public:
  Attend(const Arguments& a, const Tensor& out)
      : a_(a), out_(static_cast<char*>(out.mutable_data_ptr())), lse_(size_t(a.b() * a.h_q() * a.s_q())),
        threads_(runtime()) {}

  // Sequences [first, first + n), whose spans begin at the same key and are all causal or not. A span that is not exact
  // gets the length 0 here: `attend_masked` computes its sequence by torch's attention after this call.
  void decode(int64_t first, int64_t n, const std::vector<Span>& spans, const Span& shared) {
    std::vector<int32_t> pages, lengths;
    for (int64_t i = 0; i < n; i++) {
      const Span& span = spans[size_t(first + i)];
      pages.push_back(int32_t(i));
      lengths.push_back(span.exact ? int32_t(span.end - span.begin) : 0);
    }
    const int64_t size = a_.element_size();
    FlashmlaDecode call{};
    call.op = AttendMaskedArguments::kOp;
    call.dtype = dtype_of(a_.q), call.causal = shared.causal, call.levels = 3;
    call.b = n, call.s_q = a_.s_q(), call.h_q = a_.h_q(), call.d_qk = a_.q.size(3);
    call.h_kv = a_.kv_cache.size(2), call.d_v = a_.d_v, call.qk_start = a_.qk_start;
    call.softmax_scale = float(a_.softmax_scale);
    call.q = at(a_.q, first * a_.q.stride(0), size);
    for (int i = 0; i < 4; i++) call.q_stride[i] = a_.q.stride(i);
    const auto rows = [&](const Tensor& cache) {
      FlashmlaCache of = cache_of(cache);
      of.data = at(cache, first * cache.stride(0) + shared.begin * cache.stride(1), size);
      return of;
    };
    call.kv = rows(a_.kv_cache);
    if (a_.k_cache) call.k = rows(*a_.k_cache);
    call.n_pages = n, call.page_size = a_.s_kv() - shared.begin;
    call.block_table = pages.data(), call.block_table_stride[0] = 1, call.block_table_stride[1] = 1, call.max_pages = 1;
    call.cache_seqlens = lengths.data(), call.cache_seqlens_stride = 1;
    call.out = out(first);
    call.out_stride[0] = a_.s_q() * a_.h_q() * a_.d_v, call.out_stride[1] = a_.h_q() * a_.d_v;
    call.out_stride[2] = a_.d_v;
    call.lse = lse_.data();
    call.lse_stride[0] = a_.h_q() * a_.s_q(), call.lse_stride[1] = a_.s_q(), call.lse_stride[2] = 1;
    char message[FLASHMLA_MESSAGE];
    raise_if(flashmla_decode(&call, nullptr, 0, &threads_, message), message);
  }

  // Long queries of one sequence whose keys lie in one tensor.
  void prefill(int64_t sequence, const Span& span) {
    const bool apart = a_.qk_start == a_.kv_cache.size(3);
    const Tensor& keys = apart ? *a_.k_cache : a_.kv_cache;
    const int64_t size = a_.element_size();
    const auto rows = [&](const Tensor& cache, int64_t start) {
      return at(cache, sequence * cache.stride(0) + span.begin * cache.stride(1) + start, size);
    };
    const int32_t bounds_q[] = {0, int32_t(a_.s_q())}, bounds_k[] = {0, int32_t(span.end - span.begin)};
    FlashmlaPrefill call{};
    call.dtype = dtype_of(a_.q), call.causal = span.causal, call.levels = 3;
    call.b = 1, call.h_q = a_.h_q(), call.h_kv = a_.kv_cache.size(2);
    call.d_qk = a_.q.size(3), call.d_v = a_.d_v, call.t_q = bounds_q[1], call.t_k = bounds_k[1];
    call.softmax_scale = float(a_.softmax_scale);
    call.q = at(a_.q, sequence * a_.q.stride(0), size);
    call.k = rows(keys, apart ? 0 : a_.qk_start), call.v = rows(a_.kv_cache, 0);
    for (int i = 0; i < 3; i++) call.q_stride[i] = a_.q.stride(i + 1);
    for (int i = 0; i < 2; i++) call.k_stride[i] = keys.stride(i + 1), call.v_stride[i] = a_.kv_cache.stride(i + 1);
    call.cu_seqlens_q = bounds_q, call.cu_seqlens_q_stride = 1;
    call.cu_seqlens_k = bounds_k, call.cu_seqlens_k_stride = 1;
    call.out = out(sequence), call.lse = lse_.data();
    char message[FLASHMLA_MESSAGE];
    raise_if(flashmla_prefill(&call, &threads_, message), message);
  }

  bool serves_prefill() const {
    return a_.s_q() > kMaxDecodeQueries && (a_.qk_start == a_.kv_cache.size(3) || !a_.k_cache);
  }

private:
  char* out(int64_t sequence) const { return out_ + sequence * a_.s_q() * a_.h_q() * a_.d_v * a_.element_size(); }

  const Arguments& a_;
  char* out_;
  std::vector<float> lse_;
  const FlashmlaRuntime threads_;
};

Tensor part(Tensor tensor, int64_t dim, int64_t start, int64_t n) {
  return torch::stable::narrow(tensor, dim, start, n);
}

// The keys [n, s_kv, h_kv, d_qk] of some sequences.
Tensor keys_of(const Arguments& a, int64_t first, int64_t n) {
  const int64_t d = a.kv_cache.size(3), d_qk = a.q.size(3), in_rows = d - a.qk_start;
  if (in_rows == 0) return part(*a.k_cache, 0, first, n);
  const Tensor own = part(part(a.kv_cache, 0, first, n), 3, a.qk_start, in_rows);
  if (!a.k_cache) return own;
  const Tensor keys = new_tensor({n, a.s_kv(), a.kv_cache.size(2), d_qk}, a.q.scalar_type());
  Tensor left = part(keys, 3, 0, in_rows), right = part(keys, 3, in_rows, d_qk - in_rows);
  torch::stable::copy_(left, own);
  torch::stable::copy_(right, part(*a.k_cache, 0, first, n));
  return keys;
}

// Any mask: torch's own attention.
void attend_by_torch(const Arguments& a, const Tensor& out, int64_t first, int64_t n) {
  const auto heads_first = [](const Tensor& tensor) { return torch::stable::transpose(tensor, 1, 2); };
  Tensor mask = a.mask.size(0) == 1 ? a.mask : part(a.mask, 0, first, n);
  const Tensor values = part(part(a.kv_cache, 0, first, n), 3, 0, a.d_v);
  std::array<StableIValue, 8> stack{
      torch::stable::detail::from(heads_first(part(a.q, 0, first, n))),
      torch::stable::detail::from(heads_first(keys_of(a, first, n))),
      torch::stable::detail::from(heads_first(values)),
      torch::stable::detail::from(std::optional<Tensor>(mask)),
      torch::stable::detail::from(0.0),
      torch::stable::detail::from(false),
      torch::stable::detail::from(std::optional<double>(a.softmax_scale)),
      torch::stable::detail::from(a.h_q() != a.kv_cache.size(2)),
  };
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::scaled_dot_product_attention", "", stack.data(), TORCH_ABI_VERSION));
  Tensor to = part(out, 0, first, n);
  torch::stable::copy_(to, heads_first(torch::stable::detail::to<Tensor>(stack[0])));
}

template <class T>
void fill(char* row, int64_t n, T value) {
  std::fill_n(reinterpret_cast<T*>(row), n, value);
}

// The queries of a sequence whose mask is -inf for every key: 0, or NaN.
void fill_empty(const Arguments& a, const Tensor& out, int64_t sequence) {
  char* to = static_cast<char*>(out.mutable_data_ptr()) + sequence * a.s_q() * a.h_q() * a.d_v * a.element_size();
  with_mask(a.mask, [&](auto kind) {
    using Mask = decltype(kind);
    const auto* data = static_cast<const typename Mask::Element*>(a.mask.const_data_ptr());
    for (int64_t i = 0; i < a.s_q(); i++) {
      for (int64_t head = 0; head < a.h_q(); head++, to += a.d_v * a.element_size()) {
        const int64_t at = sequence * a.mask_stride(0) + head * a.mask_stride(1) + i * a.mask_stride(2);
        if (!MaskRow<Mask>{data + at, a.s_kv(), a.mask_stride(3)}.all_infinite()) continue;
        const ScalarType type = a.q.scalar_type();
        const bool nan = a.nan_where_empty;
        if (type == ScalarType::Float) {
          fill(to, a.d_v, nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
        } else {
          fill(to, a.d_v, uint16_t(!nan ? 0 : type == ScalarType::Half ? 0x7e00 : 0x7fc0));
        }
      }
    }
  });
}

Tensor attend_masked(const AttendMaskedArguments& given) {
  const Tensor out = new_tensor(check(given)[0]);
  const auto& [q, kv_cache, k_cache, mask, d_v, qk_start, softmax_scale, nan_where_empty] = given;
  const double scale = softmax_scale ? *softmax_scale : 1 / std::sqrt(double(q.size(-1)));
  const Arguments a{q, kv_cache, k_cache, mask, d_v, qk_start, scale, nan_where_empty};
  const std::vector<Span> spans = spans_of(a);
  const auto exact = [](const Span& span) { return span.exact; };
  const auto first = std::find_if(spans.begin(), spans.end(), exact);
  if (first != spans.end()) {
    Attend attend(a, out);
    const bool alike = std::all_of(first, spans.end(), [&](const Span& span) {
      return !span.exact || (span.begin == first->begin && span.causal == first->causal);
    });
    if (alike && !attend.serves_prefill()) {
      attend.decode(0, a.b(), spans, *first);
    } else {
      for (int64_t i = 0; i < a.b(); i++) {
        const Span& span = spans[size_t(i)];
        if (!span.exact) continue;
        attend.serves_prefill() ? attend.prefill(i, span) : attend.decode(i, 1, spans, span);
      }
    }
  }
  for (int64_t i = 0; i < a.b();) {  // what is left, as many sequences at a time as lie together
    int64_t end = i;
    while (end < a.b() && !spans[size_t(end)].exact) end++;
    if (end > i) attend_by_torch(a, out, i, end - i);
    for (; i < end; i++) fill_empty(a, out, i);
    i++;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("attend_masked", TORCH_BOX(&AttendMaskedArguments::call<&attend_masked>));
}
