// Compiled once for each instruction set, with -DFLASHMLA_ISA=<name> and that set's compiler flags. Everything here is
// in a namespace of that name, and nothing here may instantiate a function that another translation unit could share
// (standard containers, for one): the linker would keep one copy, possibly one with instructions the processor lacks.
#define FLASHMLA_CONCAT_(a, b) a##b
#define FLASHMLA_CONCAT(a, b) FLASHMLA_CONCAT_(a, b)
#define FLASHMLA_STRING_(a) #a
#define FLASHMLA_STRING(a) FLASHMLA_STRING_(a)

#include "flashmla/attend_dot.h"
#include "flashmla/attend_lanes.h"
#include "flashmla/finish.h"
#if defined(__AVX512F__)
#include "flashmla/isa/avx512.h"
#elif defined(__AVX2__)
#include "flashmla/isa/avx2.h"
#else
#include "flashmla/isa/emulated.h"
#endif

namespace flashmla {
namespace FLASHMLA_ISA {
namespace {

#if defined(__AVX512BF16__)
using Isa = Avx512<true>;
#elif defined(__AVX512F__)
using Isa = Avx512<false>;
#elif defined(__AVX2__)
using Isa = Avx2;
#elif defined(FLASHMLA_EMULATE)
using Isa = Emulated;
#else
using Isa = Portable<4, false>;
#endif

template <template <class, class> class F, class... Args>
auto for_dtype(FlashmlaDType dtype, Args&&... args) {
  switch (dtype) {
    case FLASHMLA_F32:
      return F<Isa, float>::call(args...);
    case FLASHMLA_BF16:
      return F<Isa, bf16>::call(args...);
    default:
      return F<Isa, f16>::call(args...);
  }
}

template <class I, class T>
struct ScratchBytes {
  static int64_t call(const FlashmlaDecode& call, int64_t rows) {
    const int64_t lanes = LaneAttention<I, T>::scratch_bytes(call, rows);
    const int64_t dot = DotAttention<I, T>::scratch_bytes(call, DotAttention<I, T>::kMaxRows);
    return lanes > dot ? lanes : dot;
  }
};

template <class I, class T>
struct Attend {
  static bool call(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end, const Accumulator& into,
                   char* scratch, Fault& fault) {
    if (item.rows <= DotAttention<I, T>::kMaxRows)
      return DotAttention<I, T>(call, item, into, scratch).run(begin, end, fault);
    return LaneAttention<I, T>(call, item, into, scratch).run(begin, end, fault);
  }
};

template <class I, class T>
struct Finish {
  static void call(const FlashmlaDecode& call, const Item& item, const Accumulator* parts, int64_t n, int64_t begin,
                   int64_t end) {
    finish_rows<I, T>(call, item, parts, n, begin, end);
  }
};

template <class I, class T>
struct Merge {
  static void call(const FlashmlaMerge& call, int64_t begin, int64_t end) { merge_rows<I, T>(call, begin, end); }
};

// One vector more than the columns need: rows of 2048 bytes would all fall into the same few sets of L1.
int64_t accumulator_stride(int64_t d_v) { return round_up(d_v, Isa::W) + 16; }
int64_t scratch_bytes(const FlashmlaDecode& call, int64_t rows) {
  return for_dtype<ScratchBytes>(call.dtype, call, rows);
}
bool attend(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end, const Accumulator& into,
            char* scratch, Fault& fault) {
  return for_dtype<Attend>(call.dtype, call, item, begin, end, into, scratch, fault);
}
void finish(const FlashmlaDecode& call, const Item& item, const Accumulator* parts, int64_t n, int64_t begin,
            int64_t end) {
  for_dtype<Finish>(call.dtype, call, item, parts, n, begin, end);
}
void merge(const FlashmlaMerge& call, int64_t begin, int64_t end) { for_dtype<Merge>(call.dtype, call, begin, end); }

}  // namespace
}  // namespace FLASHMLA_ISA

const Kernels FLASHMLA_CONCAT(kernels_,
                              FLASHMLA_ISA) = {FLASHMLA_STRING(FLASHMLA_ISA), FLASHMLA_ISA::accumulator_stride,
                                               FLASHMLA_ISA::scratch_bytes,   FLASHMLA_ISA::attend,
                                               FLASHMLA_ISA::finish,          FLASHMLA_ISA::merge};

}  // namespace flashmla
