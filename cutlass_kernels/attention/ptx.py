"""PTX instructions as functions of CuTe DSL values: what a kernel's source calls where CuTe has no name for it.

Global addresses are Int64, shared ones Int32 (in bytes); an offset that is known when the kernel is built becomes part
of the instruction. Names and operands: the PTX ISA manual, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx

from cutlass_kernels.attention.config import PTX_TYPES

#: The architecture that this process compiles for, which `compile` sets: sm_90a, say.
TARGET = "sm_80"
#: A value of the DSL, whose class is known only where a kernel is traced.
Value = Any


def is_for(capability: int) -> bool:
    """Whether the kernel needs to run on no device below this compute capability, times 10."""
    return int(TARGET.removeprefix("sm_").rstrip("a")) >= capability


def _get(instruction: str, results: Sequence[Any], *inputs: Value) -> list[Value]:
    """The results of an instruction of which ``{0}`` is the place of all results together."""
    places = ", ".join(f"{{$w{i}}}" for i in range(len(results)))
    text = instruction.replace("{0}", f"{{{places}}}" if len(results) > 1 else places)
    found = inline_ptx(text, write_only_types=list(results), read_only_args=list(inputs))
    return list(found) if len(results) > 1 else [found]


def _list(first: int, count: int) -> str:
    """``count`` inputs from the first-th on, as a vector if they are several."""
    text = ", ".join(f"{{$r{first + i}}}" for i in range(count))
    return f"{{{text}}}" if count > 1 else text


def _vector(count: int) -> str:
    return f".v{count}" if count > 1 else ""


# Global memory


def load(address: Value, offset: int = 0, kind: Any = Uint32) -> Value:
    """32 bits that nothing writes while the kernel runs."""
    return _get(f"ld.global.nc.b32 {{0}}, [{{$r0}}+{offset}];", [kind], address)[0]


def load_floats(address: Value, count: int, offset: int = 0) -> list[Value]:
    return _get(f"ld.global{_vector(count)}.f32 {{0}}, [{{$r0}}+{offset}];", [Float32] * count, address)


def load_words(address: Value, count: int, offset: int = 0, kind: str = "b32") -> list[Value]:
    """As `load`, several at once; ``kind``: the type in the instruction. One of fewer bits gets zeros above it."""
    return _get(f"ld.global.nc{_vector(count)}.{kind} {{0}}, [{{$r0}}+{offset}];", [Uint32] * count, address)


def load_wide(address: Value) -> Value:
    """As `load`, 64 bits."""
    return _get("ld.global.nc.b64 {0}, [{$r0}];", [Int64], address)[0]


def store(address: Value, values: Sequence[Value], kind: str, offset: int = 0) -> None:
    """``kind``: the type in the instruction, as b32."""
    text = f"st.global{_vector(len(values))}.{kind} [{{$r0}}+{offset}], {_list(1, len(values))};"
    inline_ptx(text, read_only_args=[address, *values])


def load_vector(address: Value, count: int, offset: int = 0) -> list[Value]:
    """As `load`, of 32-bit values side by side."""
    return _get(f"ld.global.nc{_vector(count)}.b32 {{0}}, [{{$r0}}+{offset}];", [Uint32] * count, address)


def load_global_byte(address: Value, offset: int = 0) -> Value:
    return _get(f"ld.global.nc.u8 {{0}}, [{{$r0}}+{offset}];", [Uint32], address)[0]


def prefetch(address: Value, offset: int = 0) -> None:
    """Bring the line of this address to L2."""
    inline_ptx(f"prefetch.global.L2 [{{$r0}}+{offset}];", read_only_args=[address])


def copy16(shared: Value, address: Value, size: Value, offset: int = 0) -> None:
    """Begin to copy ``size`` (0 or 16) bytes to shared memory, which takes 16: the rest becomes zeros."""
    text = f"cp.async.cg.shared.global [{{$r0}}+{offset}], [{{$r1}}+{offset}], 16, {{$r2}};"
    inline_ptx(text, read_only_args=[shared, address, size])


def copy16_to(shared: Value, address: Value, size: Value, to: int, at: int) -> None:
    """`copy16` with an offset of its own on either side."""
    text = f"cp.async.cg.shared.global [{{$r0}}+{to}], [{{$r1}}+{at}], 16, {{$r2}};"
    inline_ptx(text, read_only_args=[shared, address, size])


def copy8(shared: Value, address: Value, size: Value) -> None:
    """As `copy16`, of 8 bytes."""
    inline_ptx("cp.async.ca.shared.global [{$r0}], [{$r1}], 8, {$r2};", read_only_args=[shared, address, size])


# Shared memory


def load_shared(address: Value, count: int = 1, offset: int = 0, kind: Any = Float32) -> list[Value]:
    name = "f32" if kind is Float32 else "b32"
    return _get(f"ld.shared{_vector(count)}.{name} {{0}}, [{{$r0}}+{offset}];", [kind] * count, address)


def load_byte(address: Value) -> Value:
    return _get("ld.shared.u8 {0}, [{$r0}];", [Uint32], address)[0]


def load_two_bytes(address: Value, offset: int = 0) -> Value:
    return _get(f"ld.shared.u16 {{0}}, [{{$r0}}+{offset}];", [Uint32], address)[0]


def load_shared_wide(address: Value) -> Value:
    return _get("ld.shared.b64 {0}, [{$r0}];", [Int64], address)[0]


def or_shared(address: Value, value: Value) -> None:
    """Set the bits of ``value``; several threads may at once."""
    inline_ptx("red.shared.or.b32 [{$r0}], {$r1};", read_only_args=[address, value])


def store_shared(address: Value, values: Sequence[Value], kind: str, offset: int = 0) -> None:
    text = f"st.shared{_vector(len(values))}.{kind} [{{$r0}}+{offset}], {_list(1, len(values))};"
    inline_ptx(text, read_only_args=[address, *values])


def anew(value: Value) -> Value:
    """The same number, of which the compiler knows nothing: what follows from it is not kept, but computed again."""
    return _get("mov.b32 {0}, {$r0};", [Int32], value)[0]


def barrier(number: Value, threads: int) -> None:
    """Wait until this many threads have come; their accesses to shared memory before it are visible after it."""
    inline_ptx(f"bar.sync {{$r0}}, {threads};", read_only_args=[number])


def ldmatrix(address: Value, offset: int = 0, *, transposed: bool = False) -> list[Value]:
    """Four 8x8 matrices of 16-bit elements; a lane's address is a row of one of them."""
    trans = ".trans" if transposed else ""
    return _get(f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{0}}, [{{$r0}}+{offset}];", [Uint32] * 4, address)


# Arithmetic


def mma(sums: Sequence[Value], a: Sequence[Value], b: Sequence[Value], dtype: str) -> list[Value]:
    """sums [16, 8] + a [16, 16] b [16, 8] by one warp; ``dtype``: bf16 or fp16."""
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{PTX_TYPES[dtype]}.{PTX_TYPES[dtype]}.f32"
    return _get(f"{name} {{0}}, {_list(0, 4)}, {_list(4, 2)}, {_list(6, 4)};", [Float32] * 4, *a, *b, *sums)


def pack(low: Value, high: Value, dtype: str) -> Value:
    """Two float32 rounded to 16 bits each."""
    return _get(f"cvt.rn.{PTX_TYPES[dtype]}x2.f32 {{0}}, {{$r1}}, {{$r0}};", [Uint32], low, high)[0]


def exp2(value: Value) -> Value:
    return _get("ex2.approx.ftz.f32 {0}, {$r0};", [Float32], value)[0]


def exp2_subnormal(value: Value) -> Value:
    """As `exp2`, down to the least subnormal number."""
    return _get("ex2.approx.f32 {0}, {$r0};", [Float32], value)[0]


def log2(value: Value) -> Value:
    return _get("lg2.approx.ftz.f32 {0}, {$r0};", [Float32], value)[0]


def fma(value: Value, factor: Value, addend: Value) -> Value:
    return _get("fma.rn.ftz.f32 {0}, {$r0}, {$r1}, {$r2};", [Float32], value, factor, addend)[0]


def maximum(first: Value, second: Value) -> Value:
    """The larger one; a NaN gives way to a number."""
    return _get("max.f32 {0}, {$r0}, {$r1};", [Float32], first, second)[0]


def quotient(value: Value, divisor: Value) -> Value:
    """Of two float32, rounded to nearest."""
    return _get("div.rn.f32 {0}, {$r0}, {$r1};", [Float32], value, divisor)[0]


def multiply_add(a: Value, b: Value, c: Value) -> Value:
    """a b + c, rounded once."""
    return _get("fma.rn.f32 {0}, {$r0}, {$r1}, {$r2};", [Float32], a, b, c)[0]


def nearest(value: Value) -> Value:
    """The integer next to a float32, ties to even."""
    return _get("cvt.rni.s32.f32 {0}, {$r0};", [Int32], value)[0]


def ceiling(value: Value) -> Value:
    """The least integer that is no less than a float32."""
    return _get("cvt.rpi.s32.f32 {0}, {$r0};", [Int32], value)[0]


def half_to_float(word: Value) -> Value:
    """From the lower 16 bits."""
    return _get("{ .reg .b16 half; cvt.u16.u32 half, {$r0}; cvt.f32.f16 {0}, half; }", [Float32], word)[0]


def warp_or(value: Value) -> Value:
    """The bits that any lane of the warp has set."""
    return _get("redux.sync.or.b32 {0}, {$r0}, 0xffffffff;", [Uint32], value)[0]


def lowest_bit(value: Value) -> Value:
    """The number of the lowest bit that is set."""
    return _get("{ .reg .b32 turned; brev.b32 turned, {$r0}; clz.b32 {0}, turned; }", [Int32], value)[0]


def divide(value: Value, magic: Value, shift: Value) -> Value:
    """value // divisor for 0 <= value < 2 ** 31, by the numbers that `magic_of` gives."""
    text = "{ .reg .b64 wide; mul.wide.u32 wide, {$r0}, {$r1}; shr.u64 wide, wide, {$r2}; cvt.u32.u64 {0}, wide; }"
    return _get(text, [Int32], value, magic, shift)[0]


def from_e4m3(word: Value) -> list[Value]:
    """Four numbers from their codes: sm_89 and newer."""
    text = (
        "{ .reg .b16 low, high; .reg .b32 x, y; mov.b32 {low, high}, {$r0}; cvt.rn.f16x2.e4m3x2 x, low; "
        "cvt.rn.f16x2.e4m3x2 y, high; mov.b32 {$w0}, x; mov.b32 {$w1}, y; }"
    )
    wider = "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.f32.f16 {$w0}, low; cvt.f32.f16 {$w1}, high; }"
    halves = _get(text, [Uint32, Uint32], word)
    return [number for half in halves for number in _get(wider, [Float32, Float32], half)]


def bits(value: Value, kind: Any) -> Value:
    """The same 32 bits as another type."""
    return _get("mov.b32 {0}, {$r0};", [kind], value)[0]


def shift_right(value: Value, count: int) -> Value:
    """Arithmetic: the sign comes in from the left."""
    return _get(f"shr.s32 {{0}}, {{$r0}}, {count};", [Uint32], value)[0]


def byte(value: Value, which: int, filled: int) -> Value:
    """The byte of ``value``, and the upper three of ``filled``."""
    return _get(f"prmt.b32 {{0}}, {{$r0}}, {filled}, {0x7650 + which};", [Uint32], value)[0]
