// The instruction sets that there are kernels for, the fastest on this processor first, and which of them it runs.
#include "flashmla/isas.h"

#include <array>
#include <cstring>
#include <utility>

#include "flashmla/interface.h"

#if defined(__x86_64__)
#define FLASHMLA_X86 1
#else
#define FLASHMLA_X86 0
#endif

namespace flashmla {
namespace {

struct Isa {
  const char* name;
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

constexpr int kIsas = FLASHMLA_X86 ? 5 : 2;

// `emulated` stands after `generic`: it is chosen by name only.
const std::array<Isa, kIsas>& isas() {
  static const std::array<Isa, kIsas> ordered = [] {
    std::array<Isa, kIsas> all = {{
#if FLASHMLA_X86
        {"avx512_bf16", has_avx512_bf16},
        {"avx512", has_avx512},
        {"avx2", has_avx2},
#endif
        {"generic", always},
        {"emulated", always},
    }};
#if FLASHMLA_X86
    if (bf16_pairs_are_slow()) std::swap(all[0], all[1]);
#endif
    return all;
  }();
  return ordered;
}

}  // namespace

bool runs_here(const char* isa) {
  for (const Isa& known : isas()) {
    if (std::strcmp(known.name, isa) == 0) return known.supported();
  }
  return false;
}

bool multiplies_bf16() { return runs_here("avx512_bf16"); }

}  // namespace flashmla

extern "C" {

const char* const* flashmla_isa_names(void) {
  static const char* names[flashmla::kIsas + 1] = {};
  for (size_t i = 0; i < flashmla::kIsas; i++) names[i] = flashmla::isas()[i].name;
  return names;
}

int flashmla_isa_supported(const char* name) { return flashmla::runs_here(name); }
}
