// Pasted in front of every generated kernel that appends rows to a cache.
#ifndef FLASHMLA_APPEND
#define FLASHMLA_APPEND
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace flashmla {

// The slots of one append_ as its rules want them: every slot is checked before the first row is written, and what is
// skipped (a negative slot, or a row that a later one of the same slot replaces) becomes kNoSlot.
class LiveSlots {
public:
  // So negative that any offset into a cache that is computed from it is negative.
  static constexpr int64_t kNoSlot = -(int64_t{1} << 40);

  LiveSlots(const int64_t* slots, int64_t n, int64_t stride, int64_t capacity) : live_(size_t(n)) {
    for (int64_t i = 0; i < n; i++) {
      const int64_t slot = slots[i * stride];
      if (slot >= capacity) fail(slot, i, capacity);
      live_[size_t(i)] = slot < 0 ? kNoSlot : slot;
    }
    if (n > 1) drop_replaced(capacity);
  }
  const int64_t* data() const { return live_.data(); }

private:
  [[noreturn]] static void fail(int64_t slot, int64_t i, int64_t capacity) {
    throw std::runtime_error("flashmla::append_: argument 'slot_mapping': expected slots below " +
                             std::to_string(capacity) + ", got " + std::to_string(slot) + " at [" + std::to_string(i) +
                             "]");
  }
  void drop_replaced(int64_t capacity) {
    std::vector<bool> taken(static_cast<size_t>(capacity));
    for (size_t i = live_.size(); i-- > 0;) {
      if (live_[i] < 0) continue;
      if (taken[size_t(live_[i])])
        live_[i] = kNoSlot;
      else
        taken[size_t(live_[i])] = true;
    }
  }

  std::vector<int64_t> live_;
};

// A pointer into the cache through which offsets below zero are not written.
template <class T>
struct Guarded {
  struct Element {
    T* at;
    template <class V>
    void operator=(V value) const {
      if (at != nullptr) *at = static_cast<T>(value);
    }
  };
  T* base;
  Element operator[](int64_t i) const { return {i < 0 ? nullptr : base + i}; }
};
template <class T>
Guarded<T> guarded(T* base) {
  return {base};
}

}  // namespace flashmla
#endif
