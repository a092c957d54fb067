// The kernels of one instruction set: a table, which the library of that set hands out (kernels.cpp).
#pragma once

#include "flashmla/interface.h"

namespace flashmla {

// Query rows [row, row + rows) of one (sequence, KV head). Row r is query token r / group, head r % group of the group.
struct Item {
  int64_t sequence, kv_head, row, rows;
  int64_t length;  // tokens of the sequence
  // The tokens' slots in the cache, page * page_size + offset, each within it; null: they lie in the sequence's pages.
  const int32_t* slots = nullptr;
};

inline int64_t group_size(const FlashmlaDecode& call) { return call.h_q / call.h_kv; }

// The tokens [begin, end) of a sequence.
struct Tokens {
  int64_t begin, end;
};
// The gradients of query tokens from `begin` on, of sequences that lie one after another.
inline FlashmlaGradients gradients_from(FlashmlaGradients all, FlashmlaDType dtype, int64_t begin) {
  const int64_t size = dtype == FLASHMLA_F32 ? 4 : 2;
  all.out = static_cast<const char*>(all.out) + begin * all.out_stride[1] * size;
  all.dout = static_cast<const char*>(all.dout) + begin * all.dout_stride[1] * size;
  all.lse += begin * all.lse_stride[2];
  if (all.dlse) all.dlse += begin * all.dlse_stride[2];
  if (all.dsink) all.dsink += begin * all.dsink_stride[2];
  if (all.dq) all.dq = static_cast<char*>(all.dq) + begin * all.dq_stride[1] * size;
  return all;
}

// Those that query row `row` of a KV head sees (bottom-right alignment). `end` is 0 or less where it sees none.
inline Tokens visible(const FlashmlaDecode& call, const Item& item, int64_t row) {
  const int64_t end = call.causal ? item.length - call.s_q + row / group_size(call) + 1 : item.length;
  return {call.window && end > call.window ? end - call.window : 0, end};
}

// Unnormalised results of an item over some of its tokens: softmax weights are 2^(score - m), l is their sum.
struct Accumulator {
  float* o;        // [rows, stride]
  float *m, *l;    // [rows]; m is -inf where a row has seen no token
  int64_t stride;  // floats between rows of o
};

// A thread's memory for one item: packed queries and staged rows; scores, which become weights.
struct ScratchBytes {
  int64_t copies, scores;

  int64_t all() const { return copies + scores; }
};

struct AttentionKernels {
  int64_t (*accumulator_stride)(int64_t d_v);
  // The most that any item of at most item.rows rows and item.length tokens needs.
  ScratchBytes (*scratch_bytes)(const FlashmlaDecode& call, const Item& item);
  // Attend tokens [begin, end). False if the block table names a page that the cache does not have.
  bool (*attend)(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end, const Accumulator& into,
                 char* scratch);
  // Merge the item's parts and write rows [begin, end) of out and lse.
  void (*finish)(const FlashmlaDecode& call, const Item& item, const Accumulator* parts, int64_t n_parts, int64_t begin,
                 int64_t end);
  // Merge rows [begin, end) of the flattened [b, s_q, h_q].
  void (*merge)(const FlashmlaMerge& call, int64_t begin, int64_t end);
};

struct BackwardKernels {
  // The most that any item of at most item.rows rows needs.
  int64_t (*backward_scratch_bytes)(const FlashmlaDecode& call, const Item& item);
  // Gradients through an item's attention to the tokens [begin, end), which are all that it sees. Writes those of its
  // queries, and adds those of a token's row (value and key, then the rest of the key) to row t of `rows` [.., stride],
  // where t is the token, or its slot if the item has slots. Null: not wanted. False as of `attend`.
  // `more`: they are tokens of another cache, beside those of the calls before, whose scratch it is.
  bool (*backward)(const FlashmlaDecode& call, const FlashmlaGradients& gradients, const Item& item, int64_t begin,
                   int64_t end, float* rows, int64_t stride, char* scratch, bool more);
  // Writes d elements of row i < n to to + i * to_stride: the sum of all parts, whose rows are `stride` floats apart.
  void (*sum_rows)(FlashmlaDType dtype, const float* const* parts, int64_t n_parts, int64_t n, int64_t stride,
                   int64_t d, void* to, int64_t to_stride);
};

// Pages [begin, end) of the query rows of one (sequence, KV head). Row r is query token r / group, head r % group of
// the group, as in an Item.
struct PageItem {
  int64_t sequence, kv_head, length, begin, end;
};

struct SelectionKernels {
  int64_t (*page_mass_bytes)(const FlashmlaPageMass& call);
  void (*page_mass)(const FlashmlaPageMass& call, const PageItem& item, char* scratch);
  // x becomes 2^x, for x <= 0, with a relative error below 1e-6.
  void (*exponentials)(float* x, int64_t n);
};

struct ProductKernels {
  // Rows [row, row + rows) of a, as gemm_run wants them: at most gemm_rows at a time.
  int64_t (*gemm_rows)(const FlashmlaGemm& call);
  int64_t (*gemm_packed_bytes)(const FlashmlaGemm& call);
  void (*gemm_pack)(const FlashmlaGemm& call, int64_t row, int64_t rows, char* packed);
  // Columns [begin, end) of those rows of out; begin is a multiple of 16, end too if it is not n.
  void (*gemm_run)(const FlashmlaGemm& call, int64_t row, int64_t rows, const char* packed, int64_t begin, int64_t end);
  void (*gemm_epilogue)(const FlashmlaGemm& call, const void* product, FlashmlaDType dtype, int64_t begin, int64_t end);
  int64_t (*bmm_scratch_bytes)(const FlashmlaBmm& call);
  // Batch entries [begin, end).
  void (*bmm_run)(const FlashmlaBmm& call, int64_t begin, int64_t end, char* scratch);
};

struct Kernels : AttentionKernels, BackwardKernels, ProductKernels, SelectionKernels {
  const char* name;
};

}  // namespace flashmla
