// The C interface of the CPU kernels: plain structs, no torch, no exceptions. Whoever calls them (the torch binding,
// ctypes, a generated kernel) fills these in. Strides count elements unless a name says bytes.
#pragma once

#include <cstdint>

#define FLASHMLA_EXPORT __attribute__((visibility("default")))

extern "C" {

enum FlashmlaDType : int32_t {
  FLASHMLA_F32 = 0,
  FLASHMLA_BF16 = 1,
  FLASHMLA_F16 = 2,
  FLASHMLA_I8 = 3,
  FLASHMLA_I4 = 4  // eight in a dword
};

enum FlashmlaActivation : int32_t {
  FLASHMLA_NONE = 0,
  FLASHMLA_RELU = 1,
  FLASHMLA_GELU = 2,
  FLASHMLA_SILU = 3,
  FLASHMLA_SILU_MUL = 4  // silu(first half of the columns) * second half
};

// A paged cache tensor [n_pages, page_size, h_kv, d] whose last dimension is contiguous.
struct FlashmlaCache {
  const void* data;
  int64_t page_stride, token_stride, head_stride;
  int64_t d;
};

struct FlashmlaDecode {
  const char* op;  // the operator that was called: it names itself in messages
  FlashmlaDType dtype;
  int32_t causal;
  int64_t b, s_q, h_q, h_kv, d_qk, d_v, qk_start;
  float softmax_scale;
  float softcap;            // scaled scores become softcap * tanh(score / softcap); 0: they stay
  int64_t window;           // a query sees the last so many of the tokens that it would see without; 0: all
  int32_t levels;           // 1: whole rows of scores; 2: blocks; 3: blocks, and sequences cut into parts
  int32_t batch_invariant;  // results of a sequence are the same bits in every batch, on any number of threads
  int32_t row_format;  // 0: elements of `dtype`; else a number of flashmla/formats.h, and strides of kv count bytes

  const void* q;  // [b, s_q, h_q, d_qk]
  int64_t q_stride[4];
  // Or else null. Sequence i has the query tokens [cu_seqlens_q[i], cu_seqlens_q[i + 1]) of t_q; then s_q does not
  // count, nor do the first strides of q, out and lse.
  const int32_t* cu_seqlens_q;  // [b + 1]
  int64_t cu_seqlens_q_stride, t_q;

  FlashmlaCache kv;  // rows hold the value at [0, d_v) and the key, or its first part, at [qk_start, d)
  FlashmlaCache k;   // the rest of the key; data is null and d is 0 where there is none
  int64_t n_pages, page_size;

  const int32_t* block_table;  // [b, max_pages]
  int64_t block_table_stride[2], max_pages;
  const int32_t* cache_seqlens;  // [b]
  int64_t cache_seqlens_stride;
  const float* attn_sink;  // [h_q] or null
  int64_t attn_sink_stride;

  void* out;  // [b, s_q, h_q, d_v], last dimension contiguous
  int64_t out_stride[3];
  float* lse;  // [b, h_q, s_q]
  int64_t lse_stride[3];
  float* max_logits;  // the largest scaled score, with lse's strides; or null
};

// Rows that are named one by one: slots of a cache, page * page_size + offset. Whatever is no slot is skipped.
struct FlashmlaSource {
  FlashmlaCache kv, k;
  int32_t row_format;
  int64_t n_pages, page_size;
  const int32_t* indices;  // [b, s_q, h_kv, topk]
  int64_t indices_stride[4], topk;
  const int32_t* topk_length;  // [b, s_q]: how many indices count, the first ones; or null
  int64_t topk_length_stride[2];
};

// Attention of query tokens over rows of one or two sources, in one softmax.
struct FlashmlaSparse {
  FlashmlaDecode attention;  // but for what says where rows are
  FlashmlaSource sources[2];
  int32_t n_sources;
  int32_t batch_invariant;  // cuts are those of a query token's own rows
};

// Sequences lie one after another: sequence i has query tokens [cu_seqlens_q[i], cu_seqlens_q[i + 1]), keys likewise.
struct FlashmlaPrefill {
  FlashmlaDType dtype;
  int32_t causal;
  int64_t b, h_q, h_kv, d_qk, d_v, t_q, t_k;
  float softmax_scale, softcap;
  int64_t window;
  int32_t levels;  // 1: whole rows of scores; 2: blocks; 3: blocks, and long sequences of few queries cut into parts
  const void* q;   // [t_q, h_q, d_qk]
  int64_t q_stride[3];
  const void *k, *v;  // [t_k, h_kv, d_qk], [t_k, h_kv, d_v], last dimension contiguous
  int64_t k_stride[2], v_stride[2];
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [b + 1]
  int64_t cu_seqlens_q_stride, cu_seqlens_k_stride;
  const float* attn_sink;  // [h_q] or null
  int64_t attn_sink_stride;
  void* out;   // [t_q, h_q, d_v], contiguous
  float* lse;  // [h_q, t_q], contiguous
};

// What the gradients of attention are computed from, beside its arguments, and where those of queries go. Strides of
// tensors that are read are of all their dimensions.
struct FlashmlaGradients {
  const void *out, *dout;  // [b, s_q, h_q, d_v]: what attention returned, and the gradient with respect to it
  int64_t out_stride[4], dout_stride[4];
  const float *lse, *dlse;  // [b, h_q, s_q], likewise; dlse may be null
  int64_t lse_stride[3], dlse_stride[3];
  void* dq;  // [b, s_q, h_q, d_qk], last dimension contiguous; null: not wanted
  int64_t dq_stride[3];
  float* dsink;  // [b, h_q, s_q]: each row's part of the gradient of attn_sink; null: not wanted
  int64_t dsink_stride[3];
};

struct FlashmlaPrefillBackward {
  FlashmlaPrefill attention;    // but for its results
  FlashmlaGradients gradients;  // b counts as 1 in all strides
  void *dk, *dv;                // [t_k, h_kv, d_qk], [t_k, h_kv, d_v], contiguous; either null: not wanted
};

struct FlashmlaDecodeBackward {
  FlashmlaDecode attention;     // but for its results; rows are native
  FlashmlaGradients gradients;  // all first strides are 0 where sequences are ragged
  void *dkv_cache, *dk_cache;   // as the caches, but contiguous; either null: not wanted
};

// As a source's kv and k, but contiguous; either null: not wanted. Rows of bytes have none.
struct FlashmlaRowGradients {
  void *dkv, *dk;
};

struct FlashmlaSparseBackward {
  FlashmlaSparse attention;  // but for its results
  FlashmlaGradients gradients;
  FlashmlaRowGradients rows[2];  // of each source
};

// rows [n, h_kv, d] are written to slots of a cache; bytes, not elements: the copy knows no dtype.
struct FlashmlaAppend {
  char* cache;
  const char* rows;
  int64_t page_bytes, token_bytes, head_bytes;       // strides of the cache
  int64_t row_bytes, row_head_bytes, element_bytes;  // strides of rows; element_bytes between neighbours in a row
  int64_t h_kv, d, element_size, n_pages, page_size;
};

struct FlashmlaMerge {
  FlashmlaDType dtype;
  int64_t parts, b, s_q, h_q, d_v;
  const void* const* outs;     // parts tensors [b, s_q, h_q, d_v]
  const int64_t* out_strides;  // [parts][4]
  const float* const* lses;    // parts tensors [b, h_q, s_q]
  const int64_t* lse_strides;  // [parts][3]
  void* out;                   // contiguous
  float* lse;                  // contiguous
};

// out [m, n] = activation(a [m, k] weight [n, k]^T * weight_scale + bias) + residual, for few rows m: what a decode
// step is made of. With SILU_MUL, n counts the columns of out, and weight, weight_scale and bias have 2 n rows.
struct FlashmlaGemm {
  FlashmlaDType a_dtype, weight_dtype, out_dtype;
  FlashmlaActivation activation;
  int64_t m, n, k;
  const void* a;
  int64_t a_stride;  // between rows; the last dimension is contiguous, here and below
  const void* weight;
  int64_t weight_stride;      // unless in panels: between rows
  int weight_panels;          // weight is [n / 16, k, 16], contiguous: 16 rows at a time, transposed; int4 always
  int64_t weight_groups;      // of int4 weights: into how many parts of one scale k is divided
  const void* group_scale;    // of int4 weights: [n / 16, weight_groups, 16], contiguous
  FlashmlaDType group_dtype;  // of those: float32 or bfloat16
  const float* weight_scale;  // a factor for each row of weight, or null
  const void* bias;           // of a's type, or null
  const void* residual;       // [m, n] of out's type, or null
  int64_t residual_stride;
  void* out;
  int64_t out_stride;
};

// For each i < batch: out [m, n] = a [m, k] weight [k, n], where weight is contiguous along k or along n.
struct FlashmlaBmm {
  FlashmlaDType dtype;
  int64_t batch, m, n, k;
  const void* a;
  int64_t a_stride[2];  // of batch and m
  const void* weight;
  int64_t weight_stride[3];
  int32_t weight_along_k;
  void* out;
  int64_t out_stride[2];
};

// The weights that a decode call's results are multiplied with: out[.., head, :] = attended[.., head, :] weight[head].
struct FlashmlaUp {
  const void* weight;  // [h_q, d_v, d_up], of the query's type
  int64_t weight_stride[3];
  int32_t weight_along_k;  // contiguous along d_v; else along d_up
  int64_t d_up;
  void* out;  // [b, s_q, h_q, d_up], contiguous
};

// Summaries of pages (flashmla/summaries.h) [n_pages, h_kv, bytes].
struct FlashmlaSummaries {
  char* data;
  int64_t page_stride, head_stride;
  int32_t kind;         // a SummaryKind
  const float* planes;  // [d_key, 128], or null
  int64_t planes_stride[2];
};

// The keys of a paged cache, as in FlashmlaDecode.
struct FlashmlaKeys {
  FlashmlaDType dtype;
  FlashmlaCache kv, k;
  int64_t qk_start, h_kv, n_pages, page_size;
};

// What is always attended to: so many first and last pages, and all of a shorter sequence.
struct FlashmlaAlways {
  int64_t sink_pages, local_pages, min_context;
};

struct FlashmlaPageMass {
  FlashmlaKeys keys;
  FlashmlaSummaries summaries;
  FlashmlaAlways always;
  int64_t b, s_q, h_q, d_qk;
  float softmax_scale;
  const void* q;  // [b, s_q, h_q, d_qk]
  int64_t q_stride[4];
  const int32_t* block_table;  // [b, max_pages]
  int64_t block_table_stride[2], max_pages;
  const int32_t* cache_seqlens;  // [b]
  int64_t cache_seqlens_stride;
  float *mass, *slack;  // [b, h_q, s_q, max_pages], contiguous
};

enum FlashmlaRule : int32_t { FLASHMLA_CERTIFIED = 0, FLASHMLA_SHARE = 1, FLASHMLA_FRACTION = 2, FLASHMLA_MASK = 3 };

struct FlashmlaChoosePages {
  FlashmlaRule rule;
  FlashmlaAlways always;
  double limit;
  int64_t b, s_q, h_q, h_kv, page_size, page_step, head_step, max_pages;
  const float *mass, *slack;  // [b, h_q, s_q, max_pages]
  int64_t mass_stride[4], slack_stride[4];
  const int32_t* block_table;
  int64_t block_table_stride[2];
  const int32_t* cache_seqlens;
  int64_t cache_seqlens_stride;
  int32_t *pages, *lengths;  // [b * h_kv, max_pages] and [b * h_kv], contiguous
  float* residue;            // [b, h_q, s_q], contiguous
};

// Runs body(begin, end, context) over [0, n) on the caller's threads.
typedef void (*FlashmlaBody)(int64_t begin, int64_t end, void* context);
typedef void (*FlashmlaParallel)(int64_t n, FlashmlaBody body, void* context);

struct FlashmlaRuntime {
  int64_t num_threads;
  FlashmlaParallel parallel;
};

enum {
  FLASHMLA_PANEL = 16,       // rows of weight in a panel of a gemm
  FLASHMLA_INT4S = 8,        // int4 weights in a dword
  FLASHMLA_MESSAGE = 512,    // bytes of an error message, the final zero included
  FLASHMLA_SMALL_ROWS = 32,  // more rows than this are left to a general product
  FLASHMLA_MAX_PARTS = 1024  // parts of a schedule, and states of one merge: their factors lie on the stack
};

// Each returns 0, or 1 with the reason in message[FLASHMLA_MESSAGE].
FLASHMLA_EXPORT int flashmla_decode_schedule(const int32_t* cache_seqlens, int64_t stride, int64_t b, int64_t s_q,
                                             int64_t h_q, int64_t h_kv, int64_t num_parts, int32_t* schedule,
                                             char* message);
FLASHMLA_EXPORT int flashmla_decode(const FlashmlaDecode* call, const int32_t* schedule, int64_t schedule_numel,
                                    const FlashmlaRuntime* runtime, char* message);
// The attention's own out is not used: what is attended to stays in memory of the thread that calls.
FLASHMLA_EXPORT int flashmla_decode_up(const FlashmlaDecode* attention, const FlashmlaUp* up, const int32_t* schedule,
                                       int64_t schedule_numel, const FlashmlaRuntime* runtime, char* message);
FLASHMLA_EXPORT int flashmla_prefill(const FlashmlaPrefill* call, const FlashmlaRuntime* runtime, char* message);
FLASHMLA_EXPORT int flashmla_prefill_backward(const FlashmlaPrefillBackward* call, const FlashmlaRuntime* runtime,
                                              char* message);
FLASHMLA_EXPORT int flashmla_decode_backward(const FlashmlaDecodeBackward* call, const FlashmlaRuntime* runtime,
                                             char* message);
FLASHMLA_EXPORT int flashmla_sparse_backward(const FlashmlaSparseBackward* call, const FlashmlaRuntime* runtime,
                                             char* message);
FLASHMLA_EXPORT int flashmla_sparse(const FlashmlaSparse* call, const FlashmlaRuntime* runtime, char* message);
FLASHMLA_EXPORT int flashmla_append(const FlashmlaAppend* tensors, int64_t n_tensors, const int64_t* slots,
                                    int64_t slot_stride, int64_t n, const FlashmlaRuntime* runtime, char* message);
FLASHMLA_EXPORT int flashmla_merge_states(const FlashmlaMerge* call, const FlashmlaRuntime* runtime, char* message);

// The pages whose last slot is among the given ones.
FLASHMLA_EXPORT int flashmla_summarize(const FlashmlaKeys* keys, const FlashmlaSummaries* summaries,
                                       const int64_t* slots, int64_t slot_stride, int64_t n,
                                       const FlashmlaRuntime* runtime, char* message);
FLASHMLA_EXPORT int flashmla_page_mass(const FlashmlaPageMass* call, const FlashmlaRuntime* runtime, char* message);
FLASHMLA_EXPORT int flashmla_choose_pages(const FlashmlaChoosePages* call, const FlashmlaRuntime* runtime,
                                          char* message);

FLASHMLA_EXPORT int flashmla_gemm(const FlashmlaGemm* call, const FlashmlaRuntime* runtime, char* message);
// Whether a general product of this type is fast here. Where not, widening to float32 first is: without an instruction
// for them, torch multiplies 16-bit types about ten times slower.
FLASHMLA_EXPORT int flashmla_multiplies(FlashmlaDType dtype);
// The epilogue alone, over the product a weight^T [m, rows of weight], contiguous.
FLASHMLA_EXPORT int flashmla_gemm_epilogue(const FlashmlaGemm* call, const void* product, FlashmlaDType product_dtype,
                                           const FlashmlaRuntime* runtime, char* message);
FLASHMLA_EXPORT int flashmla_bmm(const FlashmlaBmm* call, const FlashmlaRuntime* runtime, char* message);

// Bytes of intermediate results at their peak, all threads together: of scores (which become weights), of packed
// queries and staged rows, and of outputs that are not finished.
struct FlashmlaFootprint {
  int64_t scores, copies, outputs;
};
FLASHMLA_EXPORT void flashmla_decode_footprint(const FlashmlaDecode* call, int64_t num_threads,
                                               FlashmlaFootprint* footprint);
FLASHMLA_EXPORT void flashmla_prefill_footprint(const FlashmlaPrefill* call, int64_t num_threads,
                                                FlashmlaFootprint* footprint);

FLASHMLA_EXPORT int64_t flashmla_schedule_numel(int64_t b, int64_t num_parts);

// The instruction sets that there are kernels for, the fastest on this processor first, and whether it runs one. Names
// end with null. A library of its own has these two as well, so that they can be asked before anything else is
// compiled.
FLASHMLA_EXPORT const char* const* flashmla_isa_names(void);
FLASHMLA_EXPORT int flashmla_isa_supported(const char* name);
// The kernels in a library of one instruction set, and their use by all operators from now on. Returns 1, and changes
// nothing, if this processor cannot run them.
FLASHMLA_EXPORT const void* flashmla_kernels(void);
FLASHMLA_EXPORT int flashmla_use(const void* kernels);

}  // extern "C"
