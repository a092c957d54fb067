#pragma once

struct AtenTensorOpaque;

// Whether a tensor requires a gradient: the one question that the stable ABI has no function for.
bool flashmla_requires_grad(const AtenTensorOpaque* tensor);
