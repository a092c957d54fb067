// From tokens of a sequence to rows that tiles read: the only place that reads the block table and knows row formats.
#pragma once

#include "flashmla/kernels.h"

namespace flashmla::FLASHMLA_ISA {

// A row format: what lies in a cache (Stored), and the elements that tiles read (Element). Rows that are read in place
// are both.
template <class T>
struct NativeRow {
  using Element = T;
  using Stored = T;
  static constexpr bool in_place = true;
};
// Rows of bytes, of the format that a call names; a block of them becomes elements of E at a time. One type for all
// formats, so that the kernels are compiled once for them.
template <class E>
struct QuantizedRow {
  using Element = E;
  using Stored = uint8_t;
  static constexpr bool in_place = false;
};

// How rows of a format become elements, [n, elements of a row]. `tails`: where the last `tail` bytes of each row lie,
// if a page holds them apart.
template <class E>
struct Decoder {
  int64_t bytes, tail;
  void (*decode)(const uint8_t* const* rows, const uint8_t* const* tails, int n, E* to);
};
// Of a format by its number. Defined in decode_rows.h, for those who decode any.
template <class E>
Decoder<E> decoder(int32_t row_format);

// Where rows of N tokens lie in the cache, beside where tiles read them; nothing where that is the same.
template <class Row, int N, bool IN_PLACE = Row::in_place>
struct StoredRows {
  const typename Row::Stored *stored[N], *tails[N];
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

  // The tokens [begin, end) of the item's slots, or else of its pages. False if a page is not in the cache.
  bool locate(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end) {
    n = 0;
    if (item.slots != nullptr) {
      locate_slots(call, item, begin, end);
      return true;
    }
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

  // Rows that are not read in place become elements in `memory`, [N, elements of a row].
  void decode(const FlashmlaDecode& call, T* memory) {
    if constexpr (!Row::in_place) {
      decoder<T>(call.row_format).decode(this->stored, this->tails, n, memory);
      for (int i = 0; i < n; i++) kv[i] = memory + i * call.kv.d, page_end[i] = n;
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
  // Slots that follow one another in a page are put as one piece: tiles read them in place.
  void locate_slots(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      const int64_t page = item.slots[t] / call.page_size, first = item.slots[t] - page * call.page_size;
      int64_t last = first + 1, next = t + 1;
      while (next < end && last < call.page_size && item.slots[next] == int64_t{item.slots[next - 1]} + 1)
        next++, last++;
      put(call, page, item.kv_head, first, last);
      t = next;
    }
  }

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
      const int64_t tail = decoder<T>(call.row_format).tail;
      const uint8_t* tails = kv_page + call.page_size * call.kv.token_stride;
      for (int64_t i = first; i < last; i++, n++) {
        this->stored[n] = kv_page + i * call.kv.token_stride, this->tails[n] = tails + i * tail, k[n] = nullptr;
      }
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
  return Row::in_place ? cache.token_stride : cache.d;
}
// Elements of the memory in which the rows of a block of N tokens are decoded.
template <class Row, int N>
int64_t decoded_elements(const FlashmlaCache& cache) {
  return Row::in_place ? 0 : N * cache.d;
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
      const auto format = decoder<typename Row::Element>(call.row_format);
      kv_bytes_ = format.bytes - format.tail, k_bytes_ = 0, tail_ = format.tail;
    }
    touch([&](int i) { return rows.address(i); }, kv_bytes_);
    touch([&](int i) { return rows.k[i]; }, k_bytes_);
  }

  void step() {
    for (due_ += rows_.n; due_ >= steps_ && row_ < rows_.n; due_ -= steps_, row_++) {
      fetch(rows_.address(row_), kv_bytes_);
      fetch(rows_.k[row_], k_bytes_);
      if constexpr (!Row::in_place) fetch(rows_.tails[row_], tail_);
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
  int64_t kv_bytes_, k_bytes_, tail_ = 0;
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
    here.decode(call, decoded);
    Prefetcher<Row, N> prefetch(call, ahead, steps(here.n));
    body(here, t, [&] { prefetch.step(); });
  }
  return true;
}

template <class T>
const T* query(const FlashmlaDecode& call, const Item& item, int64_t row) {
  const int64_t token = row / group_size(call), head = item.kv_head * group_size(call) + row % group_size(call);
  return static_cast<const T*>(call.q) + item.sequence * call.q_stride[0] + token * call.q_stride[1] +
         head * call.q_stride[2];
}

}  // namespace flashmla::FLASHMLA_ISA
