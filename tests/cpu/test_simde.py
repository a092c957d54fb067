"""The AVX-512 sources, intrinsics included, on a processor without AVX-512: compiled against SIMDe's loops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashmla_build.compiler import NAMES

HERE = Path(__file__).parent
HEADERS = Path("/usr/include/simde/x86/avx512.h")

#: Replaces the two AVX-512 libraries by emulated ones, builds, loads, and runs the tests of every instruction set.
RUN = """
import dataclasses, os, sys
import flashmla_ops
from flashmla_ops import cpu
from flashmla_ops.cpu import build
import pytest

shim, tests = sys.argv[1:]
emulated = ("-O1", "-w", f"-I{shim}", "-D__AVX512F__", "-DFLASHMLA_ASSUME_AVX512")
build.KERNELS["avx512"] = build.kernels_of("avx512", *emulated)
build.KERNELS["avx512_bf16"] = build.kernels_of("avx512_bf16", *emulated, "-D__AVX512BF16__")
assumed = build.Unit("isas.cpp", ("-O2", "-DFLASHMLA_ASSUME_AVX512"))
build.ISAS = build.Library("flashmla_isas", (assumed,))
units = tuple(assumed if unit.source == "isas.cpp" else unit for unit in build.STABLE_ABI.units)
build.STABLE_ABI = dataclasses.replace(build.STABLE_ABI, units=units, otherwise=None)
del os.environ["FLASHMLA_CPU"]
assert cpu.load().active == "avx512_bf16", cpu.STATE.reason
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "avx512", tests + "/cpu/test_isas.py", tests + "/ops"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HEADERS.exists(), reason=f"no SIMDe headers ({HEADERS}; Debian: libsimde-dev)")
@pytest.mark.skipif(all(shutil.which(name) is None for name in NAMES), reason="no C++ compiler")
def test_the_avx512_sources_give_the_references_results(tmp_path: Path) -> None:
    environment = {**os.environ, "FLASHMLA_CPU": "reference", "FLASHMLA_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", RUN, str(HERE / "simde"), str(HERE.parent)]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
