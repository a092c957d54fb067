// Measures what this machine can do: peak FLOP/s and read bandwidth, all threads at once. Prints one JSON object on
// stdout.
//
//   limits THREADS DRAM_BYTES L3_BYTES SECONDS [NAME...]
//
//   DRAM_BYTES: the buffer for DRAM reads, several times the last-level cache
//   L3_BYTES: what a thread reads from it, more than its L2 holds
//   SECONDS: the time for each measurement
//   NAME: what to measure, of hz fp32_flops bf16_flops l2_read l3_read dram_read dram_read_prefetched
//         dram_read_streams; else all that this machine has
//
// Every measurement is repeated until its time is up, and every repetition is printed: the caller takes medians and
// rejects what cannot be. A repetition's time is that of the slowest thread, each timing its own work.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <omp.h>
#include <sched.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kChains = 24;  // 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kChains = 12;  // 16 registers; latency 4 or 5, two a cycle
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kChains = 24;
#else
constexpr int kVectorBytes = 16;
constexpr int kChains = 12;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

#if defined(__x86_64__)
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#else
#define OPAQUE(x) __asm__ volatile("" : "+m"(x))
#endif

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

volatile float float_sink;
volatile uint64_t word_sink;

// One dependent operation a cycle: the core's frequency. Not an addition of a constant, which some processors fold
// away.
uint64_t dependent_steps(int64_t count) {
  uint64_t x = count, y = 1;
  __asm__ volatile("" : "+r"(y));
  for (int64_t i = 0; i < count; i += 8) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      x ^= y;
      __asm__ volatile("" : "+r"(x));
    }
  }
  return x;
}

// Independent chains of multiply-adds in registers.
float multiply_adds(int64_t count) {
  Floats chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = Floats{} + 1e-3f * i;
  Floats x = Floats{} + 0.999f, y = Floats{} + 1e-7f;
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * x + y;
    OPAQUE(x);
    OPAQUE(y);
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += chain[i][0];
  return sum;
}

#if defined(__AVX512BF16__)
// Independent chains of vdpbf16ps: 32 multiply-adds of bf16 pairs each, into fp32.
float bf16_dot_products(int64_t count) {
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(1e-3f * i);
  __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80), y = (__m512bh)_mm512_set1_epi32(0x33803380);
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], x, y);
    OPAQUE(x);
    OPAQUE(y);
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += chain[i][0];
  return sum;
}
#endif

// Reads every byte of [data, data + bytes), `bytes` a multiple of 8 kStreams vectors. kAhead: software prefetch
// distance, or 0. kStreams: parts that are read side by side.
template <int kAhead, int kStreams = 1>
uint64_t read(const char* data, size_t bytes) {
  constexpr int kStep = 8 * kVectorBytes;
  Words sum[8] = {};
  for (size_t at = 0; at < bytes / kStreams; at += kStep) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const char* from = data + stream * (bytes / kStreams) + at;
      if constexpr (kAhead > 0) {
#pragma GCC unroll 8
        for (int line = 0; line < kStep; line += 64) __builtin_prefetch(from + kAhead + line);
      }
      const Words* vectors = reinterpret_cast<const Words*>(from);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sum[i] ^= vectors[i];
    }
  }
  for (int i = 1; i < 8; ++i) sum[0] ^= sum[i];
  return sum[0][0];
}

// Pins thread t to the t-th CPU this process may use, so that no two threads share a core.
void pin(int thread) {
  cpu_set_t allowed, mine;
  sched_getaffinity(0, sizeof allowed, &allowed);
  CPU_ZERO(&mine);
  for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && seen++ == thread) CPU_SET(cpu, &mine);
  if (CPU_COUNT(&mine) == 1) sched_setaffinity(0, sizeof mine, &mine);
}

struct Machine {
  int threads;
  double seconds;                   // for each measurement
  std::vector<std::string> wanted;  // names of measurements, or none for all
  bool first = true;
  int repetition = 0;  // counted over all measurements: each way to read DRAM goes on where the one before stopped

  // Prints the rate `work / time` of each repetition of body(thread, repetition), if it is wanted.
  void measure(const char* name, double work, const std::function<void(int, int)>& body) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), name) == wanted.end()) return;
    std::vector<double> rates, elapsed(threads);
    const double end = now() + seconds;
    for (; rates.size() < 5 || (now() < end && rates.size() < 1000); ++repetition) {
#pragma omp parallel num_threads(threads)
      {
        const int thread = omp_get_thread_num();
#pragma omp barrier
        const double start = now();
        body(thread, repetition);
        elapsed[thread] = now() - start;
      }
      rates.push_back(work / *std::max_element(elapsed.begin(), elapsed.end()));
    }
    std::printf("%s\"%s\": [", first ? "" : ", ", name);
    for (size_t i = 0; i < rates.size(); ++i) std::printf("%s%.6g", i ? ", " : "", rates[i]);
    std::printf("]");
    first = false;
  }
};

struct Free {
  void operator()(char* p) const { std::free(p); }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: limits THREADS DRAM_BYTES L3_BYTES SECONDS [NAME...]\n");
    return 2;
  }
  Machine machine{std::atoi(argv[1]), std::atof(argv[4]), {argv + 5, argv + argc}};
  const int threads = machine.threads;
  constexpr size_t kSmall = 128 << 10;  // in a core's L2, not in its L1
  constexpr size_t kChunk = 4 << 20;
  const size_t chunks = std::max<size_t>(1, std::strtoull(argv[2], nullptr, 10) / (kChunk * threads));
  const size_t bytes = chunks * threads * kChunk;
  // One chunk more than is read: prefetches run past the end.
  std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(kChunk, bytes + kChunk)));
  if (!memory) {
    std::fprintf(stderr, "no memory for a buffer of %zu bytes\n", bytes);
    return 1;
  }
  char* data = memory.get();
  madvise(data, bytes + kChunk, MADV_HUGEPAGE);  // as the library's caches; fails where a kernel has none

#pragma omp parallel num_threads(threads)
  {
    pin(omp_get_thread_num());
    // Pages of equal bytes can be shared or compressed below us: fill with pseudo-random words. Every thread writes the
    // chunks that it will read from DRAM, in that order: what the caches still hold of them is read last.
    constexpr int kWords = kVectorBytes / 8;
    Words state;
    for (int i = 0; i < kWords; ++i) state[i] = 0x9e3779b97f4a7c15ull * (omp_get_thread_num() * kWords + i + 1);
#pragma omp for schedule(static, kChunk / kVectorBytes)
    for (int64_t i = 0; i < static_cast<int64_t>((bytes + kChunk) / kVectorBytes); ++i) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      reinterpret_cast<Words*>(data)[i] = state;
    }
  }

  std::printf("{\"vector_bytes\": %d, \"threads\": %d, \"dram_bytes\": %zu, \"samples\": {", kVectorBytes, threads,
              bytes);
  constexpr int64_t kSteps = 4'000'000, kMadds = 200'000;
  machine.measure("hz", kSteps, [&](int, int) { word_sink = dependent_steps(kSteps); });
  machine.measure("fp32_flops", 2.0 * kMadds * kChains * (kVectorBytes / 4) * threads,
                  [&](int, int) { float_sink = multiply_adds(kMadds); });
#if defined(__AVX512BF16__)
  machine.measure("bf16_flops", 2.0 * kMadds * kChains * 32 * threads,
                  [&](int, int) { float_sink = bf16_dot_products(kMadds); });
#endif
  constexpr int kRounds = 200;
  machine.measure("l2_read", 1.0 * kRounds * kSmall * threads, [&](int thread, int) {
    uint64_t sum = 0;
    for (int round = 0; round < kRounds; ++round) {
      sum ^= read<0>(data + thread * kChunk, kSmall);
      __asm__ volatile("" ::: "memory");  // or the compiler reads once and multiplies
    }
    word_sink = sum;
  });
  // Each thread reads bytes of its own in turns: what its L2 cannot hold comes from the L3 that all share.
  const size_t shared = std::strtoull(argv[3], nullptr, 10) / kChunk * kChunk;
  if (shared * threads <= bytes) {
    machine.measure("l3_read", 4.0 * shared * threads, [&](int thread, int) {
      uint64_t sum = 0;
      for (int round = 0; round < 4; ++round) {
        sum ^= read<0>(data + thread * shared, shared);
        __asm__ volatile("" ::: "memory");
      }
      word_sink = sum;
    });
  }
  // Each repetition reads chunks that no thread has read for `bytes` bytes.
  const auto chunk_of = [&](int thread, int repetition) {
    return data + ((repetition % chunks) * threads + thread) * kChunk;
  };
  machine.measure("dram_read", 1.0 * kChunk * threads,
                  [&](int thread, int repetition) { word_sink = read<0>(chunk_of(thread, repetition), kChunk); });
  machine.measure("dram_read_prefetched", 1.0 * kChunk * threads,
                  [&](int thread, int repetition) { word_sink = read<2048>(chunk_of(thread, repetition), kChunk); });
  // A processor's prefetchers stop at the end of a page; side by side, others are under way then.
  machine.measure("dram_read_streams", 1.0 * kChunk * threads,
                  [&](int thread, int repetition) { word_sink = read<0, 4>(chunk_of(thread, repetition), kChunk); });
  std::printf("}}\n");
  return 0;
}
