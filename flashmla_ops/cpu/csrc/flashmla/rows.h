// From tokens of a sequence to addresses of rows: the only place that reads the block table.
#pragma once

#include "flashmla/kernels.h"

namespace flashmla::FLASHMLA_ISA {

// Addresses of up to N tokens' rows in both cache tensors, for one KV head.
template <class T, int N>
struct Rows {
  const T* kv[N];
  const T* k[N];
  int page_end[N];  // the first token after this one that lies in another page
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
      const T* kv_page = at(call.kv, page, item.kv_head);
      const T* k_page = at(call.k, page, item.kv_head);
      const int end_of_page = n + int(last - first);
      for (int64_t i = first; i < last; i++, n++) {
        page_end[n] = end_of_page;
        kv[n] = kv_page + i * call.kv.token_stride;
        k[n] = k_page + i * call.k.token_stride;
      }
      t += last - first;
    }
    return true;
  }

  // Repeats the last token's addresses up to a multiple of `tokens`, which divides N.
  void pad(int tokens) {
    for (int i = n; i % tokens; i++) kv[i] = kv[n - 1], k[i] = k[n - 1];
  }

private:
  static const T* at(const FlashmlaCache& cache, int64_t page, int64_t head) {
    return static_cast<const T*>(cache.data) + page * cache.page_stride + head * cache.head_stride;
  }
};

// Fetches the next block's rows into L2 while this block is being multiplied, spread evenly over `steps` calls of
// step(): at 16 heads a block is multiplied in little more time than DRAM takes to deliver the next one, and a burst of
// prefetches waits for the few line buffers of a core. One line of every 4 KB is asked for at once, so that address
// translations, which miss too where pages are scattered, are there when the rest is: reading random chunks of 32 KB on
// Zen 4 went from 38 to 42 GB/s, and from 33 to 41 with work in between.
template <class T, int N>
class Prefetcher {
public:
  Prefetcher(const FlashmlaDecode& call, const Rows<T, N>& rows, int64_t steps)
      : rows_(rows), kv_bytes_(call.kv.d * int64_t{sizeof(T)}), k_bytes_(call.k.d * int64_t{sizeof(T)}), steps_(steps) {
    touch(rows.kv, kv_bytes_);
    touch(rows.k, k_bytes_);
  }

  void step() {
    for (due_ += rows_.n; due_ >= steps_ && row_ < rows_.n; due_ -= steps_, row_++) {
      fetch(rows_.kv[row_], kv_bytes_);
      fetch(rows_.k[row_], k_bytes_);
    }
  }

private:
  void touch(const T* const (&rows)[N], int64_t bytes) const {
    if (bytes == 0) return;
    uintptr_t last = 0;
    for (int i = 0; i < rows_.n; i++) {
      const uintptr_t row = reinterpret_cast<uintptr_t>(rows[i]);
      for (uintptr_t at = row; at < row + bytes; at = (at | 4095) + 1) {
        if (at >> 12 == last) continue;
        last = at >> 12;
        __builtin_prefetch(reinterpret_cast<const char*>(at), 0, 2);
      }
    }
  }
  static void fetch(const T* row, int64_t bytes) {
    const char* line = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
  }

  const Rows<T, N>& rows_;
  const int64_t kv_bytes_, k_bytes_, steps_;
  int64_t due_ = 0;
  int row_ = 0;
};

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
