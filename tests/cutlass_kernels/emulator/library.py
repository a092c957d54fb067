"""Shared libraries as nvcc makes them, made without nvcc: host code, a registered fatbin with PTX, launches."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from cutlass_kernels.emulator.runtime import build
from flashmla_build import compiler

SONAME = "libcudart.so.13"

#: One kernel k(unsigned* in, unsigned* out): `run` launches it and reports what the runtime says.
HOST = """
#include <cstddef>
struct Dim3 { unsigned x, y, z; };
struct Attribute { int id; char padding[4]; union { char bytes[64]; Dim3 cluster; } value; };
struct Config { Dim3 grid, block; size_t shared; void* stream; Attribute* attributes; unsigned count; };
struct Wrapper { unsigned magic, version; const void* data; void* file; };
extern "C" {
void** __cudaRegisterFatBinary(void*);
void __cudaRegisterFatBinaryEnd(void**);
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*);
int cudaLaunchKernelExC(const Config*, const void*, void**);
int cudaFuncSetAttribute(const void*, int, int);
int cudaMemsetAsync(void*, int, size_t, void*);
int cudaMalloc(void**, size_t);
int cudaDeviceGetAttribute(int*, int, int);
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, const void*, int, size_t);
int cudaGetLastError();
%(extra_declaration)s
}
alignas(8) static const unsigned char fatbin[] = {%(fatbin)s};
static Wrapper wrapper = {0x466243b1, 1, fatbin, nullptr};
static char stub;
__attribute__((constructor)) static void load() {
    void** handle = __cudaRegisterFatBinary(&wrapper);
    __cudaRegisterFunction(handle, &stub, &stub, "k", -1, nullptr, nullptr, nullptr, nullptr, nullptr);
    __cudaRegisterFatBinaryEnd(handle);
}
extern "C" int run(void* in, void* out, unsigned ctas, unsigned threads, unsigned shared, unsigned cluster) {
    %(extra_call)s
    if (shared > 49152 && cudaFuncSetAttribute(&stub, 8, shared)) return -1;
    Attribute attribute{4, {}, {}};
    attribute.value.cluster = {cluster, 1, 1};
    Config config{{ctas, 1, 1}, {threads, 1, 1}, shared, nullptr, &attribute, cluster > 1};
    void* arguments[] = {&in, &out};
    cudaLaunchKernelExC(&config, &stub, arguments);
    return cudaGetLastError();
}
extern "C" int large(void* in, void* out, unsigned shared) {
    Config config{{1, 1, 1}, {32, 1, 1}, shared, nullptr, nullptr, 0};
    void* arguments[] = {&in, &out};
    return cudaLaunchKernelExC(&config, &stub, arguments);
}
extern "C" int clear(void* out, size_t bytes) { return cudaMemsetAsync(out, 0, bytes, nullptr); }
extern "C" void* allocate(size_t bytes) { void* p = nullptr; return cudaMalloc(&p, bytes) ? nullptr : p; }
extern "C" int attribute(int which) { int v = -1; return cudaDeviceGetAttribute(&v, which, 0) ? -1 : v; }
extern "C" int occupancy(int threads, size_t shared) {
    int blocks = -1;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, &stub, threads, shared);
    return blocks;
}
"""


def fatbin_of(text: str, *, flags: int = 0, body: bytes | None = None) -> bytes:
    """A fatbin with one entry of machine code (rubbish) and one of PTX, packed as ``flags`` say."""
    plain = text.encode() + b"\0"
    packed = plain if body is None else body
    padded = packed.ljust(-(-len(packed) // 8) * 8, b"\0")
    code = struct.pack("<HHIQ", 2, 0x101, 64, 16).ljust(64, b"\0") + b"\x7fELF".ljust(16, b"\0")
    head = struct.pack("<HHIQII", 1, 0x101, 80, len(padded), len(packed), 64).ljust(40, b"\0")
    head += struct.pack("<QQQ", flags, 0, len(plain)).ljust(40, b"\0")
    entries = code + head + padded
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def compile_library(
    folder: Path, fatbin: bytes, *, name: str = "kernel.so", soname: str = SONAME, call: str = ""
) -> Path:
    """A library whose only kernel is in ``fatbin``; ``call``: a runtime function `run` calls besides."""
    extra = {"extra_declaration": f"int {call}();" if call else "", "extra_call": f"{call}();" if call else ""}
    source, target = folder / f"{name}.cpp", folder / name
    source.write_text(HOST % {"fatbin": ",".join(map(str, fatbin)), **extra})
    command = [*compiler(RuntimeError), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-missing-field-initializers"]
    subprocess.run([*command, "-o", str(target), str(source), str(build.build(soname))], check=True)
    return target
