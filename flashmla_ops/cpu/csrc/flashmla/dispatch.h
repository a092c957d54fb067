#pragma once

#include "flashmla/kernels.h"

namespace flashmla {

// The kernels in use. The loader gives some (flashmla_use) before the first call.
const Kernels& kernels();

}  // namespace flashmla
