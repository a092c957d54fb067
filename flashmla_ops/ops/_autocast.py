"""Our operators under ``torch.autocast``, as torch's own `scaled_dot_product_attention`: floating inputs are cast.

What is cast, and to what, is each operator's rule. A cache is never cast, since that would copy it: operators that read
or write one cast what comes with it to the cache's dtype. Float64 and integers, scales, sinks and log-sum-exps stay as
they are, and so do ``out=`` overloads, as in torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

A = TypeVar("A", bound=Any)
#: From the autocast dtype and the arguments to the arguments that the operator runs with.
Rule = Callable[..., tuple[Any, ...]]
KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


def register(library: torch.library.Library, op: torch._ops.OpOverload, rule: Rule) -> None:
    for device, key in KEYS.items():
        library.impl(op.name(), _kernel(op, rule, device, torch._C.DispatchKeySet(key)), key.name)


def _kernel(op: torch._ops.OpOverload, rule: Rule, device: str, keys: torch._C.DispatchKeySet) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*rule(torch.get_autocast_dtype(device), *args))

    return kernel


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor that autocast casts, in ``dtype``; everything else (None, integers, float64) as it is."""
    castable = isinstance(value, Tensor) and value.dtype in CASTABLE and dtype in CASTABLE
    return value.to(dtype) if castable else value


def all_cast(dtype: torch.dtype, a: A) -> A:
    """The rule that casts every floating tensor."""
    return dataclasses.replace(a, **{name: cast(value, dtype) for name, value in vars(a).items()})
