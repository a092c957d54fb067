// Gradients through dense attention over sequences that lie one after another.
//
// A unit of work is a run of items (blocks of query rows) of one KV head of one sequence. A thread computes it alone:
// it writes the gradients of its queries, and adds those of all keys and values up in memory of its own. Where a head
// is one unit these are the result; where there are fewer heads than threads need, its items are several units, whose
// gradients of keys and values are summed in the order of units. So results depend on the number of threads, but not on
// which thread is faster.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/failure.h"
#include "flashmla/prefill.h"
#include "flashmla/schedule.h"
#include "flashmla/turns.h"

namespace flashmla {
namespace {

thread_local Arena work_arena, sum_arena;

constexpr int64_t kUnitsPerThread = 4;  // about so many even out what threads do
constexpr int64_t kSummedTokens = 256;  // whose gradients are summed at a time

class PrefillBackward {
public:
  PrefillBackward(const FlashmlaPrefillBackward& call, int64_t num_threads)
      : call_(call), attention_(call.attention), kernels_(kernels()), threads_(num_threads) {
    group_ = attention_.h_q / attention_.h_kv;
    row_floats_ = attention_.d_v + attention_.d_qk;
    for (int64_t i = 0; i < attention_.b; i++) {
      sequences_.push_back(sequence_of(attention_, i));
      gradients_.push_back(gradients_from(call_.gradients, attention_.dtype, bounds_q(attention_)[i]));
    }
    double all = 0;
    for (int64_t i = 0; i < attention_.b; i++) all += cost(i) * double(attention_.h_kv);
    const double most = std::max(all / double(threads_ * kUnitsPerThread), 1.0);
    for (int64_t i = 0; i < attention_.b; i++) {
      const int64_t parts = std::clamp<int64_t>(int64_t(cost(i) / most), 1, FLASHMLA_MAX_PARTS);
      for (int64_t head = 0; head < attention_.h_kv; head++) add_units(i, head, std::min(parts, threads_));
    }
    std::stable_sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
  }

  bool run(const FlashmlaRuntime& runtime) {
    if (summed_floats_) {
      sums_ = reinterpret_cast<float*>(sum_arena.reserve(size_t(summed_floats_) * sizeof(float)));
      if (sums_ == nullptr) return false;
    }
    return in_turns(runtime, int64_t(units_.size()), [this](int64_t i) { return compute(units_[size_t(i)]); }) &&
           in_turns(runtime, int64_t(sums_of_.size()), [this](int64_t i) {
             const Sum& sum = sums_of_[size_t(i)];
             write(sum, sums_ + sum.sums);
             return true;
           });
  }

private:
  struct Unit {
    int64_t sequence, head, row, end;  // query rows
    double cost;
    int64_t sums;  // where its gradients of keys and values are, in sums_; or -1: it is the only one of its head
  };
  // Tokens [begin, end) of a head whose gradients are those of `parts` units together, from `sums` on.
  struct Sum {
    int64_t sequence, head, begin, end, parts, sums;
  };

  bool wants_rows() const { return call_.dk || call_.dv; }
  int64_t rows(int64_t i) const { return sequences_[size_t(i)].s_q * group_; }
  Item item(int64_t i, int64_t head, int64_t row) const {
    return {0, head, row, std::min(Schedule::kMaxRows, rows(i) - row), length_of(attention_, i)};
  }
  double cost(int64_t i) const { return cost(i, 0, rows(i)); }
  double cost(int64_t i, int64_t row, int64_t end) const {
    double tokens = 0;
    for (; row < end; row += Schedule::kMaxRows) {
      const Tokens seen = tokens_of(sequences_[size_t(i)], item(i, 0, row));
      tokens += double(seen.end - seen.begin);
    }
    return tokens;
  }

  // Cuts a head's items into at most so many units of about the same cost.
  void add_units(int64_t i, int64_t head, int64_t parts) {
    const int64_t length = length_of(attention_, i), floats = length * row_floats_;
    const double all = cost(i);
    const size_t first = units_.size();
    double before = 0;
    int64_t begin = 0;
    for (int64_t row = 0; row < rows(i); row += Schedule::kMaxRows) {
      const int64_t end = std::min(row + Schedule::kMaxRows, rows(i));
      before += cost(i, row, end);
      const int64_t made = int64_t(units_.size() - first);
      if (end < rows(i) && before < all * double(made + 1) / double(parts)) continue;
      units_.push_back({i, head, begin, end, cost(i, begin, end), -1});
      begin = end;
    }
    const int64_t made = int64_t(units_.size() - first);
    if (made == 0) units_.push_back({i, head, 0, 0, 0, -1});  // keys that no query sees: their gradients are zeros
    if (made <= 1 || !wants_rows()) return;
    for (int64_t part = 0; part < made; part++) units_[first + size_t(part)].sums = summed_floats_ + part * floats;
    for (int64_t token = 0; token < length; token += kSummedTokens) {
      sums_of_.push_back({i, head, token, std::min(token + kSummedTokens, length), made, summed_floats_});
    }
    summed_floats_ += made * floats;
  }

  // False if there is no memory.
  bool compute(const Unit& unit) const {
    const FlashmlaDecode& one = sequences_[size_t(unit.sequence)];
    const int64_t floats = wants_rows() ? length_of(attention_, unit.sequence) * row_floats_ : 0;
    const size_t own = unit.sums < 0 ? size_t(floats + 16) / 16 * 16 * sizeof(float) : 0;
    const size_t scratch = size_t(kernels_.backward_scratch_bytes(one, {0, 0, 0, Schedule::kMaxRows, 0}));
    char* memory = work_arena.reserve(own + scratch);
    if (memory == nullptr) return false;
    float* sums = unit.sums < 0 ? reinterpret_cast<float*>(memory) : sums_ + unit.sums;
    std::memset(sums, 0, size_t(floats) * sizeof(float));
    for (int64_t row = unit.row; row < unit.end; row += Schedule::kMaxRows) {
      const Item here = item(unit.sequence, unit.head, row);
      const Tokens seen = tokens_of(one, here);
      kernels_.backward(one, gradients_[size_t(unit.sequence)], here, seen.begin, seen.end,
                        wants_rows() ? sums : nullptr, row_floats_, memory + own, false);
    }
    if (wants_rows() && unit.sums < 0) {
      write({unit.sequence, unit.head, 0, length_of(attention_, unit.sequence), 1, 0}, sums);
    }
    return true;
  }

  // A row of gradients is that of a value, then that of a key.
  void write(const Sum& sum, const float* sums) const {
    const int64_t h_kv = attention_.h_kv, d_v = attention_.d_v, d_qk = attention_.d_qk;
    const int64_t size = attention_.dtype == FLASHMLA_F32 ? 4 : 2, n = sum.end - sum.begin;
    const int64_t floats = length_of(attention_, sum.sequence) * row_floats_;
    const int64_t token = bounds_k(attention_)[sum.sequence] + sum.begin;
    const float* parts[FLASHMLA_MAX_PARTS];
    for (int64_t p = 0; p < sum.parts; p++) parts[p] = sums + p * floats + sum.begin * row_floats_;
    if (call_.dv) {
      char* dv = static_cast<char*>(call_.dv) + (token * h_kv + sum.head) * d_v * size;
      kernels_.sum_rows(attention_.dtype, parts, sum.parts, n, row_floats_, d_v, dv, h_kv * d_v);
    }
    for (int64_t p = 0; p < sum.parts; p++) parts[p] += d_v;
    if (call_.dk) {
      char* dk = static_cast<char*>(call_.dk) + (token * h_kv + sum.head) * d_qk * size;
      kernels_.sum_rows(attention_.dtype, parts, sum.parts, n, row_floats_, d_qk, dk, h_kv * d_qk);
    }
  }

  const FlashmlaPrefillBackward& call_;
  const FlashmlaPrefill& attention_;
  const Kernels& kernels_;
  const int64_t threads_;
  int64_t group_, row_floats_, summed_floats_ = 0;
  std::vector<FlashmlaDecode> sequences_;
  std::vector<FlashmlaGradients> gradients_;
  std::vector<Unit> units_;
  std::vector<Sum> sums_of_;
  float* sums_ = nullptr;
};

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_prefill_backward(const FlashmlaPrefillBackward* call, const FlashmlaRuntime* runtime,
                                         char* message) try {
  using namespace flashmla;
  if (check_bounds("prefill_backward", call->attention, message)) return 1;
  if (PrefillBackward(*call, runtime->num_threads).run(*runtime)) return 0;
  return out_of_memory(message, "prefill_backward");
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, "prefill_backward");
}
