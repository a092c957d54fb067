"""Stand-ins for compiled kernels that read a call of the C ABI literally, on CPU memory, in float64.

They see addresses, strides and sizes only, as a kernel does, so a launcher that fills a call wrongly is found out
without a device.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cutlass_kernels.gemm.abi import Call, GemmCall, GroupedGemmCall
from cutlass_kernels.gemm.catalogue import kernels
from cutlass_kernels.gemm.config import BYTES, GemmConfig
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda.launch import NAMES, Launcher
from flashmla_ops.reference.gemm import ACTIVATIONS

A100 = Device((8, 0), 108, 166912)
H100 = Device((9, 0), 132, 232448)
TYPES = {name: dtype for dtype, name in NAMES.items()}


def view(address: int, shape: tuple[int, ...], strides: tuple[int, ...], element: str) -> Tensor:
    """Memory as a tensor; writable, and alive only as long as its owner."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * (last * BYTES[element])).from_address(address))
    return torch.from_numpy(raw).view(TYPES[element]).as_strided(shape, strides)


@dataclass
class Interpreter:
    """Runs calls for one configuration and remembers them."""

    config: GemmConfig
    calls: list[Call] = field(default_factory=list)
    scratch: int = 0

    def refuses(self, call: Call) -> str | None:
        places = [call.a, call.weight, call.d]
        places += [stride * BYTES[self.config.weight] for stride in call.weight_stride]
        if isinstance(call, GemmCall):
            places += [call.c or 0, call.bias or 0, call.col_scale or 0]
            for name, element in (("a", self.config.a), ("c", self.config.d), ("d", self.config.d)):
                places += [stride * BYTES[element] for stride in getattr(call, f"{name}_stride")]
        else:
            places += [call.a_stride * BYTES[self.config.a], call.d_stride * BYTES[self.config.d]]
        return "misaligned operand" if any(place % 16 for place in places) else None

    def workspace(self, call: Call) -> int:
        return self.scratch

    def run(self, call: Call, stream: int) -> None:
        assert stream == 7
        assert call.workspace_bytes == self.scratch
        self.calls.append(call)
        if isinstance(call, GroupedGemmCall):
            self._grouped(call)
        else:
            self._gemm(call)

    def _gemm(self, call: GemmCall) -> None:
        config, epilogue = self.config, self.config.epilogue
        a = view(call.a, (call.batch, call.m, call.k), (call.a_stride[1], call.a_stride[0], 1), config.a)
        rows = (call.k, call.n) if config.family == "batched" else (call.n, call.k)
        weight = view(
            call.weight, (call.batch, *rows), (call.weight_stride[1], call.weight_stride[0], 1), config.weight
        )
        d = view(call.d, (call.batch, call.m, call.n), (call.d_stride[1], call.d_stride[0], 1), config.d)
        right = weight if config.family == "batched" else weight.mT
        value = call.alpha * (a.double() @ right.double())
        if epilogue.col_scale and call.col_scale:
            value = value * view(call.col_scale, (call.n,), (1,), "f32").double()
        if epilogue.bias and call.bias:
            value = value + view(call.bias, (call.n,), (1,), config.d).double()
        value = ACTIVATIONS[epilogue.activation](value)
        if call.c:
            assert epilogue.reads_c
            c = view(call.c, (call.batch, call.m, call.n), (call.c_stride[1], call.c_stride[0], 1), config.d).double()
            value = value * torch.nn.functional.silu(c) if epilogue.gate else value + c * (call.beta or 1.0)
        d.copy_(value)

    def _grouped(self, call: GroupedGemmCall) -> None:
        starts = view(call.offsets, (call.groups + 1,), (1,), "f32").view(torch.int32).tolist()
        stride = (call.weight_stride[1], call.weight_stride[0], 1)
        weight = view(call.weight, (call.groups, call.n, call.k), stride, self.config.weight).double()
        a = view(call.a, (call.rows, call.k), (call.a_stride, 1), self.config.a).double()
        d = view(call.d, (call.rows, call.n), (call.d_stride, 1), self.config.d)
        for group in range(call.groups):
            rows = slice(starts[group], starts[group + 1])
            d[rows] = (call.alpha * a[rows] @ weight[group].T).to(d.dtype)


@dataclass
class Fleet:
    """A launcher whose kernels are interpreters, made as they are asked for."""

    device: Device = A100
    built: frozenset[GemmConfig] = frozenset(kernels())
    scratch: int = 0
    kernels: dict[GemmConfig, Interpreter] = field(default_factory=dict)

    def launcher(self) -> Launcher:
        def kernel(config: GemmConfig) -> Interpreter:
            return self.kernels.setdefault(config, Interpreter(config, scratch=self.scratch))

        return Launcher(torch.device("cpu"), self.device, self.built, kernel, lambda: 7)

    @property
    def launches(self) -> list[tuple[GemmConfig, Call]]:
        return [(config, call) for config, kernel in self.kernels.items() for call in kernel.calls]
