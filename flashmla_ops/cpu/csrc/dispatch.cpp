// Which instruction set runs: the fastest that the processor has, or the one that was selected by name.
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "flashmla/dispatch.h"

#if defined(__x86_64__)
#define FLASHMLA_X86 1
#else
#define FLASHMLA_X86 0
#endif

namespace flashmla {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

bool always() { return true; }
#if FLASHMLA_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#ifdef FLASHMLA_ASSUME_AVX512  // the tests' build, in which other code stands in for the instructions
bool has_avx512() { return true; }
bool has_avx512_bf16() { return true; }
bool bf16_pairs_are_slow() { return false; }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel starts one vdpbf16ps in two cycles but two fp32 multiply-adds a cycle: measured on Emerald Rapids, 172 against
// 350 GFLOP/s with 2 threads, and decode of (b 4, h_q 128, s_kv 1024) in 8.7 ms against 4.5 ms in fp32.
bool bf16_pairs_are_slow() { return __builtin_cpu_is("intel"); }
#endif
#endif

constexpr int kCandidates = FLASHMLA_X86 ? 5 : 2;
using Candidates = std::array<Candidate, kCandidates>;

// Fastest first. `emulated` stands after `generic`: it is chosen by name only.
const Candidates& candidates() {
  static const Candidates ordered = [] {
    Candidates all = {{
#if FLASHMLA_X86
        {&kernels_avx512_bf16, has_avx512_bf16},
        {&kernels_avx512, has_avx512},
        {&kernels_avx2, has_avx2},
#endif
        {&kernels_generic, always},
        {&kernels_emulated, always},
    }};
#if FLASHMLA_X86
    if (bf16_pairs_are_slow()) std::swap(all[0], all[1]);
#endif
    return all;
  }();
  return ordered;
}

const Candidate* find(const char* name) {
  for (const Candidate& candidate : candidates()) {
    if (std::strcmp(candidate.kernels->name, name) == 0) return &candidate;
  }
  return nullptr;
}

const Kernels* fastest() {
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported()) return candidate.kernels;
  }
  return &kernels_generic;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> chosen{fastest()};
  return chosen;
}

}  // namespace

bool multiplies_bf16() { return find("avx512_bf16") != nullptr && find("avx512_bf16")->supported(); }

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

}  // namespace flashmla

extern "C" {

const char* const* flashmla_isa_names(void) {
  static const char* names[flashmla::kCandidates + 1] = {};
  for (size_t i = 0; i < flashmla::kCandidates; i++) names[i] = flashmla::candidates()[i].kernels->name;
  return names;
}

int flashmla_isa_supported(const char* name) {
  const flashmla::Candidate* candidate = flashmla::find(name);
  return candidate != nullptr && candidate->supported();
}

const char* flashmla_isa_active(void) { return flashmla::kernels().name; }

int flashmla_isa_select(const char* name) {
  const flashmla::Candidate* candidate = flashmla::find(name);
  if (candidate == nullptr || !candidate->supported()) return 1;
  flashmla::active().store(candidate->kernels, std::memory_order_relaxed);
  return 0;
}
}
