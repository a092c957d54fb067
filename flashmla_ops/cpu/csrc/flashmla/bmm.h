// The per-head products around absorbed attention: q_nope W_UK (weight rows are contiguous along n) and out W_UV^T
// (along k).
#pragma once

#include "flashmla/gemm.h"

namespace flashmla::FLASHMLA_ISA {

// Rows of one batch entry. The product along k is a gemm; along n, four weight rows at a time are added to rows of out
// held in fp32, so that weights are read in the order they lie in.
template <class Isa, class T>
class Bmm {
  using F = typename Isa::F;
  using AlongK = Gemm<Isa, T, Isa::pairs && std::is_same_v<T, bf16>>;
  static constexpr int kColumns = 512;  // of out, in fp32: 2 KB a row

public:
  explicit Bmm(const FlashmlaBmm& call) : call_(call) {}

  // Scratch of one thread.
  static int64_t scratch_bytes(const FlashmlaBmm& call) {
    const FlashmlaGemm gemm = along_k(call, 0);
    return AlongK::packed_bytes(gemm);
  }

  void run(int64_t index, char* scratch) const {
    if (call_.weight_along_k) {
      const FlashmlaGemm gemm = along_k(call_, index);
      const AlongK product(gemm);
      for (int64_t m = 0; m < call_.m; m += kGemmRows) {
        const int64_t rows = call_.m - m < kGemmRows ? call_.m - m : kGemmRows;
        product.template pack<T>(m, rows, scratch);
        product.run(m, rows, scratch, 0, call_.n);
      }
    } else {
      for (int64_t n = 0; n < call_.n; n += kColumns) {
        const int64_t columns = call_.n - n < kColumns ? call_.n - n : kColumns;
        for (int64_t m = 0; m < call_.m; m += 4) rows_along_n(index, m, call_.m - m < 4 ? call_.m - m : 4, n, columns);
      }
    }
  }

private:
  static FlashmlaGemm along_k(const FlashmlaBmm& call, int64_t index) {
    FlashmlaGemm gemm{};
    gemm.a_dtype = gemm.weight_dtype = gemm.out_dtype = call.dtype;
    gemm.m = call.m, gemm.n = call.n, gemm.k = call.k;
    gemm.a = static_cast<const T*>(call.a) + index * call.a_stride[0], gemm.a_stride = call.a_stride[1];
    gemm.weight = static_cast<const T*>(call.weight) + index * call.weight_stride[0];
    gemm.weight_stride = call.weight_stride[2];
    gemm.out = static_cast<T*>(call.out) + index * call.out_stride[0], gemm.out_stride = call.out_stride[1];
    return gemm;
  }

  void rows_along_n(int64_t index, int64_t m0, int64_t rows, int64_t n, int64_t columns) const {
    float sums[4][kColumns] = {};
    const T* a = static_cast<const T*>(call_.a) + index * call_.a_stride[0] + m0 * call_.a_stride[1];
    const T* weight = static_cast<const T*>(call_.weight) + index * call_.weight_stride[0] + n;
    for (int64_t k = 0; k < call_.k; k += 4) {
      const int64_t depth = call_.k - k < 4 ? call_.k - k : 4;
      const T* w[4];
      for (int64_t d = 0; d < 4; d++) w[d] = weight + (k + (d < depth ? d : 0)) * call_.weight_stride[1];
      for (int64_t m = 0; m < rows; m++) {
        float x[4];
        for (int64_t d = 0; d < 4; d++) x[d] = d < depth ? to_float(a[m * call_.a_stride[1] + k + d]) : 0;
        add_rows(sums[m], w, x, depth, columns, m == 0);
      }
    }
    for (int64_t m = 0; m < rows; m++) {
      T* out = static_cast<T*>(call_.out) + index * call_.out_stride[0] + (m0 + m) * call_.out_stride[1] + n;
      int64_t i = 0;
      for (; i + Isa::W <= columns; i += Isa::W) Isa::store(out + i, Isa::load(sums[m] + i));
      for (; i < columns; i++) from_float(sums[m][i], out[i]);
    }
  }
  void add_rows(float* sums, const T* const (&w)[4], const float (&x)[4], int64_t depth, int64_t columns,
                bool fetch) const {
    int64_t i = 0;
    if (depth == 4) {
      const F x0 = Isa::set1(x[0]), x1 = Isa::set1(x[1]), x2 = Isa::set1(x[2]), x3 = Isa::set1(x[3]);
      const int64_t next = 4 * call_.weight_stride[1];
      for (; i + Isa::W <= columns; i += Isa::W) {
        if (fetch && i * int64_t{sizeof(T)} % 64 == 0) {  // rows are short: the processor has no time to see a stream
          for (int d = 0; d < 4; d++) __builtin_prefetch(w[d] + i + next);
        }
        F s = Isa::fma(Isa::load(w[0] + i), x0, Isa::load(sums + i));
        s = Isa::fma(Isa::load(w[1] + i), x1, s);
        s = Isa::fma(Isa::load(w[2] + i), x2, s);
        Isa::store(sums + i, Isa::fma(Isa::load(w[3] + i), x3, s));
      }
    }
    for (; i < columns; i++) {
      for (int64_t d = 0; d < depth; d++) sums[i] += to_float(w[d][i]) * x[d];
    }
  }

  const FlashmlaBmm& call_;
};

}  // namespace flashmla::FLASHMLA_ISA
