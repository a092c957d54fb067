"""Sources: deterministic, complete, and named so that two loaded kernels share nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cutlass_kernels.errors import GenerateError
from cutlass_kernels.gemm import generate
from cutlass_kernels.gemm.catalogue import fused, kernels, representatives, sm80, sm90
from cutlass_kernels.gemm.config import GemmConfig

pytest.importorskip("cutlass_library", reason="nvidia-cutlass is not installed")


@pytest.fixture(scope="module")
def sources() -> dict[GemmConfig, str]:
    return {config: generate.source(config) for config in kernels()}


def test_every_kernel_is_generated_with_names_of_its_own(sources: dict[GemmConfig, str]) -> None:
    assert len(set(sources.values())) == len(sources)
    for config, text in sources.items():
        assert f"namespace flashmla_{config.name} {{" in text
        assert "cutlass_tensorop" not in text
        assert "cutlass3x" not in text
        assert re.search(r"struct Kernel :\n\s+public KernelBase", text), config.name


def test_the_source_says_what_the_configuration_says(sources: dict[GemmConfig, str]) -> None:
    for config, text in sources.items():
        m, n, k = config.tile
        if config.arch == "sm_80":
            assert f"cutlass::gemm::GemmShape<{m}, {n}, {k}>" in text, config.name
            assert re.search(rf"^    {config.stages},$", text, re.MULTILINE), config.name
        else:
            assert f"cute::Shape<cute::_{m}, cute::_{n}, cute::_{k}>" in text, config.name
            assert ("Pingpong" in text) == (config.schedule == "pingpong"), config.name
        assert ("StreamK" in text) == config.stream_k, config.name


def test_nothing_of_torch_and_no_default_stream(sources: dict[GemmConfig, str]) -> None:
    glue = "\n".join(path.read_text() for path in generate.glue_files())
    for text in (*sources.values(), glue):
        assert not re.search(r"#include [<\"](torch|ATen|c10)/", text)
        assert not re.search(r"cudaMalloc|cudaDeviceSynchronize|cudaStreamSynchronize|[^_]new ", text)


TWICE = """
import hashlib, sys
from cutlass_kernels.gemm import generate
from cutlass_kernels.gemm.catalogue import representatives
print(hashlib.sha256("".join(generate.source(c) for c in representatives()).encode()).hexdigest())
"""


def test_the_same_bytes_in_another_process(sources: dict[GemmConfig, str]) -> None:
    import hashlib

    here = hashlib.sha256("".join(sources[config] for config in representatives()).encode()).hexdigest()
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_nothing_is_left_in_the_current_folder(tmp_path: Path) -> None:
    script = "from cutlass_kernels.gemm import catalogue, generate; generate.source(catalogue.kernels()[0])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.iterdir())


def test_the_arguments_of_an_epilogue_follow_its_tree() -> None:
    text = generate.source(sm80("small", epilogue=fused("silu", residual=True)))
    found = re.search(r"^  return (\{\{.*\});$", text, re.MULTILINE)
    assert found
    order = [found[1].index(part) for part in ("call.alpha", "call.col_scale", "call.bias", "call.c)", "call.d)")]
    assert order == sorted(order)
    assert found[1].count("{") == found[1].count("}")


def test_an_epilogue_of_sm90_leaves_c_and_d_to_the_collective() -> None:
    text = generate.source(sm90((64, 64, 64), epilogue=fused("gelu", residual=True)))
    found = re.search(r"^  return (\{\{.*\});$", text, re.MULTILINE)
    assert found
    assert "call.c)" not in found[1]
    assert "call.d)" not in found[1]


def test_an_unknown_node_is_refused() -> None:
    nodes = generate.nodes_of("using Odd = cutlass::epilogue::fusion::Sm90Odd<float>;")
    with pytest.raises(GenerateError, match="no argument is known for the epilogue node Odd"):
        generate.initializer("Odd", nodes, "float")
    with pytest.raises(GenerateError, match="unknown epilogue node Missing"):
        generate.initializer("Missing", nodes, "float")


def test_a_source_depends_on_the_headers_that_it_includes() -> None:
    names = {path.name for path in generate.glue_files(generate.source(sm80("small")))}
    assert names == {"flashmla_gemm.h", "glue_common.h", "glue_gemm_exports.h", "glue_universal2x.h"}
