// A bump allocator over memory that the caller owns: sizes are found by running the same sequence of takes on null.
#pragma once

#include <cstdint>

namespace flashmla::FLASHMLA_ISA {

class Scratch {
public:
  explicit Scratch(char* base) : base_(base) {}

  template <class X>
  X* take(int64_t n) {
    X* here = base_ ? reinterpret_cast<X*>(base_ + used_) : nullptr;
    used_ += (n * int64_t{sizeof(X)} + 63) / 64 * 64;
    return here;
  }
  int64_t used() const { return used_; }

private:
  char* base_;
  int64_t used_ = 0;
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace flashmla::FLASHMLA_ISA
