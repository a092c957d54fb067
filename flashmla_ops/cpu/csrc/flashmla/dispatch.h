#pragma once

#include "flashmla/kernels.h"

namespace flashmla {

// The kernels in use.
const Kernels& kernels();

// Whether the processor has an instruction for it, whichever kernels are in use.
bool multiplies_bf16();

}  // namespace flashmla
