#pragma once

#include "flashmla/kernels.h"

namespace flashmla {

// The kernels in use.
const Kernels& kernels();

}  // namespace flashmla
