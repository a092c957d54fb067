// flashmla::summarize_, flashmla::page_mass and flashmla::choose_pages on the CPU, through torch's stable ABI.
#include <cmath>
#include <tuple>

#include "flashmla/torch_decode.h"

namespace {

using namespace flashmla;

template <class Arguments>
FlashmlaKeys keys_of(const Arguments& a) {
  FlashmlaKeys keys{};
  keys.dtype = dtype_of(a.kv_cache), keys.kv = cache_of(a.kv_cache);
  if (a.k_cache) keys.k = cache_of(*a.k_cache);
  keys.qk_start = a.qk_start, keys.n_pages = a.kv_cache.size(0), keys.page_size = a.kv_cache.size(1);
  keys.h_kv = a.kv_cache.size(2);
  return keys;
}

template <class Arguments>
FlashmlaSummaries summaries_of(const Arguments& a, char* data) {
  FlashmlaSummaries summaries{};
  summaries.data = data, summaries.kind = summary_number(a.kind);
  summaries.page_stride = a.summaries.stride(0), summaries.head_stride = a.summaries.stride(1);
  if (a.planes) {
    summaries.planes = a.planes->template const_data_ptr<float>();
    for (int i = 0; i < 2; i++) summaries.planes_stride[i] = a.planes->stride(i);
  }
  return summaries;
}

void summarize(const SummarizeArguments& a) {
  check(a);
  const FlashmlaKeys keys = keys_of(a);
  const FlashmlaSummaries summaries = summaries_of(a, static_cast<char*>(a.summaries.mutable_data_ptr()));
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_summarize(&keys, &summaries, a.slot_mapping.const_data_ptr<int64_t>(), a.slot_mapping.stride(0),
                              a.slot_mapping.size(0), &threads, message),
           message);
}

std::tuple<Tensor, Tensor> page_mass(const PageMassArguments& a) {
  const auto results = check(a);
  const Tensor mass = new_tensor(results[0]), slack = new_tensor(results[1]);
  FlashmlaPageMass call{};
  call.keys = keys_of(a);
  call.summaries = summaries_of(a, static_cast<char*>(const_cast<void*>(a.summaries.const_data_ptr())));
  call.always = {a.sink_pages, a.local_pages, a.min_context};
  call.b = a.q.size(0), call.s_q = a.q.size(1), call.h_q = a.q.size(2), call.d_qk = a.q.size(3);
  call.softmax_scale = float(a.softmax_scale ? *a.softmax_scale : 1 / std::sqrt(double(call.d_qk)));
  call.q = a.q.const_data_ptr();
  for (int i = 0; i < 4; i++) call.q_stride[i] = a.q.stride(i);
  call.block_table = a.block_table.const_data_ptr<int32_t>(), call.max_pages = a.block_table.size(1);
  for (int i = 0; i < 2; i++) call.block_table_stride[i] = a.block_table.stride(i);
  call.cache_seqlens = a.cache_seqlens.const_data_ptr<int32_t>();
  call.cache_seqlens_stride = a.cache_seqlens.stride(0);
  call.mass = mass.mutable_data_ptr<float>(), call.slack = slack.mutable_data_ptr<float>();
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_page_mass(&call, &threads, message), message);
  return {mass, slack};
}

FlashmlaRule rule_of(std::string_view name) {
  return name == "certified"  ? FLASHMLA_CERTIFIED
         : name == "share"    ? FLASHMLA_SHARE
         : name == "fraction" ? FLASHMLA_FRACTION
                              : FLASHMLA_MASK;
}

std::tuple<Tensor, Tensor, Tensor> choose_pages(const ChoosePagesArguments& a) {
  const auto results = check(a);
  const Tensor pages = new_tensor(results[0]), lengths = new_tensor(results[1]), residue = new_tensor(results[2]);
  FlashmlaChoosePages call{};
  call.rule = rule_of(a.rule), call.limit = a.limit;
  call.always = {a.sink_pages, a.local_pages, a.min_context};
  call.b = a.mass.size(0), call.h_q = a.mass.size(1), call.s_q = a.mass.size(2), call.max_pages = a.mass.size(3);
  call.h_kv = a.h_kv, call.page_size = a.page_size, call.page_step = a.page_step, call.head_step = a.head_step;
  call.mass = a.mass.const_data_ptr<float>(), call.slack = a.slack.const_data_ptr<float>();
  for (int i = 0; i < 4; i++) call.mass_stride[i] = a.mass.stride(i), call.slack_stride[i] = a.slack.stride(i);
  call.block_table = a.block_table.const_data_ptr<int32_t>();
  for (int i = 0; i < 2; i++) call.block_table_stride[i] = a.block_table.stride(i);
  call.cache_seqlens = a.cache_seqlens.const_data_ptr<int32_t>();
  call.cache_seqlens_stride = a.cache_seqlens.stride(0);
  call.pages = pages.mutable_data_ptr<int32_t>(), call.lengths = lengths.mutable_data_ptr<int32_t>();
  call.residue = residue.mutable_data_ptr<float>();
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_choose_pages(&call, &threads, message), message);
  return {pages, lengths, residue};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("summarize_", TORCH_BOX(&SummarizeArguments::call<&summarize>));
  m.impl("page_mass", TORCH_BOX(&PageMassArguments::call<&page_mass>));
  m.impl("choose_pages", TORCH_BOX(&ChoosePagesArguments::call<&choose_pages>));
}
