// Staging: rows that tiles cannot read where they lie (other element types, tiles that cross pages or the sequence's
// end), copied once into a layout that they can: [chunk][token][kChunk] units. It costs one load and store a vector
// against as many multiply-accumulates as there are query rows, and it keeps formats and page boundaries out of the
// tiles.
#pragma once

#include "flashmla/rows.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

template <class Isa, class T>
struct Stage {
  using Unit = typename Mac<Isa, T>::Unit;
  static constexpr bool pairs = Mac<Isa, T>::pairs;
  static constexpr int kPerUnit = pairs ? 2 : 1;  // elements of a key

  // Units of d elements: pairs are not shared between the parts of a key.
  static int64_t units(int64_t d) { return (d + kPerUnit - 1) / kPerUnit; }
  static int64_t chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

  // d elements from `row` as the units of token `token`, from a chunk's first unit on.
  static void put(Unit* staged, int64_t capacity, int64_t token, int64_t chunk, const T* row, int64_t d) {
    constexpr int64_t room = kChunk * kPerUnit;
    for (int64_t done = 0; done < d; done += room, chunk++) {
      copy(staged + (chunk * capacity + token) * kChunk, row + done, d - done < room ? d - done : room);
    }
  }

private:
  static void copy(float* to, const T* from, int64_t n) {
    int64_t i = 0;
    for (; i + Isa::W <= n; i += Isa::W) Isa::store(to + i, Isa::load(from + i));
    for (; i < n; i++) to[i] = to_float(from[i]);
  }
  static void copy(uint32_t* to, const T* from, int64_t n) {
    int64_t i = 0;
    for (; i + 2 * Isa::W <= n; i += 2 * Isa::W) Isa::store(to + i / 2, Isa::load_pairs(from + i));
    std::memcpy(to + i / 2, from + i, size_t(n - i) * sizeof(T));
    if (n % 2) reinterpret_cast<T*>(to)[n] = T{};
  }
};

}  // namespace flashmla::FLASHMLA_ISA
