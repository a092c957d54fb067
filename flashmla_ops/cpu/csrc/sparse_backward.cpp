// Gradients through attention of each query token over rows of its own.
//
// A unit of work is a run of query tokens of one KV head. A thread computes it alone: it writes the gradients of the
// queries, and adds those of all rows up in memory of its own; then these are summed in the order of units. So results
// depend on the number of threads, but not on which thread is faster.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/failure.h"
#include "flashmla/schedule.h"
#include "flashmla/source_slots.h"
#include "flashmla/turns.h"

namespace flashmla {
namespace {

thread_local Arena work_arena, rows_arena;

constexpr int64_t kSummedRows = 256;             // rows whose gradients are summed at a time
constexpr int64_t kMaxBytes = int64_t{1} << 30;  // of the gradients of units: there are fewer of them beyond it

class SparseBackward {
public:
  SparseBackward(const FlashmlaSparseBackward& call, int64_t num_threads)
      : call_(call), source_(call.attention.sources[0]), attention_(call.attention.attention), kernels_(kernels()) {
    attention_.kv = source_.kv, attention_.k = source_.k, attention_.causal = 0, attention_.levels = 3;
    attention_.n_pages = source_.n_pages, attention_.page_size = source_.page_size;
    const int64_t bytes = std::max<int64_t>(attention_.h_kv * floats() * int64_t{sizeof(float)}, 1);
    const int64_t wanted = Schedule::divide_up(num_threads, std::max<int64_t>(attention_.h_kv, 1));
    parts_ = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(kMaxBytes / bytes, 1));
    parts_ = std::max<int64_t>(std::min(parts_, attention_.s_q), 1);
  }

  // False if there is no memory.
  bool run(const FlashmlaRuntime& runtime) {
    const int64_t h_kv = attention_.h_kv;
    if (call_.dkv) {
      char* memory = rows_arena.reserve(size_t(h_kv * parts_ * floats() + 1) * sizeof(float));
      if (memory == nullptr) return false;
      rows_ = reinterpret_cast<float*>(memory);
    }
    if (!in_turns(runtime, h_kv * parts_, [&](int64_t i) { return compute(i / parts_, i % parts_); })) return false;
    if (!call_.dkv) return true;
    const int64_t blocks = Schedule::divide_up(source_.page_size, kSummedRows);
    return in_turns(runtime, h_kv * blocks, [&](int64_t i) {
      write(i / blocks, i % blocks * kSummedRows);
      return true;
    });
  }

private:
  int64_t floats() const { return source_.page_size * source_.kv.d; }
  float* rows(int64_t head, int64_t part) const { return rows_ + (head * parts_ + part) * floats(); }

  bool compute(int64_t head, int64_t part) const {
    const int64_t group = group_size(attention_);
    const Item largest{0, head, 0, std::min(group, Schedule::kMaxRows), source_.topk};
    const int64_t slots_bytes = (source_.topk * int64_t{sizeof(int32_t)} + 63) / 64 * 64;
    char* memory = work_arena.reserve(size_t(slots_bytes + kernels_.backward_scratch_bytes(attention_, largest)));
    if (memory == nullptr) return false;
    float* into = call_.dkv ? rows(head, part) : nullptr;
    if (into) std::memset(into, 0, size_t(floats()) * sizeof(float));
    int32_t* slots = reinterpret_cast<int32_t*>(memory);
    for (int64_t token = attention_.s_q * part / parts_; token < attention_.s_q * (part + 1) / parts_; token++) {
      const int64_t n = find_slots(source_, 0, token, head, slots);
      for (int64_t row = 0; row < group; row += Schedule::kMaxRows) {
        const Item item{0, head, token * group + row, std::min(Schedule::kMaxRows, group - row), n, slots};
        kernels_.backward(attention_, call_.gradients, item, 0, n, into, source_.kv.d, memory + slots_bytes);
      }
    }
    return true;
  }

  void write(int64_t head, int64_t first) const {
    const int64_t d = source_.kv.d, n = std::min(kSummedRows, source_.page_size - first);
    const int64_t size = attention_.dtype == FLASHMLA_F32 ? 4 : 2, h_kv = attention_.h_kv;
    std::vector<const float*> parts;
    for (int64_t part = 0; part < parts_; part++) parts.push_back(rows(head, part) + first * d);
    char* to = static_cast<char*>(call_.dkv) + (first * h_kv + head) * d * size;
    kernels_.sum_rows(attention_.dtype, parts.data(), parts_, n, d, d, to, h_kv * d);
  }

  const FlashmlaSparseBackward& call_;
  const FlashmlaSource& source_;
  FlashmlaDecode attention_;  // over the source
  const Kernels& kernels_;
  int64_t parts_;
  float* rows_ = nullptr;  // [h_kv, parts_, s_kv, d]
};

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_sparse_backward(const FlashmlaSparseBackward* call, const FlashmlaRuntime* runtime,
                                        char* message) try {
  using namespace flashmla;
  if (check_topk_length(call->attention, 0, message)) return 1;
  if (SparseBackward(*call, runtime->num_threads).run(*runtime)) return 0;
  return out_of_memory(message, call->attention.attention.op);
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, call->attention.attention.op);
}
