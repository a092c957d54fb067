// Which instruction set runs: the fastest that the processor has, or the one that was selected by name.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "flashmla/dispatch.h"

namespace flashmla {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#ifdef FLASHMLA_ASSUME_AVX512  // the tests' build, in which other code stands in for the instructions
bool has_avx512() { return true; }
bool has_avx512_bf16() { return true; }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

// Fastest first. `emulated` stands after `generic`: it is chosen by name only.
const Candidate candidates[] = {
#if defined(__x86_64__)
    {&kernels_avx512_bf16, has_avx512_bf16},
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_generic, always},
    {&kernels_emulated, always},
};
constexpr int kCandidates = sizeof candidates / sizeof candidates[0];

const Candidate* find(const char* name) {
  for (const Candidate& candidate : candidates) {
    if (std::strcmp(candidate.kernels->name, name) == 0) return &candidate;
  }
  return nullptr;
}

const Kernels* fastest() {
  for (const Candidate& candidate : candidates) {
    if (candidate.supported()) return candidate.kernels;
  }
  return &kernels_generic;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> chosen{fastest()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

}  // namespace flashmla

extern "C" {

const char* const* flashmla_isa_names(void) {
  static const char* names[flashmla::kCandidates + 1] = {};
  for (int i = 0; i < flashmla::kCandidates; i++) names[i] = flashmla::candidates[i].kernels->name;
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
