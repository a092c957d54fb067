// From tokens of a sequence to rows that tiles read: the only place that reads the block table and knows row formats.
#pragma once

#include "flashmla/kernels.h"

namespace flashmla::FLASHMLA_ISA {

// A row format: what lies in a cache (Stored), and the elements that tiles read (Element). Rows that are read in place
// are both. Others (flashmla/formats/) say how many bytes and elements a row has, and decode one.
template <class T>
struct NativeRow {
  using Element = T;
  using Stored = T;
  static constexpr bool in_place = true;
};
// Rows of bytes: Format is a struct of flashmla/formats/, and E is what it decodes to.
template <class Format, class E>
struct QuantizedRow {
  using Element = E;
  using Stored = uint8_t;
  static constexpr bool in_place = false;
  static constexpr int64_t elements = Format::elements, bytes = Format::bytes;
  static void decode(const uint8_t* row, E* to) { Format::decode(row, to); }
};

// Where rows of N tokens lie in the cache, beside where tiles read them; nothing where that is the same.
template <class Row, int N, bool IN_PLACE = Row::in_place>
struct StoredRows {
  const typename Row::Stored* stored[N];
};
template <class Row, int N>
struct StoredRows<Row, N, true> {};

// Addresses of up to N tokens' rows in both cache tensors, for one KV head.
template <class Row, int N>
struct Rows : StoredRows<Row, N> {
  using T = typename Row::Element;
  const T* kv[N];
  const T* k[N];
  int page_end[N];  // the first token after this one whose row does not follow at the token stride
  int n = 0;

  // False if a page of tokens [begin, end) is not in the cache.
  bool locate(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end) {
    n = 0;
    const int32_t* table = call.block_table + item.sequence * call.block_table_stride[0];
    for (int64_t t = begin; t < end;) {
      const int64_t index = t / call.page_size, first = t - index * call.page_size;
      const int64_t page = table[index * call.block_table_stride[1]];
      if (page < 0 || page >= call.n_pages) return false;
      const int64_t last = first + (end - t) < call.page_size ? first + (end - t) : call.page_size;
      put(call, page, item.kv_head, first, last);
      t += last - first;
    }
    return true;
  }

  // Rows that are not read in place become elements in `memory`, [N, Row::elements].
  void decode(T* memory) {
    if constexpr (!Row::in_place) {
      for (int i = 0; i < n; i++) {
        T* row = memory + i * Row::elements;
        Row::decode(this->stored[i], row);
        kv[i] = row, page_end[i] = n;
      }
    }
  }

  // Repeats the last token's addresses up to a multiple of `tokens`, which divides N.
  void pad(int tokens) {
    for (int i = n; i % tokens; i++) kv[i] = kv[n - 1], k[i] = k[n - 1];
  }

  // Where row i lies in the cache.
  const typename Row::Stored* address(int i) const {
    if constexpr (Row::in_place) {
      return kv[i];
    } else {
      return this->stored[i];
    }
  }

private:
  // Tokens [first, last) of a page.
  void put(const FlashmlaDecode& call, int64_t page, int64_t head, int64_t first, int64_t last) {
    const typename Row::Stored* kv_page = at<typename Row::Stored>(call.kv, page, head);
    const int end_of_page = n + int(last - first);
    if constexpr (Row::in_place) {
      const T* k_page = at<T>(call.k, page, head);
      for (int64_t i = first; i < last; i++, n++) {
        page_end[n] = end_of_page;
        kv[n] = kv_page + i * call.kv.token_stride;
        k[n] = k_page + i * call.k.token_stride;
      }
    } else {
      for (int64_t i = first; i < last; i++, n++) this->stored[n] = kv_page + i * call.kv.token_stride, k[n] = nullptr;
    }
  }
  template <class Stored>
  static const Stored* at(const FlashmlaCache& cache, int64_t page, int64_t head) {
    return static_cast<const Stored*>(cache.data) + page * cache.page_stride + head * cache.head_stride;
  }
};

// Elements from one row to the next where tiles read them.
template <class Row>
int64_t token_stride(const FlashmlaCache& cache) {
  if constexpr (Row::in_place) {
    return cache.token_stride;
  } else {
    return Row::elements;
  }
}
// Elements of the memory in which the rows of a block of N tokens are decoded.
template <class Row, int N>
constexpr int64_t decoded_elements() {
  if constexpr (Row::in_place) {
    return 0;
  } else {
    return N * Row::elements;
  }
}

// Fetches the next block's rows into L2 while this block is being multiplied, spread evenly over `steps` calls of
// step(): at 16 heads a block is multiplied in little more time than DRAM takes to deliver the next one, and a burst of
// prefetches waits for the few line buffers of a core. One line of every 4 KB is asked for at once, so that address
// translations, which miss too where pages are scattered, are there when the rest is: reading random chunks of 32 KB on
// Zen 4 went from 38 to 42 GB/s, and from 33 to 41 with work in between.
template <class Row, int N>
class Prefetcher {
public:
  Prefetcher(const FlashmlaDecode& call, const Rows<Row, N>& rows, int64_t steps) : rows_(rows), steps_(steps) {
    if constexpr (Row::in_place) {
      kv_bytes_ = call.kv.d * int64_t{sizeof(typename Row::Stored)};
      k_bytes_ = call.k.d * int64_t{sizeof(typename Row::Stored)};
    } else {
      kv_bytes_ = Row::bytes, k_bytes_ = 0;
    }
    touch([&](int i) { return rows.address(i); }, kv_bytes_);
    touch([&](int i) { return rows.k[i]; }, k_bytes_);
  }

  void step() {
    for (due_ += rows_.n; due_ >= steps_ && row_ < rows_.n; due_ -= steps_, row_++) {
      fetch(rows_.address(row_), kv_bytes_);
      fetch(rows_.k[row_], k_bytes_);
    }
  }

private:
  template <class Address>
  void touch(Address address, int64_t bytes) const {
    if (bytes == 0) return;
    uintptr_t last = 0;
    for (int i = 0; i < rows_.n; i++) {
      const uintptr_t row = reinterpret_cast<uintptr_t>(address(i));
      for (uintptr_t at = row; at < row + bytes; at = (at | 4095) + 1) {
        if (at >> 12 == last) continue;
        last = at >> 12;
        __builtin_prefetch(reinterpret_cast<const char*>(at), 0, 2);
      }
    }
  }
  static void fetch(const void* row, int64_t bytes) {
    const char* line = static_cast<const char*>(row);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
  }

  const Rows<Row, N>& rows_;
  int64_t kv_bytes_, k_bytes_;
  const int64_t steps_;
  int64_t due_ = 0;
  int row_ = 0;
};

// Calls body(rows, first token, each) for every block of N tokens of [begin, end), whose rows tiles can read; each()
// has the next block's rows fetched, and is called about steps(tokens of the block) times. False if a page is not in
// the cache. `decoded`: memory for `decoded_elements`.
template <class Row, int N, class Steps, class Body>
__attribute__((always_inline)) inline bool for_blocks(const FlashmlaDecode& call, const Item& item, int64_t begin,
                                                      int64_t end, typename Row::Element* decoded, Steps steps,
                                                      Body body) {
  const auto last = [&](int64_t first) { return end < first + N ? end : first + N; };
  Rows<Row, N> blocks[2];
  if (!blocks[0].locate(call, item, begin, last(begin))) return false;
  int current = 0;
  for (int64_t t = begin; t < end; t += N, current ^= 1) {
    Rows<Row, N>&here = blocks[current], &ahead = blocks[current ^ 1];
    if (!ahead.locate(call, item, t + N, last(t + N))) return false;
    here.decode(decoded);
    Prefetcher<Row, N> prefetch(call, ahead, steps(here.n));
    body(here, t, [&] { prefetch.step(); });
  }
  return true;
}

inline int64_t group_size(const FlashmlaDecode& call) { return call.h_q / call.h_kv; }

// How many of the sequence's tokens query row `row` of a KV head sees (bottom-right alignment); 0 or less: none.
inline int64_t visible(const FlashmlaDecode& call, const Item& item, int64_t row) {
  return call.causal ? item.length - call.s_q + row / group_size(call) + 1 : item.length;
}

template <class T>
const T* query(const FlashmlaDecode& call, const Item& item, int64_t row) {
  const int64_t token = row / group_size(call), head = item.kv_head * group_size(call) + row % group_size(call);
  return static_cast<const T*>(call.q) + item.sequence * call.q_stride[0] + token * call.q_stride[1] +
         head * call.q_stride[2];
}

}  // namespace flashmla::FLASHMLA_ISA
