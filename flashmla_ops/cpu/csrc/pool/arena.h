// An arena: memory for blocks, shared by threads. It lives until nobody holds it and its last block has come back.
//
// Frees that come while an epoch is open wait until every epoch has closed that was open then: whoever reads the memory
// of a step without owning it, a pending copy, say, keeps an epoch open for so long.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <thread>

#include "pool/heap.h"
#include "pool/memory.h"

namespace flashmla::pool {

struct Options {
  uint64_t bytes;        // at first
  uint64_t most_bytes;   // at last; the range is reserved
  uint64_t growth;       // bytes to grow by, at least, when the memory does not suffice
  uint32_t huge_pages;   // ask for them
  uint32_t preallocate;  // take the memory now
  uint32_t poison;       // fill what comes back with NaN
};

struct Stats {
  uint64_t size, most_bytes, in_use, peak, blocks, largest_free, free_blocks;
  uint64_t deferred, deferred_blocks, epochs, fallthroughs, fallthrough_bytes;
};

class Arena;

// Which arena an address belongs to, without a lock: a table of slots of the address space.
class ArenaMap {
public:
  static constexpr int kSlotBits = 26, kAddressBits = 48;
  static constexpr size_t kSlot = size_t{1} << kSlotBits;

  static Arena* find(const void* pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    std::atomic<Arena*>* slots = table().load(std::memory_order_acquire);
    if (slots == nullptr || address >> kAddressBits) return nullptr;
    return slots[address >> kSlotBits].load(std::memory_order_acquire);
  }

  // False where the system has no address space for the table, or gave addresses that it does not cover.
  static bool set(const Reservation& range, Arena* arena) {
    static const bool reserved = [] {
      // Never destroyed: blocks come back until the process has ended.
      static auto& memory = *new Reservation(sizeof(std::atomic<Arena*>) << (kAddressBits - kSlotBits), kSlot);
      if (!memory || !memory.commit(0, memory.bytes())) return false;
      table().store(reinterpret_cast<std::atomic<Arena*>*>(memory.base()), std::memory_order_release);
      return true;
    }();
    const auto first = reinterpret_cast<uintptr_t>(range.base()), last = first + range.bytes() - 1;
    if (!reserved || last >> kAddressBits) return false;
    std::atomic<Arena*>* slots = table().load(std::memory_order_acquire);
    for (auto slot = first >> kSlotBits; slot <= last >> kSlotBits; slot++) {
      slots[slot].store(arena, std::memory_order_release);
    }
    return true;
  }

private:
  static std::atomic<std::atomic<Arena*>*>& table() {
    static std::atomic<std::atomic<Arena*>*> slots{nullptr};
    return slots;
  }
};

class Arena {
public:
  // An arena that the caller holds. Raises std::bad_alloc where the system does not grant the memory.
  static Arena* create(const Options& options) {
    auto arena = std::unique_ptr<Arena>(new Arena(options));
    if (!ArenaMap::set(arena->memory_, arena.get())) throw std::bad_alloc();
    Registry& all = Registry::get();
    std::lock_guard guard(all.mutex);
    all.arenas.insert(arena.get());
    return arena.release();
  }

  ~Arena() { ArenaMap::set(memory_, nullptr); }

  // Holders keep the arena, as blocks do.
  void hold() {
    std::lock_guard guard(mutex_);
    holders_++;
  }
  void let_go() {
    std::unique_lock guard(mutex_);
    holders_--;
    destroy_if_unused(std::move(guard));
  }

  // At least so many bytes, aligned to 64 and, from 1 KiB on, to 128; nullptr if no free block is large enough.
  // `dirty`: so many bytes from the start on may differ from zero.
  void* allocate(size_t bytes, size_t* dirty = nullptr) {
    std::lock_guard guard(mutex_);
    auto block = heap_.allocate(bytes);
    if (!block && grow(bytes)) block = heap_.allocate(bytes);
    if (!block) return nullptr;
    if (dirty != nullptr) *dirty = std::min(bytes, block->dirty);
    return memory_.base() + block->offset;
  }

  // Takes back a block, now or when no epoch is open that was open before. The arena may be gone afterwards.
  void release(void* pointer) {
    std::unique_lock guard(mutex_);
    const auto offset = static_cast<uint64_t>(static_cast<char*>(pointer) - memory_.base());
    if (epochs_.empty()) {
      take_back(offset);
      destroy_if_unused(std::move(guard));
    } else {
      deferred_.push_back({newest_epoch_, offset});
      deferred_bytes_ += size_at(offset);
    }
  }

  // A number that closes the epoch again. The arena lives at least as long as its epochs.
  uint64_t open_epoch() {
    std::lock_guard guard(mutex_);
    epochs_.emplace(++newest_epoch_, std::this_thread::get_id());
    return newest_epoch_;
  }

  // False if no such epoch is open. The arena may be gone afterwards.
  bool close_epoch(uint64_t epoch) {
    std::unique_lock guard(mutex_);
    if (epochs_.erase(epoch) == 0) return false;
    take_back_deferred();
    destroy_if_unused(std::move(guard));
    return true;
  }

  // Notes that a request was served by another allocator.
  void fell_through(size_t bytes) {
    std::lock_guard guard(mutex_);
    fallthroughs_++, fallthrough_bytes_ += bytes;
  }

  Stats stats() {
    std::lock_guard guard(mutex_);
    return {heap_.size(),
            options_.most_bytes,
            heap_.in_use() - deferred_bytes_,
            heap_.peak(),
            heap_.blocks() - deferred_.size(),
            heap_.largest_free(),
            heap_.free_blocks(),
            deferred_bytes_,
            deferred_.size(),
            epochs_.size(),
            fallthroughs_,
            fallthrough_bytes_};
  }

private:
  struct Deferred {
    uint64_t epoch;  // the newest that was open
    uint64_t offset;
  };

  // All arenas, for a fork: it must not happen while another thread, which the child lacks, holds a lock.
  struct Registry {
    std::mutex mutex;
    std::set<Arena*> arenas;

    static Registry& get() {
      static Registry* all = [] {
        pthread_atfork([] { get().lock(); }, [] { get().unlock(); },
                       [] {
                         for (Arena* arena : get().arenas) arena->forget_other_threads();
                         get().unlock();
                       });
        return new Registry;
      }();
      return *all;
    }
    void lock() {
      mutex.lock();
      for (Arena* arena : arenas) arena->mutex_.lock();
    }
    void unlock() {
      for (Arena* arena : arenas) arena->mutex_.unlock();
      mutex.unlock();
    }
  };

  static Options rounded(Options options) {
    options.bytes = round_up(options.bytes, kStep);
    options.most_bytes = std::max(options.bytes, round_up(options.most_bytes, kStep));
    return options;
  }

  explicit Arena(const Options& options)
      : options_(rounded(options)), memory_(round_up(options_.most_bytes, ArenaMap::kSlot), ArenaMap::kSlot),
        heap_(memory_ ? memory_.bytes() : throw std::bad_alloc()) {
    if (options_.huge_pages) memory_.prefer_huge_pages();
    if (!commit(options_.bytes)) throw std::bad_alloc();
  }
  bool commit(size_t bytes) {
    const size_t before = heap_.size();
    if (!memory_.commit(before, before + bytes)) return false;
    if (options_.preallocate) memory_.populate(before, before + bytes);
    heap_.grow(bytes);
    return true;
  }

  // By what the free bytes at the end lack, at least.
  bool grow(size_t bytes) {
    const size_t rest = options_.most_bytes - heap_.size(), there = heap_.free_at_end();
    if (options_.growth == 0 || bytes > there + rest) return false;
    return commit(std::min(rest, round_up(std::max<size_t>(options_.growth, bytes - std::min(bytes, there)), kStep)));
  }

  // The size of a block that is in use. What is freed twice must not go on, as anybody may have it by now.
  size_t size_at(uint64_t offset) {
    const size_t size = heap_.size_at(offset);
    if (size == 0) {
      std::fprintf(stderr, "flashmla: no block of an arena starts at %p: freed twice?\n", memory_.base() + offset);
      std::abort();
    }
    return size;
  }

  void take_back(uint64_t offset) {
    const size_t size = size_at(offset);
    if (options_.poison) std::memset(memory_.base() + offset, 0xff, size);  // NaN in every floating type
    heap_.release(offset);
  }

  void take_back_deferred() {
    const uint64_t oldest = epochs_.empty() ? UINT64_MAX : epochs_.begin()->first;
    for (; !deferred_.empty() && deferred_.front().epoch < oldest; deferred_.pop_front()) {
      deferred_bytes_ -= size_at(deferred_.front().offset);
      take_back(deferred_.front().offset);
    }
  }

  // In the child of a fork: nobody is left to close the epochs of threads that it does not have.
  void forget_other_threads() {
    std::erase_if(epochs_, [](const auto& epoch) { return epoch.second != std::this_thread::get_id(); });
    take_back_deferred();
  }

  void destroy_if_unused(std::unique_lock<std::mutex> guard) {
    if (holders_ > 0 || heap_.blocks() > 0 || !epochs_.empty()) return;
    guard.unlock();  // nobody else can reach the arena now, but a fork that walks through all
    {
      std::lock_guard others(Registry::get().mutex);
      Registry::get().arenas.erase(this);
    }
    delete this;
  }

  static constexpr size_t kStep = 65536;  // a multiple of the pages of any system

  const Options options_;
  std::mutex mutex_;
  Reservation memory_;
  Heap heap_;
  size_t holders_ = 1;
  std::map<uint64_t, std::thread::id> epochs_;  // those that are open, and who opened them
  uint64_t newest_epoch_ = 0;
  std::deque<Deferred> deferred_;  // by epoch
  size_t deferred_bytes_ = 0;
  uint64_t fallthroughs_ = 0, fallthrough_bytes_ = 0;
};

}  // namespace flashmla::pool
