// The parts of a generated decode kernel: the library's kernels compiled for the processor that Inductor compiles
// for, with one element type, and with a function that is called for each finished row.
#pragma once

#include "flashmla/isa/emulated.h"
#if defined(__AVX512F__)
#include "flashmla/isa/avx512.h"
#endif
#if defined(__AVX2__)
#include "flashmla/isa/avx2.h"
#endif

#include <omp.h>

#include <stdexcept>

#include "flashmla/attend.h"
#include "flashmla/decode.h"
#include "flashmla/finish.h"

namespace flashmla::FLASHMLA_ISA {
namespace {

// FLASHMLA_ON_<name> names the kernels that the library runs here; the flags may allow for more.
#if defined(FLASHMLA_ON_emulated)
using Isa = Emulated;
#elif defined(FLASHMLA_ON_generic)
using Isa = Portable<4, false>;
#elif defined(__AVX512BF16__) && defined(FLASHMLA_ON_avx512_bf16)
using Isa = Avx512<true>;
#elif defined(__AVX512F__) && !defined(FLASHMLA_ON_avx2)
using Isa = Avx512<false>;
#elif defined(__AVX2__)
using Isa = Avx2;
#else
using Isa = Portable<4, false>;
#endif

// Kernels for rows of T. RowDone(b, s_q, h_q, row) gets every row of the result, rounded to T as the operator returns
// it, as soon as it is complete; rows of one call come from several threads at once.
template <class T, int64_t D_V, class RowDone>
class GeneratedDecode {
public:
  GeneratedDecode(const FlashmlaDecode& call, const RowDone& row_done) : call_{call, row_done} {}

  // Throws std::runtime_error with the operator's message.
  void run(const int32_t* schedule, int64_t schedule_numel) const {
    Kernels kernels{};
    static_cast<AttentionKernels&>(kernels) = {
        .accumulator_stride = [](int64_t d_v) { return round_up(d_v, Isa::W) + 16; },
        .scratch_bytes = attention_scratch<Isa, T, NativeRow<T>>,
        .attend = attend_tokens<Isa, T, NativeRow<T>>,
        .finish = finish,
        .merge = nullptr};
    kernels.name = "generated";
    char message[FLASHMLA_MESSAGE];
    const FlashmlaRuntime runtime{omp_get_max_threads(), parallel};
    if (decode(kernels, call_, schedule, schedule_numel, runtime, message)) throw std::runtime_error(message);
  }

private:
  struct Call : FlashmlaDecode {
    const RowDone& row_done;
  };

  static void finish(const FlashmlaDecode& call, const Item& item, const Accumulator* parts, int64_t n, int64_t begin,
                     int64_t end) {
    alignas(64) T row[D_V];
    float lse;
    FlashmlaDecode one = call;  // whose every row goes to the same place
    one.out = row, one.out_stride[0] = one.out_stride[1] = one.out_stride[2] = 0;
    one.lse = &lse, one.lse_stride[0] = one.lse_stride[1] = one.lse_stride[2] = 0;
    for (int64_t r = begin; r < end; r++) {
      finish_rows<Isa, T>(one, item, parts, n, r, r + 1);
      const int64_t token = (item.row + r) / group_size(call), in_group = (item.row + r) % group_size(call);
      static_cast<const Call&>(call).row_done(item.sequence, token, item.kv_head * group_size(call) + in_group,
                                              static_cast<const T*>(row));
    }
  }
  // body(begin, end) over [0, n), in one piece for each thread.
  static void parallel(int64_t n, FlashmlaBody body, void* context) {
    const int64_t threads = std::min<int64_t>(n, omp_get_max_threads());
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < threads; i++) body(n * i / threads, n * (i + 1) / threads, context);
  }

  const Call call_;
};

}  // namespace
}  // namespace flashmla::FLASHMLA_ISA
