"""The rules that autograd gets for our operators, for all of them in one place: kernels at two dispatch keys of torch.

At the Autograd key an operator with a backward (`_backward`) is differentiated where a gradient is asked for, and one
without refuses. Nowhere below would do: under `torch.func` and `torch.autograd.forward_ad` kernels see plain tensors,
without the wrapper or the tangent that asks for a derivative, and the derivative of what they return would be zero. At
the ADInplaceOrView key the version of every tensor that an operator writes to goes up, which is how a backward learns
that a tensor saved for it has changed.

Every call passes here, so both are C++ (`cpu/csrc/autograd.cpp`) where that could be compiled. `complete` registers the
same in Python for operators that have no such kernel. C++ differentiates nothing itself: it hands such a call to the
kernel in Python, which it finds at an operator of its own, with the same schema (`twin`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashmla_ops.errors import FlashMLAError, NotDifferentiableError

if TYPE_CHECKING:
    from flashmla_ops.ops._backward import Differentiation, Last


def raise_refusal(op: str, argument: str) -> None:
    """The implementation of ``flashmla::_refuse_gradient``, by which C++ raises an exception of Python's."""
    raise NotDifferentiableError(op, argument)


def twin(name: str) -> str:
    """The operator by which C++ reaches the kernel that differentiates operator ``name``."""
    return f"_differentiated_{name}"


def complete(
    library: torch.library.Library,
    operators: Mapping[str, torch._ops.OpOverload],
    backwards: Mapping[str, Differentiation | Last],
) -> None:
    """Register the kernels of both keys for those of ``operators`` that have none yet.

    ``backwards``: how those of them are differentiated that can be.
    """
    for name, op in operators.items():
        kernel, backward = _autograd(op, backwards.get(name)), backwards.get(name)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Autograd"):
            library.impl(op.name(), kernel, "Autograd", with_keyset=True)
        if backward is not None:
            library.impl(twin(name), kernel, "Autograd", with_keyset=True)
        mutable = op._schema.is_mutable
        if mutable and not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "ADInplaceOrView"):
            library.impl(op.name(), _mutation(op), "ADInplaceOrView", with_keyset=True)


def _autograd(op: torch._ops.OpOverload, backward: Differentiation | Last | None) -> Callable[..., Any]:
    name = op._schema.name.removeprefix("flashmla::")
    differentiated = None if backward is None else backward.kernel(op)

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        asked = [argument for argument, tensor in _tensors(op, args, kwargs) if _requires_grad(tensor)]
        for argument, tensor in _tensors(op, args, kwargs):
            if _has_tangent(tensor):
                raise NotDifferentiableError(name, argument, "" if backward is None else "in forward mode")
        if asked and differentiated is not None:
            return differentiated(keys, asked, *args, **kwargs)
        if asked:
            raise NotDifferentiableError(name, asked[0])
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


def _mutation(op: torch._ops.OpOverload) -> Callable[..., Any]:
    written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        mutated = [tensor for name, tensor in _tensors(op, args, kwargs) if name in written]
        if any(tensor.is_inference() for tensor in mutated) and not torch.is_inference_mode_enabled():
            # In torch's words: such a tensor has no version that could be counted.
            raise FlashMLAError("Inplace update to inference tensor outside InferenceMode is not allowed.")
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        torch.autograd.graph.increment_version([tensor for tensor in mutated if not tensor.is_inference()])
        return result

    return kernel


def _requires_grad(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _has_tangent(tensor: Tensor) -> bool:
    """Whether it is a dual number, whose derivative is taken forward."""
    return torch._C._is_fwd_grad_enabled() and forward_ad.unpack_dual(tensor).tangent is not None


def _tensors(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a call with their names, which are ``outs[1]`` in a list."""
    named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    for name, value in named.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", x) for i, x in enumerate(value) if isinstance(x, Tensor))
