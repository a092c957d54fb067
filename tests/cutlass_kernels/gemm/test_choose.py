"""Which kernel runs a problem: only one that fits, the same one each time, and for a reason that is said."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_kernels.gemm import choose as choosing
from cutlass_kernels.gemm import heuristics
from cutlass_kernels.gemm.catalogue import kernels, sm80
from cutlass_kernels.gemm.choose import Choice, Fallback, choose, clocks
from cutlass_kernels.gemm.problem import Device, Problem

A100, H100, L40 = Device((8, 0), 108, 166912), Device((9, 0), 132, 232448), Device((8, 9), 142, 101376)
ALL = frozenset(kernels())
#: k -> n around MLA, DeepSeek-V3 and V2-Lite.
AROUND_MLA = [(7168, 2112), (1536, 24576), (16384, 7168), (2048, 3072), (2048, 576), (2048, 2048)]
PROBLEMS = st.builds(
    Problem,
    m=st.integers(1, 5000),
    n=st.integers(1, 900).map(lambda n: 8 * n) | st.integers(1, 99),
    k=st.integers(1, 900).map(lambda k: 8 * k) | st.integers(1, 99),
    a=st.sampled_from(["bf16", "fp16"]),
    weight=st.just("bf16"),
    d=st.just("bf16"),
    family=st.sampled_from(["linear", "batched", "grouped"]),
    batch=st.sampled_from([1, 16, 128]),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nvidia-matmul-heuristics is not installed."""
    monkeypatch.setattr(heuristics, "version", lambda: None)
    choose.cache_clear()


@settings(max_examples=300)
@given(PROBLEMS, st.sampled_from([A100, H100, L40]), st.frozensets(st.sampled_from(kernels())))
def test_a_choice_fits(problem: Problem, device: Device, built: frozenset[object]) -> None:
    choice = choose(problem, device, built)
    if isinstance(choice, Fallback):
        assert choice.reason
        return
    config = choice.config
    assert config in built
    assert device.runs(config.arch)
    assert config.shared_memory() <= device.shared_memory
    assert (config.a, config.family, config.epilogue) == (problem.a, problem.family, problem.epilogue)
    assert problem.n % config.alignment("d") == 0
    assert problem.k % config.alignment("a") == 0
    assert choice.splits == 1 or config.splits
    assert problem.batch == 1 or config.batches


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("device", [A100, H100, L40])
@pytest.mark.parametrize(("k", "n"), AROUND_MLA)
@pytest.mark.parametrize("m", [1, 16, 128, 2048])
def test_the_table_takes_the_least_clocks(m: int, k: int, n: int, device: Device) -> None:
    problem = Problem(m, n, k, "bf16", "bf16", "bf16")
    choice = choose(problem, device, ALL)
    assert isinstance(choice, Choice)
    assert "table" in choice.reason
    best = clocks(choice.config, choice.splits, problem, device)
    for config in kernels():
        same = (config.a, config.d, config.family) == ("bf16", "bf16", "linear") and config.epilogue.plain
        if same and device.runs(config.arch) and config.shared_memory() <= device.shared_memory:
            assert best <= clocks(config, 1, problem, device), config.name


@pytest.mark.usefixtures("table")
def test_decode_splits_k_and_prefill_does_not() -> None:
    decode = choose(Problem(1, 2112, 7168, "bf16", "bf16", "bf16"), A100, ALL)
    prefill = choose(Problem(4096, 24576, 1536, "bf16", "bf16", "bf16"), A100, ALL)
    assert isinstance(decode, Choice)
    assert isinstance(prefill, Choice)
    assert decode.splits > 1
    assert prefill.splits == 1
    assert prefill.config.tile[0] >= 64


@pytest.mark.usefixtures("table")
def test_twice_the_work_is_not_fewer_clocks() -> None:
    for config in kernels():
        once, twice = (Problem(m, 2048, 2048, config.a, config.weight, config.d) for m in (256, 512))
        assert clocks(config, 1, once, A100) <= clocks(config, 1, twice, A100)


def test_reasons() -> None:
    problem = Problem(4, 64, 64, "bf16", "bf16", "bf16")
    old = choose(problem, Device((7, 5), 40, 65536), ALL)
    assert old == Fallback("kernels are for compute capability 8.0 and newer, this is 7.5")
    tight = choose(problem, Device((8, 6), 84, 1024), ALL)
    assert tight == Fallback("every kernel needs more than 1024 bytes of shared memory")


@pytest.mark.skipif(heuristics.version() is None, reason="nvidia-matmul-heuristics is not installed")
@pytest.mark.parametrize("device", [A100, H100])
@pytest.mark.parametrize(("k", "n"), AROUND_MLA)
def test_heuristics_choose_where_they_are_installed(device: Device, k: int, n: int) -> None:
    for m in (1, 16, 2048):
        choice = choose(Problem(m, n, k, "bf16", "bf16", "bf16"), device, ALL)
        assert isinstance(choice, Choice)
        if "heuristics" in choice.reason:
            assert choice.config.arch == ("sm_80" if device is A100 else "sm_90a")
    small = choose(Problem(1, n, k, "bf16", "bf16", "bf16"), A100, ALL)
    assert isinstance(small, Choice)
    assert small.reason == f"nvidia-matmul-heuristics {heuristics.version()}"


def test_a_device_without_a_model_gets_the_table() -> None:
    choice = choose(Problem(4, 64, 64, "bf16", "bf16", "bf16"), L40, ALL)
    assert isinstance(choice, Choice)
    assert "table" in choice.reason
    assert choice.splits <= choosing.MOST_SPLITS
    assert sm80("small").splits
