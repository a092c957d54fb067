#pragma once

namespace flashmla {

// Whether there are kernels of an instruction set, and the processor runs it.
bool runs_here(const char* isa);

// Whether the processor has an instruction for it, whichever kernels are in use.
bool multiplies_bf16();

}  // namespace flashmla
