"""The mock runtime: libraries with a fatbin, loaded, launched and refused. Needs a C++ compiler, but no nvcc."""

from __future__ import annotations

import ctypes
import ctypes.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cutlass_kernels.emulator import (
    Device,
    LaunchError,
    MemoryFault,
    NoPtx,
    NotClean,
    Options,
    RuntimeUnavailable,
    mutate,
    run,
)
from cutlass_kernels.emulator.runtime import build, fatbin
from flashmla_build import compiler
from tests.cutlass_kernels.emulator.harness import Array, kernel
from tests.cutlass_kernels.emulator.library import compile_library, fatbin_of

try:
    compiler(RuntimeUnavailable)
except RuntimeUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("own_runtime")
V = ctypes.c_void_p
#: Reverses 128 words of each CTA through shared memory: two waits are needed, the third barrier is not.
BODY = """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 128, %r0; mov.u32 %r3, tile;
    ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; mad.wide.u32 %d0, %r2, 4, %d0; mad.lo.u32 %r4, %r0, 4, %r3;
    cp.async.ca.shared.global [%r4], [%d0], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r5, %r0, 127; mad.lo.u32 %r5, %r5, 4, %r3; ld.shared.u32 %r6, [%r5];
    bar.sync 1;
    mad.wide.u32 %d1, %r2, 4, %d1; st.global.u32 [%d1], %r6;"""
PTX = kernel(BODY, 2, shared=".extern .shared .align 16 .b8 tile[];")
SOURCE = np.arange(512, dtype=np.uint32)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("library"), fatbin_of(PTX))


def reverse(device: Device, loaded: ctypes.CDLL) -> Array:
    given, out = device.array(SOURCE), device.empty(512, np.uint32)
    assert loaded.run(V(given.pointer), V(out.pointer), 4, 128, 512, 1) == 0
    return out.numpy()


def is_reversed(found: Array) -> bool:
    return bool((found == SOURCE.reshape(4, 128)[:, ::-1].ravel()).all())


def test_an_unmodified_library_runs(library: Path) -> None:
    report = run(library, reverse)
    assert is_reversed(report.result)
    (launch,) = report.launches
    assert (launch.kernel, launch.grid, launch.block, launch.shared_bytes) == ("k", (4, 1, 1), (128, 1, 1), 512)
    assert report.hazards == ()
    assert [site.text for site in launch.sites] == ["cp.async.wait_group 0", "bar.sync 0", "bar.sync 1"]
    assert launch.counters.global_bytes_read == launch.counters.global_bytes_written == 2048


def test_clusters_and_large_shared_memory_reach_the_launch(library: Path) -> None:
    def call(device: Device, loaded: ctypes.CDLL) -> int:
        given, out = device.array(SOURCE), device.empty(512, np.uint32)
        return int(loaded.run(V(given.pointer), V(out.pointer), 4, 128, 100_000, 2))

    (launch,) = run(library, call, arch="sm_90a").launches
    assert (launch.cluster, launch.shared_bytes) == ((2, 1, 1), 100_000)
    with pytest.raises(LaunchError, match="clusters of 1"):
        run(library, call, arch="sm_80")


def test_other_runtime_calls(library: Path) -> None:
    def call(device: Device, loaded: ctypes.CDLL) -> tuple[int, ...]:
        loaded.allocate.restype = V
        memory = device.empty(64, np.uint32)
        assert loaded.clear(V(memory.pointer), ctypes.c_size_t(256)) == 0
        assert (memory.numpy() == 0).all()
        assert device.heap.holds(loaded.allocate(ctypes.c_size_t(1000)), 1000)
        assert not loaded.allocate(ctypes.c_size_t(1 << 40))
        shared = ctypes.c_size_t(100_000)
        return (
            loaded.attribute(16),
            loaded.attribute(75),
            loaded.attribute(97),
            loaded.attribute(9999),
            loaded.occupancy(128, shared),
        )

    assert run(library, call).result == (108, 8, 166_912, -1, 1)
    assert run(library, call, arch="sm_90a").result == (132, 9, 232_448, -1, 2)


def test_errors_of_launches_come_out(library: Path) -> None:
    def stray(device: Device, loaded: ctypes.CDLL) -> int:
        memory = device.array(np.zeros(8, np.uint32))
        return int(loaded.run(V(memory.pointer), V(memory.pointer), 4, 128, 512, 1))

    with pytest.raises(MemoryFault, match="outside every allocation"):
        run(library, stray)

    def greedy(device: Device, loaded: ctypes.CDLL) -> int:
        return int(loaded.large(None, None, 60_000))

    with pytest.raises(LaunchError, match="cudaFuncSetAttribute allowed 49152"):
        run(library, greedy)
    assert is_reversed(run(library, reverse).result)


def test_the_callers_own_exception_passes(library: Path) -> None:
    def call(device: Device, loaded: ctypes.CDLL) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(library, call)


def test_another_ptx_takes_the_place_of_the_librarys(library: Path) -> None:
    plus = PTX.replace("st.global.u32 [%d1], %r6;", "add.u32 %r6, %r6, 1; st.global.u32 [%d1], %r6;")
    assert is_reversed(run(library, reverse, ptx=plus).result - np.uint32(1))


def test_a_rebuilt_library_is_loaded_anew(tmp_path: Path) -> None:
    path = compile_library(tmp_path, fatbin_of(PTX))
    assert is_reversed(run(path, reverse).result)
    path = compile_library(tmp_path, fatbin_of(PTX.replace("xor.b32 %r5, %r0, 127", "xor.b32 %r5, %r0, 0")))
    np.testing.assert_array_equal(run(path, reverse).result, SOURCE)


def test_ptx_beside_a_library_without_any(tmp_path: Path) -> None:
    machine_code_only = fatbin_of(PTX)[: 16 + 64 + 16]
    machine_code_only = machine_code_only[:8] + (80).to_bytes(8, "little") + machine_code_only[16:]
    path = compile_library(tmp_path, machine_code_only, name="bare.so")
    with pytest.raises(NoPtx, match=r"bare\.ptx is not beside it"):
        run(path, reverse)
    other = compile_library(tmp_path, machine_code_only, name="kept.so")
    other.with_suffix(".ptx").write_text(PTX)
    assert is_reversed(run(other, reverse).result)


def test_an_unknown_runtime_function_is_named(tmp_path: Path) -> None:
    stand_in = tmp_path / "more.cpp"
    stand_in.write_text('extern "C" int cudaGraphLaunch() { return 0; }')
    path = tmp_path / "graphs.so"
    source = compile_library(tmp_path, fatbin_of(PTX), name="base.so").with_suffix(".so.cpp")
    text = source.read_text().replace("int cudaGetLastError();", "int cudaGetLastError(); int cudaGraphLaunch();")
    source.write_text(text.replace("return cudaGetLastError();", "return cudaGraphLaunch();"))
    mock = str(build.build("libcudart.so.13"))
    flags = ["-shared", "-fPIC", "-Wl,--allow-shlib-undefined", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run([*compiler(RuntimeUnavailable), *flags, "-o", str(path), str(source), mock], check=True)
    with pytest.raises(RuntimeUnavailable, match="cudaGraphLaunch"):
        run(path, reverse)


def test_a_library_with_its_own_runtime_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "static.so"
    path.write_bytes(b"\x7fELF nothing asks for the runtime here")
    with pytest.raises(RuntimeUnavailable, match="-cudart shared"):
        run(path, reverse)


def test_a_foreign_runtime_in_the_process_is_noticed(tmp_path: Path) -> None:
    """A library of libcudart's name is loaded first, in a process of its own."""
    path = compile_library(tmp_path, fatbin_of(PTX))
    folder = tmp_path / "foreign"
    folder.mkdir()
    foreign = folder / "libcudart.so.13"
    foreign.write_bytes(build.build("libcudart.so.13").read_bytes())
    script = f"""
import ctypes
ctypes.CDLL({str(foreign)!r})
from cutlass_kernels import emulator
try:
    emulator.run({str(path)!r}, lambda device, library: None)
except emulator.RuntimeUnavailable as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "refused" in done.stdout
    assert "another libcudart" in done.stdout


# Fatbins


def lz4_of(plain: bytes) -> bytes:
    block = pytest.importorskip("lz4.block")
    return bytes(block.compress(plain, store_size=False))


def test_lz4() -> None:
    text = "/" * 320 + PTX
    packed = lz4_of(text.encode() + b"\0")
    assert len(packed) < len(text)
    assert fatbin.ptx_of(fatbin_of(text, flags=0x2000, body=packed)) == [text]


@pytest.mark.parametrize("body", [lambda packed: packed[:-3], lambda packed: b"\0\x09\0" + packed[3:]])
def test_damaged_lz4(body: Callable[[bytes], bytes]) -> None:
    packed = lz4_of(("/" * 320 + PTX).encode())
    with pytest.raises(NoPtx, match=r"damaged|unpacks to"):
        fatbin.ptx_of(fatbin_of("/" * 320 + PTX, flags=0x2000, body=body(packed)))


def test_without_the_package_lz4_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    with pytest.raises(NoPtx, match="pip install lz4, or compile with nvcc --compress-mode=none"):
        fatbin.ptx_of(fatbin_of(PTX, flags=0x2000, body=b""))


def test_zstd() -> None:
    name = ctypes.util.find_library("zstd")
    if name is None:
        pytest.skip("libzstd is not installed")
    zstd = ctypes.CDLL(name)
    zstd.ZSTD_compress.restype = ctypes.c_size_t
    plain = PTX.encode() + b"\0"
    packed = ctypes.create_string_buffer(2 * len(plain))
    size = zstd.ZSTD_compress(packed, ctypes.c_size_t(len(packed)), plain, ctypes.c_size_t(len(plain)), 3)
    assert fatbin.ptx_of(fatbin_of(PTX, flags=0x8000, body=packed.raw[:size])) == [PTX]


def test_embedded_ptx_is_found_in_a_file(library: Path) -> None:
    assert fatbin.embedded(library.read_bytes()) == [PTX]
    with pytest.raises(NoPtx, match="begins with"):
        fatbin.size_of(bytes(16))


# Mutation


def test_mutants_are_noticed(library: Path) -> None:
    survey = mutate(library, reverse, is_reversed)
    verdict = {mutant.site.text: mutant.detected for mutant in survey.mutants}
    assert verdict["cp.async.wait_group 0"] is not None
    assert verdict["bar.sync 0"] == "hazard: race"
    assert [site.text for site in survey.undetected] == ["bar.sync 1"]
    assert survey.detection == pytest.approx(2 / 3)


def test_barriers_that_stand_in_for_one_another(library: Path) -> None:
    """Two barriers in a row: neither is missed alone, but the second once the first is gone."""
    twice = PTX.replace("bar.sync 0;", "bar.sync 0;\n bar.sync 2;")
    survey = mutate(library, reverse, is_reversed, ptx=twice)
    assert [site.text for site in survey.undetected] == ["bar.sync 0", "bar.sync 1"]
    (second,) = (mutant for mutant in survey.mutants if mutant.site.text == "bar.sync 2")
    assert second.detected == "hazard: race"
    assert {site.text for site in second.beside} == {"bar.sync 0"}


def test_reductions_without_their_barrier_keep_each_threads_vote(library: Path) -> None:
    voting = PTX.replace("bar.sync 1;", "setp.lt.u32 %p1, %r0, 9; bar.red.popc.u32 %r9, 1, %p1; add.u32 %r6, %r6, %r9;")
    survey = mutate(library, reverse, lambda found: is_reversed(found - np.uint32(9)), ptx=voting)
    verdict = {mutant.site.text: mutant.detected for mutant in survey.mutants}
    assert verdict["bar.red.popc.u32 %r9, 1, %p1"] == "wrong result"


def test_only_clean_kernels_have_mutants(library: Path) -> None:
    with pytest.raises(NotClean, match="rejected"):
        mutate(library, reverse, lambda found: False)
    racy = PTX.replace("bar.sync 0;", "")
    with pytest.raises(NotClean, match="race"):
        mutate(library, reverse, is_reversed, ptx=racy)


def test_early_and_late_agree(library: Path) -> None:
    for landing in ("late", "early", "reversed"):
        assert is_reversed(run(library, reverse, options=Options(landing=landing)).result)
