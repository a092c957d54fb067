// Whether strided tensors share memory: what an operator writes must lie apart from itself and from what it reads.
// flashmla_ops/ops/_overlap.py has the same in Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace flashmla {

// The bytes of a tensor: its first element at `first`, elements of `size` bytes, `counts` of them `strides` bytes
// apart.
struct Extent {
  int64_t first, size, last = 0;                  // `last` is the end of the last byte
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, count - 1), of the dimensions longer than 1
  bool empty = false;

  template <class Tensor>
  Extent(const Tensor& tensor, int64_t element_size)
      : first(reinterpret_cast<int64_t>(tensor.const_data_ptr())), size(element_size), last(first + element_size) {
    for (int64_t i = 0; i < tensor.dim(); i++) {
      const int64_t steps = tensor.size(i) - 1, stride = tensor.stride(i) * element_size;
      if (steps < 0) empty = true;
      if (steps > 0) dims.emplace_back(stride, steps), last += steps * stride;
    }
  }
};

// Whether sum(x[i] * strides[i]) == target has a solution with low[i] <= x[i] <= high[i]; one that is not all zeros, if
// `nonzero` is set. Strides descend, so that what remains leaves few choices for the next: for tensors that are views
// of one another there is hardly ever more than one. The search gives up, with false, after `budget` steps.
struct Equation {
  struct Term {
    int64_t stride, low, high;
  };
  std::vector<Term> terms;
  int budget = 10000;

  void add(int64_t stride, int64_t low, int64_t high) {
    for (Term& term : terms) {
      if (term.stride == stride) return void((term.low += low, term.high += high));
    }
    terms.push_back({stride, low, high});
  }
  bool solvable(int64_t target, bool nonzero) {
    std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.stride > b.stride; });
    return search(0, target, nonzero);
  }

private:
  bool search(size_t i, int64_t target, bool nonzero) {
    if (i == terms.size()) return target == 0 && !nonzero;
    if (--budget < 0) return false;
    int64_t low = target, high = target;
    for (size_t j = i + 1; j < terms.size(); j++) {
      low -= terms[j].high * terms[j].stride, high -= terms[j].low * terms[j].stride;
    }
    const auto& [stride, least, most] = terms[i];
    const auto floor = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
    const int64_t from = std::max(least, -floor(-low, stride)), to = std::min(most, floor(high, stride));
    for (int64_t x = from; x <= to; x++) {
      if (search(i + 1, target - x * stride, nonzero && x == 0)) return true;
    }
    return false;
  }
};

// Whether two elements of one tensor share memory.
inline bool overlaps_itself(const Extent& a) {
  if (a.empty) return false;
  Equation equation;
  for (const auto& [stride, steps] : a.dims) {
    for (const auto& term : equation.terms) {
      if (term.stride == stride) return true;
    }
    if (stride == 0) return true;
    equation.add(stride, -steps, steps);
  }
  return equation.solvable(0, true);
}

// Whether an element of `a` and one of `b` share memory.
inline bool overlap(const Extent& a, const Extent& b) {
  if (a.empty || b.empty || a.last <= b.first || b.last <= a.first) return false;
  Equation equation;
  for (const auto& [stride, steps] : a.dims) {
    if (stride != 0) equation.add(stride, 0, steps);
  }
  for (const auto& [stride, steps] : b.dims) {
    if (stride != 0) equation.add(stride, -steps, 0);
  }
  equation.add(1, -(b.size - 1), a.size - 1);
  return equation.solvable(b.first - a.first, false);
}

}  // namespace flashmla
