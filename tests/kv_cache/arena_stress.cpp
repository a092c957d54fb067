// Random work on arenas, checked as it goes; built with a sanitizer each. Arguments: operations a thread, threads.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "pool/arena.h"

using flashmla::pool::Arena;
using flashmla::pool::ArenaMap;
using flashmla::pool::Stats;

namespace {

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::_Exit(1);
}

class Random {  // xorshift
public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  size_t operator()() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_ >> 11;
  }

private:
  uint64_t state_;
};

struct Block {
  unsigned char* data = nullptr;
  size_t size = 0;
  unsigned char mark = 0;

  void fill() { std::memset(data, mark, size); }
  bool intact() const {
    for (size_t n = 0; n < size; n++) {
      if (data[n] != mark) return false;
    }
    return true;
  }
};

size_t random_size(Random& random) {
  switch (random() % 4) {
    case 0:
      return 1 + random() % 512;
    case 1:
      return 1 + random() % 8192;
    case 2:
      return 1 + random() % 100000;
    default:
      return 1 << random() % 18;
  }
}

Block take(Arena& arena, Random& random) {
  Block block{nullptr, random_size(random), static_cast<unsigned char>(1 + random() % 200)};
  size_t dirty = block.size;
  block.data = static_cast<unsigned char*>(arena.allocate(block.size, &dirty));
  if (block.data == nullptr) return block;
  check(reinterpret_cast<uintptr_t>(block.data) % (block.size > 512 ? 128 : 64) == 0, "alignment");
  check(ArenaMap::find(block.data) == &arena && ArenaMap::find(block.data + block.size - 1) == &arena, "the map");
  for (size_t n = dirty; n < block.size; n++) check(block.data[n] == 0, "fresh memory is zero");
  block.fill();
  return block;
}

void give_back(Block& block) {
  if (block.data == nullptr) return;
  check(block.intact(), "nobody else writes a block");
  ArenaMap::find(block.data)->release(block.data);
  block = {};
}

// One thread: whatever the order, all memory is one block again at the end.
void alone(size_t operations, bool poison) {
  Arena* arena = Arena::create({4 << 20, 16 << 20, 2 << 20, 1, 0, poison});
  Random random(7);
  std::vector<Block> held(200), deferred;
  uint64_t epoch = 0;
  for (size_t n = 0; n < operations; n++) {
    Block& block = held[random() % held.size()];
    if (epoch && block.data) deferred.push_back(block);
    give_back(block);
    if (random() % 3) block = take(*arena, random);
    for (const Block& each : deferred) {
      check(block.data + block.size <= each.data || each.data + each.size <= block.data, "an epoch defers reuse");
    }
    if (random() % 50 == 0) {
      if (epoch) check(arena->close_epoch(epoch), "an open epoch closes");
      epoch = epoch ? 0 : arena->open_epoch();
      deferred.clear();
    }
    if (n % 100 == 0) {
      size_t in_use = 0, blocks = 0;
      for (const Block& each : held) blocks += each.data != nullptr, in_use += each.data ? each.size : 0;
      const Stats stats = arena->stats();
      check(stats.blocks == blocks && stats.in_use >= in_use, "the books");
      check(stats.in_use + stats.deferred <= stats.size && stats.size <= stats.most_bytes, "the size");
    }
  }
  if (epoch) arena->close_epoch(epoch);
  for (Block& block : held) give_back(block);
  const size_t size = arena->stats().size;
  void* everything = arena->allocate(size);
  check(everything != nullptr, "all memory is one block again");
  arena->release(everything);
  check(!arena->close_epoch(12345), "no such epoch");
  arena->let_go();
}

// Threads that free what others allocated, open epochs, and outlive the arena's holder.
void together(size_t operations, unsigned threads) {
  Arena* arena = Arena::create({32 << 20, 32 << 20, 0, 0, 0, 0});
  std::vector<std::mutex> locks(64);
  std::vector<Block> shared(locks.size());
  std::atomic<unsigned> running{threads};
  const auto work = [&](unsigned seed) {
    Random random(seed);
    std::vector<Block> held(16);
    for (size_t n = 0; n < operations; n++) {
      Block& block = held[random() % held.size()];
      give_back(block);
      const uint64_t epoch = random() % 8 ? 0 : arena->open_epoch();
      block = take(*arena, random);
      const size_t slot = random() % shared.size();
      {
        std::lock_guard guard(locks[slot]);
        std::swap(shared[slot], block);
      }
      give_back(block);
      if (epoch) arena->close_epoch(epoch);
      if (n % 64 == 0) check(arena->stats().in_use <= (32 << 20), "the size");
    }
    if (--running == 0) arena->let_go();  // while blocks are held
    for (Block& block : held) give_back(block);
  };
  std::vector<std::thread> all;
  for (unsigned n = 0; n < threads; n++) all.emplace_back(work, n);
  for (std::thread& thread : all) thread.join();
  void* somewhere = nullptr;
  for (Block& block : shared) {
    if (block.data) somewhere = block.data;
    give_back(block);
  }
  check(ArenaMap::find(somewhere) == nullptr, "the arena went with its last block");
}

// A block that comes back when the process ends, after what was made since main began is gone.
struct AtExit {
  Block block;
  ~AtExit() { give_back(block); }
} at_exit;

// Arenas that come and go while others do.
void many(size_t rounds) {
  const auto work = [&](unsigned seed) {
    Random random(seed);
    for (size_t n = 0; n < rounds; n++) {
      Arena* arena = Arena::create({1 << 20, 1 << 20, 0, 0, 0, 0});
      Block block = take(*arena, random);
      arena->let_go();
      give_back(block);
    }
  };
  std::thread first(work, 1), second(work, 2);
  first.join();
  second.join();
}

}  // namespace

int main(int, char** arguments) {
  const size_t operations = std::strtoull(arguments[1], nullptr, 10);
  const auto threads = static_cast<unsigned>(std::strtoul(arguments[2], nullptr, 10));
  alone(operations, false);
  alone(operations / 4, true);
  together(operations / threads, threads);
  many(operations / 100);
  Arena* last = Arena::create({1 << 20, 1 << 20, 0, 0, 0, 0});
  Random random(3);
  at_exit.block = take(*last, random);
  last->let_go();
  std::puts("good");
}
