// Attention for few query rows a KV head (GQA, MHA, MLA with one to eight heads) over rows of bf16 pairs, where a lane
// a row would leave most lanes empty. A vector of queries holds R rows times G = W / R units: lane r * G + g is unit g
// of row r, and meets the next G units of a key, repeated R times by the load. What is left, adding up the G lanes of a
// row, is done for eight tokens at once.
//
// Measured on Zen 4, whose 512-bit products come one a cycle, against R lanes of 256 bits with one unit broadcast: half
// the loads, which conflict for banks of L1 where rows are powers of two apart.
#pragma once

#include "flashmla/rows.h"
#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

template <class Isa, class Row, int R>
class FewAttention {
  using T = typename Row::Element;  // of queries too
  using F = typename Isa::F;
  using U = typename Isa::U;
  static constexpr int W = Isa::W, G = W / R, kBlock = 64;
  static constexpr int kTokens = 8;   // of a score tile: with two chains each, 16 products under way
  static constexpr int kPerStep = 8;  // groups of units, or pairs of tokens, between two prefetches
  // Vectors of columns that a value tile holds for each of R rows: 16 accumulators, or 8 for a single row.
  static constexpr int kColumns = R == 1 ? 8 : 16 / R;
  static_assert(R <= 8 && W % R == 0 && Mac<Isa, T>::pairs);

public:
  FewAttention(const FlashmlaDecode& call, const Item& item, const Accumulator& into, char* memory)
      : call_(call), item_(item), into_(into) {
    parts_[0] = part(call.kv.d - call.qk_start, false);
    parts_[1] = part(call.k.d, true);
    const int64_t tokens = call.levels > 1 ? kBlock : round_up(item.length, kBlock);
    Scratch scratch(memory);
    queries_ = scratch.take<uint32_t>((parts_[0].groups + parts_[1].groups) * W);
    zeros_ = scratch.take<T>(call.d_v);
    decoded_ = scratch.take<T>(decoded_elements<Row, kBlock>(call.kv));
    bytes_.copies = scratch.used();
    all_scores_ = scratch.take<float>(tokens * R + W);
    weights_ = scratch.take<uint32_t>(kBlock / 2 * R + W);
    bytes_.scores = scratch.used() - bytes_.copies;
  }

  static ScratchBytes scratch_bytes(const FlashmlaDecode& call, const Item& item) {
    return FewAttention(call, item, {}, nullptr).bytes_;
  }

  bool run(int64_t begin, int64_t end) {
    pack_queries(parts_[0], queries_, 0);
    pack_queries(parts_[1], queries_ + parts_[0].groups * W, parts_[0].d);
    std::memset(zeros_, 0, size_t(call_.d_v) * sizeof(T));
    std::fill(total_, total_ + W, 0.0f);
    maximum_ = Isa::set1(-INFINITY);
    const bool found = call_.levels > 1 ? pass(begin, end, true, true)
                                        : pass(begin, end, true, false) && pass(begin, end, false, true);
    for (int64_t r = 0; r < item_.rows; r++) {
      into_.m[r] = maximum_[r], into_.l[r] = 0;
      for (int t = 0; t < G; t++) into_.l[r] += total_[t * R + int(r)];
    }
    return found;
  }

private:
  // A part of the keys: what comes from one cache tensor.
  struct Part {
    int64_t d, groups;  // elements, and groups of G units, the last padded with zeros
    bool second;        // in k_cache
  };
  static Part part(int64_t d, bool second) { return {d, (d + 2 * G - 1) / (2 * G), second}; }

  // [group][W]; elements of the query from `first` on, negated where the scale is negative.
  void pack_queries(const Part& part, uint32_t* to, int64_t first) const {
    std::memset(to, 0, size_t(part.groups * W) * sizeof(uint32_t));
    const int64_t stride = call_.q_stride[3];
    const uint32_t sign = call_.softmax_scale < 0 ? 0x8000u : 0u;
    for (int64_t r = 0; r < item_.rows; r++) {
      const T* q = query<T>(call_, item_, item_.row + r) + first * stride;
      const auto element = [&](int64_t i) { return i < part.d ? q[i * stride].bits ^ sign : 0u; };
      for (int64_t u = 0; 2 * u < part.d; u++) {
        to[u / G * W + r * G + u % G] = element(2 * u) | element(2 * u + 1) << 16;
      }
    }
  }

  // Over the blocks of tokens [begin, end): their scores and the maximum, their weights and values, or both at once.
  bool pass(int64_t begin, int64_t end, bool scores, bool values) {
    const auto block = [&](Rows<Row, kBlock>& here, int64_t t, auto each) __attribute__((always_inline)) {
      scores_ = call_.levels > 1 ? all_scores_ : all_scores_ + (t - begin) * R;
      if (scores) {
        here.pad(kTokens);
        for (int first = 0; first < here.n; first += kTokens) score(here, first, each);
        cap_scores<Isa>(call_, scores_, round_up(here.n * R, W), std::fabs(call_.softmax_scale));
      }
      weigh(here.n, t, scores, values);
      if (values) accumulate(here, t == begin, each);
    };
    return for_blocks<Row, kBlock>(call_, item_, begin, end, decoded_, [&](int n) { return steps(n); }, block);
  }

  // How often `each` is called in a block: what prefetches are spread over.
  int64_t steps(int n) const {
    const auto steps = [](int64_t count) { return (count + kPerStep - 1) / kPerStep; };
    const int64_t scored = steps(parts_[0].d / (4 * G) * 2) + steps(parts_[1].d / (4 * G) * 2);
    const int64_t whole = call_.d_v / W;
    const int64_t tiles = whole / kColumns + __builtin_popcountll(whole % kColumns) + (call_.d_v % W != 0);
    return (n + kTokens - 1) / kTokens * scored + tiles * steps((n + 1) / 2);
  }

  // Scores [token][R] of the tokens from `first` on.
  template <class Each>
  void score(const Rows<Row, kBlock>& rows, int first, Each each) {
    F sums[kTokens] = {};
    const uint32_t* queries = queries_;
    for (const Part& part : parts_) {
      if (part.d == 0) continue;
      const T* const* keys = (part.second ? rows.k : rows.kv) + first;
      multiply(sums, keys, part.second ? 0 : call_.qk_start, queries, part.d, each);
      queries += part.groups * W;
    }
    add_lanes<G, kTokens>(sums);
#pragma GCC unroll 8
    for (int i = 0; i * G < kTokens; i++) Isa::store(scores_ + first * R + i * W, sums[i]);
  }
  // sums[i] += the d elements of rows[i] from `offset` on times the queries, lane by lane.
  template <class Each>
  static __attribute__((always_inline)) void multiply(F (&sums)[kTokens], const T* const* rows, int64_t offset,
                                                      const uint32_t* queries, int64_t d, Each each) {
    const T* keys[kTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) keys[i] = rows[i] + offset;
    F c[kTokens][2] = {};
    const int64_t even = d / (4 * G) * 2;  // whole groups, two at a time
    for (int64_t g = 0; g < even;) {
      each();
      for (const int64_t stop = g + kPerStep < even ? g + kPerStep : even; g < stop; g += 2, queries += 2 * W) {
        const U one = Isa::load(queries), two = Isa::load(queries + W);
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) {
          c[i][0] = Isa::dot(c[i][0], one, Isa::template repeated<G>(keys[i] + g * 2 * G));
          c[i][1] = Isa::dot(c[i][1], two, Isa::template repeated<G>(keys[i] + (g + 1) * 2 * G));
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) sums[i] += c[i][0] + c[i][1];
    for (int64_t done = even * 2 * G; done < d; done += 2 * G, queries += W) {
      const size_t left = size_t(d - done < 2 * G ? d - done : 2 * G);
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; i++) {
        T rest[2 * G] = {};
        std::memcpy(rest, keys[i] + done, left * sizeof(T));
        sums[i] = Isa::dot(sums[i], Isa::load(queries), Isa::template repeated<G>(rest));
      }
    }
  }
  // The sum of every LANES neighbouring lanes of N vectors, in order, into the first vectors.
  template <int LANES, int N>
  static __attribute__((always_inline)) void add_lanes(F* x) {
    if constexpr (LANES > 1) {
#pragma GCC unroll 8
      for (int i = 0; i < (N + 1) / 2; i++) x[i] = Isa::add_neighbours(x[2 * i], x[2 * i + (N > 1)]);
      add_lanes<LANES / 2, (N + 1) / 2>(x);
    }
  }

  // Scores become weights, those of two tokens in one unit: [token pair][R]. A lane is row lane % R of one of G tokens.
  void weigh(int n, int64_t first_token, bool seek, bool weigh_them) {
    const F old = maximum_;
    const BlockScores<Isa> block = scores_of(n, first_token);
    if (seek) maximum_ = of_rows<W / 2>(block.maximum(old));
    if (!weigh_them) return;
    const F rescale = block.weigh(old, maximum_, total_, [&](int t, const F(&p)[kExp]) {
#pragma GCC unroll 8
      for (int i = 0; i < kExp; i++) Isa::template pack_neighbours<R>(weights_ + (t + i) * W / 2, p[i]);
    });
    for (int r = 0; r < R; r++) rescale_[r] = rescale[r];
  }
  // In every lane the largest of its row: of lanes that are a multiple of R apart.
  template <int LANES>
  static F of_rows(F x) {
    if constexpr (LANES >= R) {
      return of_rows<LANES / 2>(Isa::max(x, Isa::template rotate<LANES>(x)));
    } else {
      return x;
    }
  }
  // The block's scores as vectors of G tokens: lane t * R + r of the i-th is row r at token i * G + t.
  BlockScores<Isa> scores_of(int n, int64_t first_token) const {
    float seen[W], unseen[W];
    bool all = n % G == 0;
    for (int r = 0; r < R; r++) {
      const Tokens row = visible(call_, item_, item_.row + (r < item_.rows ? r : item_.rows - 1));
      const int64_t begin = row.begin - first_token, end = row.end - first_token;
      all &= begin <= 0 && end >= n;
      for (int t = 0; t < G; t++) {
        seen[t * R + r] = (float(end < n ? end : n) - float(t)) / G;
        unseen[t * R + r] = (float(begin < n ? begin : n) - float(t)) / G;
      }
    }
    const F scale = Isa::set1(std::fabs(score_scale(call_)));
    return {scores_, W, 0, (n + G - 1) / G, scale, Isa::load(unseen), Isa::load(seen), all};
  }

  template <class Each>
  void accumulate(Rows<Row, kBlock>& rows, bool first_block, Each each) {
    if (rows.n % 2) rows.kv[rows.n] = zeros_;
    int64_t column = 0;
    columns<kColumns>(column, rows, first_block, each);
    if (column < call_.d_v) value_columns<1, true>(rows, column, first_block, each);
  }
  // Takes tiles of N vectors of columns while they fit, then narrower ones.
  template <int N, class Each>
  void columns(int64_t& column, const Rows<Row, kBlock>& rows, bool first_block, Each each) {
    for (; column + N * W <= call_.d_v; column += N * W) value_columns<N, false>(rows, column, first_block, each);
    if constexpr (N > 1) columns<N / 2>(column, rows, first_block, each);
  }
  // N vectors of columns, or (PART) the last columns, which are less than a vector.
  template <int N, bool PART, class Each>
  __attribute__((always_inline)) void value_columns(const Rows<Row, kBlock>& rows, int64_t column, bool first_block,
                                                    Each each) {
    F c[R][N];
    float* o = into_.o + column;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        c[r][i] = first_block ? F{} : Isa::load(o + r * into_.stride + i * W) * Isa::set1(rescale_[r]);
      }
    const uint32_t* weights = weights_;
    for (int t = 0; t < rows.n;) {
      each();
      for (const int stop = t + 2 * kPerStep < rows.n ? t + 2 * kPerStep : rows.n; t < stop; t += 2, weights += R) {
        const T *one = rows.kv[t] + column, *two = rows.kv[t + 1] + column;
        U v[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
          v[i] = PART ? Isa::interleave(whole(one).elements, whole(two).elements)
                      : Isa::interleave(one + i * W, two + i * W);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const U weight = Isa::set1(weights[r]);
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) c[r][i] = Isa::dot(c[r][i], v[i], weight);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) Isa::store(o + r * into_.stride + i * W, c[r][i]);
  }
  struct Vector {
    T elements[W];
  };
  Vector whole(const T* from) const {
    Vector vector{};
    std::memcpy(vector.elements, from, size_t(call_.d_v % W) * sizeof(T));
    return vector;
  }

  const FlashmlaDecode& call_;
  const Item& item_;
  const Accumulator into_;
  Part parts_[2];
  ScratchBytes bytes_{};
  uint32_t *queries_, *weights_;
  T* zeros_;    // a row of them: the partner of the last token where their number is odd
  T* decoded_;  // the block's rows, where they are not read in place
  float* all_scores_;
  float* scores_ = nullptr;  // of the block: level 1 keeps those of all blocks
  float rescale_[R];
  F maximum_;       // lane t * R + r: of row r
  float total_[W];  // likewise; the G lanes of a row are to be added up
};

}  // namespace flashmla::FLASHMLA_ISA
