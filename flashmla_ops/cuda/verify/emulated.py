"""An engine of `flashmla_ops.cuda.attention` whose device is the emulator: tensors of the CPU in, and out again.

A launch sees addresses and strides only, as on a device. Results and workspace are memory that was never written, and
everything else that a kernel reads is what the caller put there, so a hazard of the emulator is a fault of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutlass_kernels import emulator
from cutlass_kernels.attention import libraries
from cutlass_kernels.attention.config import Config
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda.catalogue import DEVICES
from flashmla_ops.cuda.driver import Grid, Launch, Values, pack
from flashmla_ops.cuda.engine import Engine

#: Parameters whose memory a kernel writes before anything reads it.
WRITTEN = frozenset(
    {"to.out", "to.lse", "to.out_parts", "to.lse_parts", "to.spans", "out", "lse", "sums", "logs", "schedule"}
)
#: Those that it writes a part of.
UPDATED = frozenset({"cache"})


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """The whole storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


@dataclass
class Emulated:
    """Launches of one call on an emulated device: their reports are `machine.launches`."""

    device: Device
    options: emulator.Options
    arch: str = "sm_80"
    memory: int = 1 << 28
    places: dict[int, tuple[emulator.DeviceArray, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = emulator.Device(self.arch, self.options, self.memory)
        self.configs: list[Config] = []

    @property
    def engine(self) -> Engine:
        return Engine(self.device, self.prepare)

    def prepare(self, config: Config, grid: Grid, values: Values) -> Launch:
        return lambda tensors: self.run(config, grid, {**values, **tensors})

    def run(self, config: Config, grid: Grid, values: Values) -> None:
        built = libraries.build(config, self.arch)
        self.machine.load_ptx(built.ptx)
        self.configs.append(config)
        addresses = {name: self._address(name, value) for name, value in values.items()}
        self.machine.launch(
            built.entry, grid, (config.threads, 1, 1), pack(built.parameters, addresses), config.shared_bytes
        )
        for name in (WRITTEN | UPDATED) & values.keys():
            if isinstance(value := values[name], Tensor):
                array, tensor = self.places[value.untyped_storage().data_ptr()]
                bytes_of(tensor)[:] = array.numpy()

    def _address(self, name: str, value: Tensor | int | float | None) -> int | float | None:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.nbytes() == 0:
            return 0
        if storage.data_ptr() not in self.places:
            held = bytes_of(value)
            array = self.machine.empty(held.shape) if name in WRITTEN else self.machine.array(held)
            self.places[storage.data_ptr()] = (array, value)
        return self.places[storage.data_ptr()][0].pointer + int(value.storage_offset()) * value.element_size()

    @property
    def hazards(self) -> list[emulator.Hazard]:
        return [hazard for launch in self.machine.launches for hazard in launch.hazards]


def device(multiprocessors: int, arch: str = "sm_80") -> Device:
    """One with few multiprocessors, so that small cases are cut into parts."""
    return replace(DEVICES[arch], multiprocessors=multiprocessors)
