// The per-head products around absorbed attention: q_nope W_UK (weight rows are contiguous along n) and out W_UV^T
// (along k).
#pragma once

#include "flashmla/gemm.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

// Batch entries one after another. The product along k is a gemm; along n it is what attention does with values: tiles
// of out stay in registers while weight rows pass by. A tile reads a few columns of every row, which no processor's
// prefetcher follows, so the first pass over an entry fetches the same columns of the next entry into L2. Measured on
// Emerald Rapids with 128 heads of 128 x 512 in bf16 and cold weights, against rows added to sums in L1: 1.8 times
// faster at 16 rows, 1.4 times at 4, but a sixth slower at 1 (21 against 24 GB/s). A tile that is a line wide fetches
// in the order of rows instead: on Zen 4, 8 to 32 rows take 4 to 15 % less time so, while wider tiles, of fewer rows,
// would take 3 to 9 % more.
template <class Isa, class T>
class Bmm {
  using M = Mac<Isa, T>;
  using Unit = typename M::Unit;
  using F = typename Isa::F;
  using AlongK = Gemm<Isa, T, M::pairs>;
  static constexpr int W = Isa::W, kPerUnit = M::pairs ? 2 : 1;
  static constexpr int kRows = Isa::pv_m, kAccumulators = Isa::pv_m * (Isa::pv_n > 2 ? 2 : Isa::pv_n);

public:
  explicit Bmm(const FlashmlaBmm& call) : call_(call), units_((call.k + kPerUnit - 1) / kPerUnit) {}

  // Scratch of one thread.
  static int64_t scratch_bytes(const FlashmlaBmm& call) {
    if (call.weight_along_k) return AlongK::Rows::bytes(call.m < AlongK::kRows ? call.m : AlongK::kRows, call.k);
    return round_up(call.m, kRows) * Bmm(call).units_ * int64_t{sizeof(Unit)};
  }

  void run(int64_t begin, int64_t end, char* scratch) const {
    for (int64_t i = begin; i < end; i++) {
      call_.weight_along_k ? run_along_k(i, scratch) : run_along_n(i, i + 1 < end, reinterpret_cast<Unit*>(scratch));
    }
  }

private:
  // Walks through the lines of an entry, row by row.
  class Lines {
  public:
    Lines(const T* entry, int64_t columns, int64_t stride)
        : row_(reinterpret_cast<const char*>(entry)), at_(row_), bytes_(columns * int64_t{sizeof(T)}),
          stride_(stride * int64_t{sizeof(T)}) {}
    __attribute__((always_inline)) void fetch() {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      if (at_ - row_ >= bytes_) at_ = row_ += stride_;
    }

  private:
    const char *row_, *at_;
    const int64_t bytes_, stride_;
  };

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
  void run_along_k(int64_t index, char* scratch) const {
    const FlashmlaGemm gemm = along_k(call_, index);
    const AlongK product(gemm, static_cast<const T*>(gemm.weight) + call_.weight_stride[0]);
    for (int64_t m = 0; m < call_.m; m += AlongK::kRows) {
      const int64_t rows = call_.m - m < AlongK::kRows ? call_.m - m : AlongK::kRows;
      AlongK::Rows::template pack<T>(gemm, m, rows, scratch);
      product.run(m, rows, scratch, 0, call_.n);
    }
  }

  void run_along_n(int64_t index, bool fetch, Unit* packed) const {
    for (int64_t m = 0, rows; m < call_.m; m += rows, fetch = false) {
      rows = with_rows(call_.m - m, [&](auto count) {
        pack<count()>(index, m, packed);
        fetch ? row_tile<count(), true>(index, m, packed) : row_tile<count(), false>(index, m, packed);
      });
    }
  }
  // Calls f(count) with the most rows of a tile, a power of two, that `left` allows; returns it.
  template <int R = kRows, class Call>
  static int64_t with_rows(int64_t left, Call f) {
    if constexpr (R > 1) {
      if (left < R) return with_rows<R / 2>(left, f);
    }
    f(std::integral_constant<int, R>{});
    return R;
  }

  // [unit][row of the tile]; past k: zeros.
  template <int R>
  void pack(int64_t index, int64_t m, Unit* to) const {
    for (int64_t r = 0; r < R; r++) {
      const T* a = static_cast<const T*>(call_.a) + index * call_.a_stride[0] + (m + r) * call_.a_stride[1];
      for (int64_t u = 0; u < units_; u++) {
        if constexpr (M::pairs) {
          to[u * R + r] = a[2 * u].bits | (2 * u + 1 < call_.k ? uint32_t{a[2 * u + 1].bits} << 16 : 0);
        } else {
          to[u * R + r] = to_float(a[u]);
        }
      }
    }
  }

  template <int R, bool FETCH>
  void row_tile(int64_t index, int64_t m, const Unit* packed) const {
    constexpr int N = kAccumulators / R;
    Lines next(static_cast<const T*>(call_.weight) + (index + 1) * call_.weight_stride[0], call_.n,
               call_.weight_stride[1]);
    int64_t n = 0;
    for (; n + N * W <= call_.n; n += N * W) tile<R, N, FETCH>(index, m, n, N * W, packed, next);
    for (; n < call_.n; n += W) tile<R, 1, FETCH>(index, m, n, call_.n - n < W ? call_.n - n : W, packed, next);
  }
  template <int R, int N, bool FETCH>
  void tile(int64_t index, int64_t m, int64_t n, int64_t columns, const Unit* packed, Lines& lines) const {
    const T* weight = static_cast<const T*>(call_.weight) + index * call_.weight_stride[0] + n;
    const int64_t stride = call_.weight_stride[1], next = call_.weight_stride[0];
    float sums[R * N * W];
    const float factors[R] = {};
    const auto accumulate = [&](auto values) {
      value_tile<M, R, N>(packed, R, values, sums, N * W, factors, int(units_), true, [] {});
    };
    if (columns < N * W) {
      accumulate([&](int u, int) {
        return value(part(weight, u * kPerUnit, columns), part(weight, u * kPerUnit + 1, columns));
      });
    } else {
      static constexpr T kZeros[N * W] = {};
      const int64_t last = call_.k - 1;
      accumulate([=, &lines](int u, int i) __attribute__((always_inline)) {
        const T* one = weight + u * kPerUnit * stride + i * W;
        const T* two = kPerUnit == 1 ? one : u * kPerUnit == last ? kZeros + i * W : one + stride;
        if constexpr (FETCH && N * W * sizeof(T) == 64) {
          if (i < kPerUnit) lines.fetch();
        } else if constexpr (FETCH) {
          if (i * W * int64_t{sizeof(T)} % 64 == 0) {
            __builtin_prefetch(one + next, 0, 2);
            if (kPerUnit == 2) __builtin_prefetch(two + next, 0, 2);
          }
        }
        return value(one, two);
      });
    }
    T* out = static_cast<T*>(call_.out) + index * call_.out_stride[0] + m * call_.out_stride[1] + n;
    for (int r = 0; r < R; r++, out += call_.out_stride[1]) write(sums + r * N * W, columns, out);
  }

  static typename M::V value(const T* one, const T* two) {
    if constexpr (M::pairs) {
      return Isa::interleave(one, two);
    } else {
      return Isa::load(one);
    }
  }
  struct Vector {
    T elements[W];
    operator const T*() const { return elements; }
  };
  // The first `columns` elements of a weight row, or zeros past the last row.
  Vector part(const T* weight, int64_t row, int64_t columns) const {
    Vector whole{};
    if (row < call_.k) std::memcpy(whole.elements, weight + row * call_.weight_stride[1], size_t(columns) * sizeof(T));
    return whole;
  }
  static void write(const float* sums, int64_t columns, T* out) {
    int64_t i = 0;
    for (; i + W <= columns; i += W) Isa::store(out + i, Isa::load(sums + i));
    for (; i < columns; i++) from_float(sums[i], out[i]);
  }

  const FlashmlaBmm& call_;
  const int64_t units_;
};

}  // namespace flashmla::FLASHMLA_ISA
