// Which pages decoding attends to: the masses of pages, cut into units of work for the kernels, and the choice.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <new>
#include <numeric>
#include <vector>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/failure.h"
#include "flashmla/turns.h"

namespace flashmla {
namespace {

thread_local Arena arena;

constexpr int64_t kPages = 16;  // that a thread takes at a time
constexpr int64_t kFewPages = 64;
constexpr double kRoom = 0x1p-18;      // relative, for the exponentials that choices are made of
constexpr float kRounding = 0x1p-20f;  // of a float32 result
constexpr float kLog2E = 1.44269504f;

int64_t pages_of(int64_t length, int64_t page_size) { return (length + page_size - 1) / page_size; }

// 0, or 1 with what is wrong with a length, or with the page of a live row, in message. n_pages < 0: any page will do.
int check_tables(const char* op, const int32_t* lengths, int64_t length_stride, int64_t b, const int32_t* table,
                 const int64_t* strides, int64_t max_pages, int64_t page_size, int64_t n_pages, char* message) {
  for (int64_t i = 0; i < b; i++) {
    const int64_t length = lengths[i * length_stride], capacity = max_pages * page_size;
    if (length < 0 || length > capacity) return fail_length(message, op, capacity, length, i);
    for (int64_t j = 0; n_pages >= 0 && j < pages_of(length, page_size); j++) {
      const int64_t page = table[i * strides[0] + j * strides[1]];
      if (page < 0 || page >= n_pages) return fail_page(message, op, n_pages, page, i, j);
    }
  }
  return 0;
}

// A page, and its weight as a number whose order is that of weights from 0 on.
struct Ranked {
  uint32_t weight;
  int32_t page;
};
uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// By weight, those of the same weight as they came: byte by byte, the last one first. Comparing pages that lie
// in no order costs a wrong guess of the processor every other time.
void sort(std::vector<Ranked>& pages) {
  constexpr int kBits = 8, kDigits = 4;
  std::vector<Ranked> sorted(pages.size());
  for (int digit = 0; digit < kDigits; digit++) {
    uint32_t begins[(1 << kBits) + 1] = {};
    const auto digit_of = [&](const Ranked& each) { return each.weight >> (digit * kBits) & ((1 << kBits) - 1); };
    for (const Ranked& each : pages) begins[digit_of(each) + 1]++;
    std::partial_sum(std::begin(begins), std::end(begins), begins);
    for (const Ranked& each : pages) sorted[begins[digit_of(each)]++] = each;
    pages.swap(sorted);
  }
}

// The pages of one KV head of one sequence, and which of them are skipped. Rules are those of
// flashmla_ops/reference/pages.py.
class Choice {
  using Floats = std::vector<float>;

public:
  Choice(const FlashmlaChoosePages& call, int64_t sequence, int64_t head)
      : call_(call), sequence_(sequence), head_(head),
        length_(call.cache_seqlens[sequence * call.cache_seqlens_stride]), pages_(pages_of(length_, call.page_size)),
        group_(call.h_q / call.h_kv), rows_(group_ * call.s_q), skipped_(size_t(pages_), 0) {
    first_ = call.always.sink_pages;
    last_ = pages_of(length_ - call.s_q + 1, call.page_size) - call.always.local_pages;
    if (length_ < call.always.min_context) last_ = 0;
  }

  void run() {
    if (first_ < last_) {
      mass_ = gathered(call_.mass, call_.mass_stride);
      const Floats slack = gathered(call_.slack, call_.slack_stride);
      upper_ = mass_;
      for (size_t i = 0; i < upper_.size(); i++) upper_[i] = slack[i] == INFINITY ? INFINITY : mass_[i] + slack[i];
      choose(slack);
    }
    write();
  }

private:
  void choose(const Floats& slack) {
    const bool infinite = std::any_of(mass_.begin(), mass_.end(), [](float x) { return x == INFINITY; });
    if (infinite && call_.rule != FLASHMLA_MASK) return;
    switch (call_.rule) {
      case FLASHMLA_CERTIFIED:
        return certify(slack);
      case FLASHMLA_SHARE:
        return compare();
      case FLASHMLA_FRACTION:
        return rank();
      case FLASHMLA_MASK:
        for (int64_t page = first_; page < last_; page++) {
          bool hidden = true;
          for (int64_t r = 0; r < rows_; r++) hidden &= mass_[at(r, page)] == -INFINITY;
          skipped_[size_t(page)] = hidden;
        }
    }
  }

  size_t at(int64_t r, int64_t page) const { return size_t(r * pages_ + page); }
  int64_t query_head(int64_t r) const { return head_ * group_ + r % group_; }

  // [rows, pages] of [b, h_q, s_q, max_pages].
  Floats gathered(const float* from, const int64_t* stride) const {
    Floats to(size_t(rows_ * pages_));
    for (int64_t r = 0; r < rows_; r++) {
      const float* row = from + sequence_ * stride[0] + query_head(r) * stride[1] + r / group_ * stride[2];
      for (int64_t page = 0; page < pages_; page++) to[at(r, page)] = row[page * stride[3]];
    }
    return to;
  }

  // exp(x - shift) of a row: infinite above 1, NaN for NaN.
  Floats exponentials(const Floats& x, int64_t r, float shift) const {
    const auto n = static_cast<size_t>(pages_);
    Floats powers(n), above(n);
    for (int64_t page = 0; page < pages_; page++) {
      const float difference = x[at(r, page)] - shift;
      above[size_t(page)] = difference > 0 ? INFINITY : 0;
      powers[size_t(page)] = difference > 0 ? 0 : difference * kLog2E;
    }
    kernels().exponentials(powers.data(), pages_);
    for (size_t i = 0; i < powers.size(); i++) powers[i] += above[i];
    return powers;
  }
  // The largest number of a row, but for infinity.
  float largest(const Floats& x, int64_t r) const {
    float most = -INFINITY;
    for (int64_t page = 0; page < pages_; page++) {
      const float here = x[at(r, page)];
      if (here > most && here < INFINITY) most = here;
    }
    return most;
  }
  static double sum(const Floats& x) {
    double total = 0;
    for (float each : x) total += double(each);
    return total;
  }

  // The larger of a page's weight and its share; what is no number weighs most.
  static void weigh(float& weight, double share) {
    if (!(share <= double(weight))) weight = share < INFINITY ? float(share) : INFINITY;
  }
  // The candidates of finite weight, the lightest first.
  std::vector<int32_t> ranked(const Floats& weight) const {
    std::vector<Ranked> order;
    for (int64_t page = first_; page < last_; page++) {
      const float here = weight[size_t(page)];
      if (here < INFINITY) order.push_back({float_bits(here), int32_t(page)});
    }
    sort(order);
    std::vector<int32_t> pages(order.size());
    std::transform(order.begin(), order.end(), pages.begin(), [](const Ranked& each) { return each.page; });
    return pages;
  }

  // Each row allows a number of the candidates, the lightest first; the least is skipped.
  void certify(const Floats& slack) {
    std::vector<Floats> most, least;
    Floats weight(size_t(pages_), 0.0f), lower(mass_.size());
    for (size_t i = 0; i < lower.size(); i++) lower[i] = mass_[i] - slack[i];
    for (int64_t r = 0; r < rows_; r++) {
      const float shift = largest(upper_, r);
      most.push_back(exponentials(upper_, r, shift));
      least.push_back(exponentials(lower, r, shift));
      const double total = sum(least.back());
      for (int64_t page = first_; page < last_; page++) {
        weigh(weight[size_t(page)], double(most.back()[size_t(page)]) / total);
      }
    }
    const std::vector<int32_t> order = ranked(weight);
    size_t n = order.size();
    for (size_t r = 0; r < most.size() && n > 0; r++) n = allowed(most[r], least[r], order, n);
    for (size_t i = 0; i < n; i++) skipped_[size_t(order[i])] = 1;
  }

  // Of the first n in order, how many one row allows.
  size_t allowed(const Floats& most, const Floats& least, const std::vector<int32_t>& order, size_t n) const {
    std::vector<double> kept(order.size() + 1);
    std::vector<char> ordered(size_t(pages_), 0);
    for (int32_t page : order) ordered[size_t(page)] = 1;
    for (size_t page = 0; page < least.size(); page++) {
      if (!ordered[page]) kept[order.size()] += double(least[page]);
    }
    for (size_t i = order.size(); i-- > 0;) kept[i] = kept[i + 1] + double(least[size_t(order[i])]);
    double lost = 0;
    for (size_t i = 0; i < n; i++) {
      lost += double(most[size_t(order[i])]) * (1 + kRoom) + 0x1p-126;  // no exponential that became 0 was larger
      if (!(lost * (1 - call_.limit) <= kept[i + 1] * call_.limit * (1 - 2 * kRoom))) return i;
    }
    return n;
  }

  // Skip what every row gives less than the limit of its softmax.
  void compare() {
    std::vector<char> light(size_t(pages_), 1);
    for (int64_t r = 0; r < rows_; r++) {
      const Floats shares = exponentials(mass_, r, largest(mass_, r));
      const double limit = sum(shares) * call_.limit;
      for (size_t page = 0; page < shares.size(); page++) light[page] &= double(shares[page]) < limit;
    }
    std::copy(light.begin() + first_, light.begin() + last_, skipped_.begin() + first_);
  }

  // Skip all but the heaviest.
  void rank() {
    Floats weight(size_t(pages_), 0.0f);
    for (int64_t r = 0; r < rows_; r++) {
      const Floats shares = exponentials(mass_, r, largest(mass_, r));
      const double total = sum(shares);
      for (int64_t page = first_; page < last_; page++)
        weigh(weight[size_t(page)], double(shares[size_t(page)]) / total);
    }
    const std::vector<int32_t> order = ranked(weight);
    const auto candidates = double(last_ - first_);
    const size_t n = std::min(order.size(), size_t(candidates - std::ceil(candidates * call_.limit)));
    for (size_t i = 0; i < n; i++) skipped_[size_t(order[i])] = 1;
  }

  void write() const {
    const int64_t row = sequence_ * call_.h_kv + head_;
    const int32_t* table = call_.block_table + sequence_ * call_.block_table_stride[0];
    int32_t* to = call_.pages + row * call_.max_pages;
    int64_t kept = 0;
    for (int64_t page = 0; page < pages_; page++) {
      if (skipped_[size_t(page)]) continue;
      to[kept++] = int32_t(table[page * call_.block_table_stride[1]] * call_.page_step + head_ * call_.head_step);
    }
    std::fill(to + kept, to + call_.max_pages, 0);
    call_.lengths[row] = int32_t(length_ - (pages_ - kept) * call_.page_size);
    for (int64_t r = 0; r < rows_; r++) {
      call_.residue[(sequence_ * call_.h_q + query_head(r)) * call_.s_q + r / group_] =
          kept < pages_ ? residue(r) : -INFINITY;
    }
  }

  // No less than the logarithm of the sum of the exponentials of what is skipped.
  float residue(int64_t r) const {
    Floats powers;
    float most = -INFINITY;
    for (int64_t page = 0; page < pages_; page++) {
      if (!skipped_[size_t(page)]) continue;
      powers.push_back(upper_[at(r, page)]);
      if (!(powers.back() <= most)) most = powers.back();
    }
    if (!std::isfinite(most)) return most;
    for (float& power : powers) power = (power - most) * kLog2E;
    kernels().exponentials(powers.data(), int64_t(powers.size()));
    const float log = most + float(std::log(sum(powers) * (1 + kRoom)));
    return log + kRounding * (1 + std::fabs(log));
  }

  const FlashmlaChoosePages& call_;
  int64_t sequence_, head_, length_, pages_, group_, rows_, first_, last_;
  Floats mass_, upper_;  // [rows, pages]
  std::vector<char> skipped_;
};

}  // namespace
}  // namespace flashmla

using namespace flashmla;

extern "C" int flashmla_page_mass(const FlashmlaPageMass* call, const FlashmlaRuntime* runtime, char* message) try {
  const int64_t page_size = call->keys.page_size;
  if (check_tables("page_mass", call->cache_seqlens, call->cache_seqlens_stride, call->b, call->block_table,
                   call->block_table_stride, call->max_pages, page_size, call->keys.n_pages, message)) {
    return 1;
  }
  const int64_t n = call->b * call->h_q * call->s_q * call->max_pages;
  std::fill(call->mass, call->mass + n, -INFINITY);
  std::fill(call->slack, call->slack + n, 0.0f);
  std::vector<PageItem> items;
  for (int64_t i = 0; i < call->b; i++) {
    const int64_t length = call->cache_seqlens[i * call->cache_seqlens_stride], pages = pages_of(length, page_size);
    if (length < call->always.min_context) continue;
    for (int64_t head = 0; head < call->keys.h_kv; head++) {
      for (int64_t page = 0; page < pages; page += kPages) {
        items.push_back({i, head, length, page, std::min(page + kPages, pages)});
      }
    }
  }
  const auto bytes = size_t(kernels().page_mass_bytes(*call));
  const bool done = in_turns(*runtime, int64_t(items.size()), [&](int64_t i) {
    char* scratch = arena.reserve(bytes);
    if (scratch == nullptr) return false;
    kernels().page_mass(*call, items[size_t(i)], scratch);
    return true;
  });
  return done ? 0 : out_of_memory(message, "page_mass");
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, "page_mass");
}

extern "C" int flashmla_choose_pages(const FlashmlaChoosePages* call, const FlashmlaRuntime* runtime,
                                     char* message) try {
  if (check_tables("choose_pages", call->cache_seqlens, call->cache_seqlens_stride, call->b, call->block_table,
                   call->block_table_stride, call->max_pages, call->page_size, -1, message)) {
    return 1;
  }
  const int64_t items = call->b * call->h_kv;
  // Few pages are less work than waking a thread.
  const FlashmlaRuntime threads{items * call->max_pages < kFewPages ? 1 : runtime->num_threads, runtime->parallel};
  in_turns(threads, items, [&](int64_t i) {
    Choice(*call, i / call->h_kv, i % call->h_kv).run();
    return true;
  });
  return 0;
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, "choose_pages");
}
