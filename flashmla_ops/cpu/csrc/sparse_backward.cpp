// Gradients through attention of each query token over rows of its own, from one source or two.
//
// A unit of work is a run of query tokens of one KV head. A thread computes it alone: it writes the gradients of the
// queries, and adds those of all rows up in memory of its own; then these are summed in the order of units. So results
// depend on the number of threads, but not on which thread is faster.
#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
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
      : call_(call), attention_(call.attention.attention), kernels_(kernels()) {
    for (int32_t i = 0; i < call.attention.n_sources; i++) add(call.attention.sources[i], call.rows[i]);
    const int64_t bytes = std::max<int64_t>(attention_.h_kv * floats_ * int64_t{sizeof(float)}, 1);
    const int64_t wanted = Schedule::divide_up(num_threads, std::max<int64_t>(attention_.h_kv, 1));
    parts_ = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(kMaxBytes / bytes, 1));
    parts_ = std::max<int64_t>(std::min(parts_, tokens()), 1);
  }

  // False if there is no memory.
  bool run(const FlashmlaRuntime& runtime) {
    const int64_t h_kv = attention_.h_kv;
    if (floats_) {
      char* memory = rows_arena.reserve(size_t(h_kv * parts_ * floats_) * sizeof(float));
      if (memory == nullptr) return false;
      rows_ = reinterpret_cast<float*>(memory);
    }
    if (!in_turns(runtime, h_kv * parts_, [&](int64_t i) { return compute(i / parts_, i % parts_); })) return false;
    for (const Source& source : sources_) {
      const int64_t blocks = source.is_wanted() ? Schedule::divide_up(source.slots(), kSummedRows) : 0;
      const bool written = in_turns(runtime, h_kv * blocks, [&](int64_t i) {
        write(source, i / blocks, i % blocks * kSummedRows);
        return true;
      });
      if (!written) return false;
    }
    return true;
  }

private:
  // Rows of a cache: the call over them alone, where their gradients go, and where these are among a part's floats.
  struct Source {
    const FlashmlaSource& from;
    FlashmlaDecode attention;
    FlashmlaRowGradients to;
    int64_t first;

    bool is_wanted() const { return to.dkv || to.dk; }
    int64_t slots() const { return from.n_pages * from.page_size; }
    int64_t row_floats() const { return from.kv.d + from.k.d; }
  };

  void add(const FlashmlaSource& from, const FlashmlaRowGradients& to) {
    Source source{from, attention_, to, floats_};
    FlashmlaDecode& one = source.attention;
    one.causal = 0, one.levels = 3;
    one.kv = from.kv, one.k = from.k, one.row_format = from.row_format;
    one.n_pages = from.n_pages, one.page_size = from.page_size;
    if (source.is_wanted()) floats_ += source.slots() * source.row_floats();
    const Item largest{0, 0, 0, std::min(group_size(one), Schedule::kMaxRows), from.topk};
    scratch_bytes_ = std::max(scratch_bytes_, kernels_.backward_scratch_bytes(one, largest));
    slots_bytes_.push_back((from.topk * int64_t{sizeof(int32_t)} + 63) / 64 * 64);
    sources_.push_back(source);
  }

  int64_t tokens() const { return attention_.b * attention_.s_q; }
  float* rows(int64_t head, int64_t part) const { return rows_ + (head * parts_ + part) * floats_; }

  bool compute(int64_t head, int64_t part) const {
    const int64_t slots_bytes = std::accumulate(slots_bytes_.begin(), slots_bytes_.end(), int64_t{0});
    char* memory = work_arena.reserve(size_t(slots_bytes + scratch_bytes_));
    if (memory == nullptr) return false;
    if (floats_) std::memset(rows(head, part), 0, size_t(floats_) * sizeof(float));
    for (int64_t token = tokens() * part / parts_; token < tokens() * (part + 1) / parts_; token++) {
      compute_token(head, part, token, memory, memory + slots_bytes);
    }
    return true;
  }
  // All sources share the softmax, whose lse is known: a block of query rows goes from one to the next.
  void compute_token(int64_t head, int64_t part, int64_t token, char* memory, char* scratch) const {
    const int64_t sequence = token / attention_.s_q, s = token % attention_.s_q, group = group_size(attention_);
    int32_t* slots[2];
    int64_t n[2];
    for (size_t i = 0; i < sources_.size(); memory += slots_bytes_[i], i++) {
      slots[i] = reinterpret_cast<int32_t*>(memory), n[i] = find_slots(sources_[i].from, sequence, s, head, slots[i]);
    }
    for (int64_t row = 0; row < group; row += Schedule::kMaxRows) {
      for (size_t i = 0; i < sources_.size(); i++) {
        const Source& source = sources_[i];
        float* into = source.is_wanted() ? rows(head, part) + source.first : nullptr;
        const Item item{sequence, head, s * group + row, std::min(Schedule::kMaxRows, group - row), n[i], slots[i]};
        kernels_.backward(source.attention, call_.gradients, item, 0, n[i], into, source.row_floats(), scratch, i > 0);
      }
    }
  }

  void write(const Source& source, int64_t head, int64_t first) const {
    const int64_t n = std::min(kSummedRows, source.slots() - first), stride = source.row_floats();
    std::vector<const float*> parts;
    for (int64_t part = 0; part < parts_; part++) parts.push_back(rows(head, part) + source.first + first * stride);
    const auto write_rows = [&](void* to, int64_t d) {
      if (to == nullptr) return;
      const int64_t size = attention_.dtype == FLASHMLA_F32 ? 4 : 2, h_kv = attention_.h_kv;
      char* first_row = static_cast<char*>(to) + (first * h_kv + head) * d * size;
      kernels_.sum_rows(attention_.dtype, parts.data(), parts_, n, stride, d, first_row, h_kv * d);
    };
    write_rows(source.to.dkv, source.from.kv.d);
    for (const float*& part : parts) part += source.from.kv.d;
    write_rows(source.to.dk, source.from.k.d);
  }

  const FlashmlaSparseBackward& call_;
  const FlashmlaDecode& attention_;  // but for what says where rows are
  const Kernels& kernels_;
  std::vector<Source> sources_;
  std::vector<int64_t> slots_bytes_;  // of a query token's slots of each source
  int64_t scratch_bytes_ = 0, floats_ = 0, parts_ = 1;
  float* rows_ = nullptr;  // [h_kv, parts_, floats_]: of each source that is wanted [slots, row_floats]
};

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_sparse_backward(const FlashmlaSparseBackward* call, const FlashmlaRuntime* runtime,
                                        char* message) try {
  using namespace flashmla;
  for (int32_t i = 0; i < call->attention.n_sources; i++) {
    if (check_topk_length(call->attention, i, message)) return 1;
  }
  if (SparseBackward(*call, runtime->num_threads).run(*runtime)) return 0;
  return out_of_memory(message, call->attention.attention.op);
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, call->attention.attention.op);
}
