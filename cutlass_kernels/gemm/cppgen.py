"""The only door to ``cutlass_cppgen`` (package nvidia-cutlass, 4.2): a configuration goes in, CUTLASS C++ comes out.

cutlass_cppgen is made to generate, compile and run on a machine with a GPU. Everything that we do differently from its
documentation is in this file, each with its reason:

1. Its public plans (`cutlass_cppgen.op.Gemm`) are bypassed for the operation classes below them. A plan asks the device
   for its compute capability and its driver version, builds a registry of every kernel of every architecture (11 to 15
   seconds), refuses what that registry lacks (s8 in, bf16 out on sm_80), and takes only tiles with a profiled twin.
2. `epilogue.trace` gets ``cc``: without it, it asks the device.
3. Its string form uses two modules that it forgot to import. They are put where it looks for them.
4. On sm_90, a tile description is that of a cluster: the tile of a block times the cluster.
5. `GroupedGemm` describes A with B's layout. The operation class takes what we say.
6. Names of emitted types do not say the epilogue, nor the schedule of k: two kernels could share one, and with it
   CUTLASS's static members once both are loaded. `generate` renames them.
7. Importing it makes a database of compiled kernels in the current folder, which nothing here uses. It gets one in
   memory.
"""

from __future__ import annotations

import ast
import contextlib
import sqlite3
import sys
import textwrap
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from cutlass_kernels.errors import MissingToolError
from cutlass_kernels.gemm.config import BYTES, GemmConfig

HOW_TO_GET_IT = "pip install 'nvidia-cutlass==4.2.0.0' (or this package's extra: cutlass)"


def load() -> Any:
    """The module `cutlass_cppgen`. Raises `MissingToolError` without it."""
    try:
        with _database_in_memory():
            import cutlass_cppgen
            import cutlass_cppgen.backend
    except ImportError as error:
        raise MissingToolError(f"generating kernels needs cutlass_cppgen ({error}): {HOW_TO_GET_IT}") from error
    from cutlass_cppgen.epilogue import epilogue

    epilogue.ast, epilogue.textwrap = ast, textwrap  # work-around 3
    return cutlass_cppgen


@contextlib.contextmanager
def _database_in_memory() -> Iterator[None]:  # work-around 7
    if "cutlass_cppgen.backend" in sys.modules:
        yield
        return
    connect = sqlite3.connect

    def connect_elsewhere(database: Any, *args: Any, **kwargs: Any) -> Any:
        return connect(":memory:" if database == "compiled_cache.db" else database, *args, **kwargs)

    with patch.object(sqlite3, "connect", connect_elsewhere):
        yield


def version() -> str:
    """CUTLASS's version."""
    return str(load().__version__)


def include_folder() -> str:
    """The CUTLASS headers that the generated source is made for."""
    return f"{load().source_path}/include"


def emit(config: GemmConfig) -> tuple[str, str]:
    """The C++ that defines the kernel type, and the name that it gives to it."""
    cutlass = load()
    from cutlass_cppgen.backend.gemm_operation import GemmOperationGrouped, GemmOperationUniversal
    from cutlass_cppgen.backend.library import SchedulerMode

    swizzle = cutlass.swizzle.ThreadblockSwizzleStreamK if config.stream_k else cutlass.swizzle.IdentitySwizzle1
    parts = (_tile(config), *_tensors(config), _epilogue(config))
    if config.family == "grouped":
        operation = GemmOperationGrouped(80, *parts, swizzle, precompute_mode=SchedulerMode.Device)
    elif config.arch == "sm_80":
        operation = GemmOperationUniversal(80, *parts, swizzle)
    else:
        operation = GemmOperationUniversal(90, *parts)  # stream-K is in the tile there
    return operation.rt_module.emit(), operation.procedural_name()


def _types() -> dict[str, Any]:
    from cutlass_library import DataType

    names = {"bf16": "bf16", "fp16": "f16", "e4m3": "e4m3", "s8": "s8", "f32": "f32"}
    return {ours: getattr(DataType, theirs) for ours, theirs in names.items()}


def _tile(config: GemmConfig) -> Any:
    from cutlass_cppgen.backend.library import TileDescription
    from cutlass_library import (
        DataType,
        EpilogueScheduleType,
        KernelScheduleType,
        MathInstruction,
        MathOperation,
        OpcodeClass,
        TileSchedulerType,
    )

    types = _types()
    integer = config.weight == config.a == "s8"
    operation = MathOperation.multiply_add
    if integer:  # the only one that CUTLASS has; sums saturate past 2^31, which takes a k of 133,000
        operation = MathOperation.multiply_add_saturate
    elif config.a != config.weight:
        operation = MathOperation.multiply_add_mixed_input_upcast
    depth = 32 // BYTES[config.a]  # 32 bytes of k an instruction, on both architectures
    shape = [16, 8, depth] if config.arch == "sm_80" else [64, config.tile[1], depth]
    sums = DataType.s32 if integer else DataType.f32
    instruction = MathInstruction(shape, types[config.a], types[config.weight], sums, OpcodeClass.TensorOp, operation)
    if config.arch == "sm_80":
        return TileDescription(list(config.tile), config.stages, list(config.warps), instruction)
    cooperative = config.schedule == "cooperative"
    kernel, epilogue = KernelScheduleType.TmaWarpSpecializedPingpong, EpilogueScheduleType.TmaWarpSpecialized
    if cooperative:
        kernel = KernelScheduleType.TmaWarpSpecializedCooperative
        epilogue = EpilogueScheduleType.TmaWarpSpecializedCooperative
    cluster_tile = [size * count for size, count in zip(config.tile, config.cluster, strict=True)]  # work-around 4
    scheduler = TileSchedulerType.StreamK if config.stream_k else TileSchedulerType.Default
    return TileDescription(cluster_tile, 0, [4, 1, 1], instruction, list(config.cluster), kernel, epilogue, scheduler)


def _tensors(config: GemmConfig) -> tuple[Any, Any, Any]:
    from cutlass_cppgen.backend.library import TensorDescription
    from cutlass_library import LayoutType

    types = _types()
    weight = LayoutType.RowMajor if config.family == "batched" else LayoutType.ColumnMajor
    return (
        TensorDescription(types[config.a], LayoutType.RowMajor, config.alignment("a")),
        TensorDescription(types[config.weight], weight, config.alignment("weight")),
        TensorDescription(types[config.d], LayoutType.RowMajor, config.alignment("d")),
    )


def _epilogue(config: GemmConfig) -> Any:
    from cutlass_cppgen.backend.epilogue import LinearCombination
    from cutlass_library import DataType

    if config.epilogue.plain:
        return LinearCombination(_types()[config.d], config.alignment("d"), DataType.f32, DataType.f32)

    from cutlass_cppgen.backend.evt import EpilogueFunctorVisitor
    from cutlass_cppgen.backend.evt.ir.tensor import Tensor
    from cutlass_library import LayoutType

    def example(*shape: int, element: Any = DataType.f32) -> Any:
        return Tensor(element=element, shape=shape, layout_tag=LayoutType.RowMajor)

    cc = 80 if config.arch == "sm_80" else 90
    output = _types()[config.d]
    m, n = 256, 512  # examples only tell shapes apart: [m, n], [m, 1], [n]
    examples = {
        "accum": example(m, n),
        "alpha": 1.5,
        "row_scale": example(m, 1),
        "col_scale": example(n),
        "bias": example(n, element=output),
        "C": example(m, n, element=output),
        "D": example(m, n, element=output),
    }
    visitor = load().epilogue.trace(config.epilogue.source(), examples, cc=cc)  # work-around 2
    return EpilogueFunctorVisitor(cc, visitor)
