// Kept apart from the binding: it is the only file that includes a header of c10, which is not part of the stable ABI.
// The build is keyed on torch's version for that.
#include "flashmla/requires_grad.h"

#include <c10/core/TensorImpl.h>

bool flashmla_requires_grad(const AtenTensorOpaque* tensor) {
  // A handle points to an at::Tensor, whose only member is this pointer.
  return (*reinterpret_cast<const c10::intrusive_ptr<c10::TensorImpl>*>(tensor))->requires_grad();
}
