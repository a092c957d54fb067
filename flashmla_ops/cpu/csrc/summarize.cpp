// Summaries of pages that have become complete, as flashmla_ops/sparsity/summaries defines them.
#include "flashmla/summaries.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "flashmla/failure.h"
#include "flashmla/turns.h"

#define FLASHMLA_ISA plain
#include "flashmla/dtypes.h"

namespace {

using namespace flashmla;
using namespace flashmla::plain;

// The largest bfloat16 that is not above x, in the upper half of a float's bits, and the least that is not below.
float bf16_below(float x) { return float_of((bits_of(x) + (x < 0 ? 0xffffu : 0u)) & 0xffff0000u); }
float bf16_above(float x) { return -bf16_below(-x); }
float bf16_nearest(float x) {
  bf16 y;
  from_float(x, y);
  return to_float(y);
}
void store_bf16(char* to, float x) {
  const auto bits = uint16_t(bits_of(x) >> 16);
  std::memcpy(to, &bits, 2);
}

// The keys of one page and KV head: [n, d] floats.
struct Page {
  const float* keys;
  int64_t n, d;
  std::vector<float> least, most, mean;

  Page(const float* keys, int64_t n, int64_t d) : keys(keys), n(n), d(d), least(keys, keys + d), most(keys, keys + d) {
    for (int64_t t = 1; t < n; t++) {
      const float* key = keys + t * d;
      for (int64_t i = 0; i < d; i++) least[size_t(i)] = key[i] < least[size_t(i)] ? key[i] : least[size_t(i)];
      for (int64_t i = 0; i < d; i++) most[size_t(i)] = key[i] > most[size_t(i)] ? key[i] : most[size_t(i)];
    }
  }
  bool finite() const {
    return std::all_of(keys, keys + n * d, [](float x) { return std::isfinite(x); });
  }
  void find_mean() {
    mean.assign(size_t(d), 0.0f);
    for (int64_t t = 0; t < n; t++) {
      for (int64_t i = 0; i < d; i++) mean[size_t(i)] += keys[t * d + i];
    }
    for (float& x : mean) x /= float(n);
  }
};

void codes(const Page& page, char* to) {
  const CodesLayout layout(page.n, page.d);
  std::memset(to, 0, size_t(layout.bytes()));
  float radius = INFINITY;
  if (!page.finite()) return void(std::memcpy(to, &radius, 4));
  std::vector<float> low(size_t(page.d)), step(size_t(page.d));
  for (int64_t i = 0; i < page.d; i++) {
    low[size_t(i)] = bf16_below(page.least[size_t(i)]);
    step[size_t(i)] = bf16_above((page.most[size_t(i)] - low[size_t(i)]) / 16);
    store_bf16(to + kCodesHeader + 2 * i, low[size_t(i)]);
    store_bf16(to + layout.step() + 2 * i, step[size_t(i)]);
  }
  double farthest = 0;
  uint32_t* words = reinterpret_cast<uint32_t*>(to + layout.words());
  for (int64_t t = 0; t < page.n; t++) {
    double square = 0;
    for (int64_t i = 0; i < page.d; i++) {
      const float x = page.keys[t * page.d + i];
      const float place = std::floor((x - low[size_t(i)]) / step[size_t(i)]);
      const uint32_t code = place > 0 ? uint32_t(place > 15 ? 15 : place) : 0;
      const double away = double(x) - (double(low[size_t(i)]) + (code + 0.5) * double(step[size_t(i)]));
      square += away * away;
      const int64_t in_eight = i % 8;
      uint32_t word;
      std::memcpy(&word, words + i / 8 * layout.tokens + t, 4);
      word |= code << (in_eight / 2 * 4 + in_eight % 2 * 16);
      std::memcpy(words + i / 8 * layout.tokens + t, &word, 4);
    }
    farthest = !(square <= farthest) ? square : farthest;
  }
  radius = bf16_above(float(std::sqrt(farthest)) * (1 + 0x1p-20f));
  if (!std::isfinite(radius)) radius = INFINITY;
  std::memcpy(to, &radius, 4);
}

void boxes(const Page& page, char* to) {
  for (int64_t i = 0; i < page.d; i++) {
    store_bf16(to + 2 * i, bf16_below(page.least[size_t(i)]));
    store_bf16(to + 2 * (page.d + i), bf16_above(page.most[size_t(i)]));
  }
}

void spread(Page& page, char* to) {
  page.find_mean();
  for (int64_t i = 0; i < page.d; i++) {
    float squares = 0;
    for (int64_t t = 0; t < page.n; t++) {
      const float away = page.keys[t * page.d + i] - page.mean[size_t(i)];
      squares += away * away;
    }
    store_bf16(to + 2 * i, bf16_nearest(page.mean[size_t(i)]));
    store_bf16(to + 2 * (page.d + i), bf16_nearest(std::sqrt(squares / float(page.n))));
  }
}

void signs(Page& page, char* to, const FlashmlaSummaries& summaries) {
  page.find_mean();
  for (int64_t i = 0; i < page.d; i++) {
    page.mean[size_t(i)] = bf16_nearest(page.mean[size_t(i)]);
    store_bf16(to + 2 * i, page.mean[size_t(i)]);
  }
  char *lengths = to + 2 * page.d, *bits = lengths + 2 * page.n;
  std::memset(bits, 0, size_t(page.n * kSignBytes));
  for (int64_t t = 0; t < page.n; t++) {
    double square = 0, sides[kPlanes] = {};
    for (int64_t i = 0; i < page.d; i++) {
      const float away = page.keys[t * page.d + i] - page.mean[size_t(i)];
      const float* planes = summaries.planes + i * summaries.planes_stride[0];
      square += double(away) * double(away);
      for (int64_t k = 0; k < kPlanes; k++) sides[k] += double(away) * double(planes[k * summaries.planes_stride[1]]);
    }
    store_bf16(lengths + 2 * t, bf16_nearest(float(std::sqrt(square))));
    for (int64_t k = 0; k < kPlanes; k++) {
      if (sides[k] > 0) bits[t * kSignBytes + k / 8] = char(uint8_t(bits[t * kSignBytes + k / 8]) | 1u << k % 8);
    }
  }
}

template <class T>
void widen(const FlashmlaKeys& keys, int64_t page, int64_t head, float* to) {
  const auto row = [&](const FlashmlaCache& cache, int64_t token) {
    return static_cast<const T*>(cache.data) + page * cache.page_stride + token * cache.token_stride +
           head * cache.head_stride;
  };
  for (int64_t t = 0; t < keys.page_size; t++) {
    const T* first = row(keys.kv, t);
    for (int64_t i = keys.qk_start; i < keys.kv.d; i++) *to++ = to_float(first[i]);
    if (keys.k.d == 0) continue;
    const T* rest = row(keys.k, t);
    for (int64_t i = 0; i < keys.k.d; i++) *to++ = to_float(rest[i]);
  }
}

void summarize(const FlashmlaKeys& keys, const FlashmlaSummaries& summaries, int64_t number, int64_t head) {
  const int64_t d = keys.kv.d - keys.qk_start + keys.k.d;
  std::vector<float> widened(size_t(keys.page_size * d));
  with_element(keys.dtype, [&](auto t) { widen<decltype(t)>(keys, number, head, widened.data()); });
  Page page(widened.data(), keys.page_size, d);
  char* to = summaries.data + number * summaries.page_stride + head * summaries.head_stride;
  switch (summaries.kind) {
    case SUMMARY_CODES:
      return codes(page, to);
    case SUMMARY_BOXES:
      return boxes(page, to);
    case SUMMARY_SPREAD:
      return spread(page, to);
    default:
      return signs(page, to, summaries);
  }
}

}  // namespace

extern "C" int flashmla_summarize(const FlashmlaKeys* keys, const FlashmlaSummaries* summaries, const int64_t* slots,
                                  int64_t slot_stride, int64_t n, const FlashmlaRuntime* runtime, char* message) try {
  std::vector<int64_t> pages;
  for (int64_t i = 0; i < n; i++) {
    const int64_t slot = slots[i * slot_stride];
    if (slot >= keys->n_pages * keys->page_size) {
      char expected[128], actual[128];
      return fail(message, "summarize_", "slot_mapping",
                  text(expected, "slots below %lld", (long long)(keys->n_pages * keys->page_size)),
                  text(actual, "%lld at [%lld]", (long long)slot, (long long)i));
    }
    if (slot >= 0 && slot % keys->page_size == keys->page_size - 1) pages.push_back(slot / keys->page_size);
  }
  // Two threads must not write one page.
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  in_turns(*runtime, int64_t(pages.size()) * keys->h_kv, [&](int64_t i) {
    summarize(*keys, *summaries, pages[size_t(i / keys->h_kv)], i % keys->h_kv);
    return true;
  });
  return 0;
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, "summarize_");
}
