// The instruction set that this translation unit is compiled for: FLASHMLA_ISA is its name, and the compiler's flags
// are that set's. Everything behind this header is in a namespace of that name.
#pragma once

#if defined(__AVX512F__)
#include "flashmla/isa/avx512.h"
#elif defined(__AVX2__)
#include "flashmla/isa/avx2.h"
#else
#include "flashmla/isa/emulated.h"
#endif

namespace flashmla {
namespace FLASHMLA_ISA {

#if defined(__AVX512BF16__)
using Isa = Avx512<true>;
#elif defined(__AVX512F__)
using Isa = Avx512<false>;
#elif defined(__AVX2__)
using Isa = Avx2;
#elif defined(FLASHMLA_EMULATE)
using Isa = Emulated;
#else
using Isa = Portable<4, false>;
#endif

}  // namespace FLASHMLA_ISA
}  // namespace flashmla
