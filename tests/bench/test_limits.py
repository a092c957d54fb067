"""The machine's limits: what is kept of the samples, and which peak belongs to a dtype."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import cpu, limits
from tests.support.bench_runs import dram, output, printed

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3 GHz
flags\t\t: fpu avx avx2 fma avx512f avx512_bf16

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_cpuinfo() -> None:
    fields = cpu.parse_cpuinfo(CPUINFO)
    assert fields["model name"] == "Some CPU @ 3 GHz"
    found = cpu.Cpu("", frozenset(fields["flags"].split()), 0)
    assert found.instruction_set[0] == "AVX-512 BF16"
    assert found.features == ["avx2", "fma", "avx512f", "avx512_bf16"]


@pytest.mark.parametrize(
    ("vendor", "family", "model", "stepping", "name"),
    [
        ("AuthenticAMD", 25, 17, 1, "Zen 4"),
        ("AuthenticAMD", 25, 1, 1, "Zen 3"),
        ("AuthenticAMD", 25, 0xA0, 2, "Zen 4"),
        ("AuthenticAMD", 26, 2, 1, "Zen 5"),
        ("AuthenticAMD", 23, 49, 0, "Zen 2"),
        ("GenuineIntel", 6, 207, 2, "Emerald Rapids"),
        ("GenuineIntel", 6, 143, 8, "Sapphire Rapids"),
        ("GenuineIntel", 6, 85, 4, "Skylake-SP"),
        ("GenuineIntel", 6, 85, 7, "Cascade Lake"),
        ("GenuineIntel", 6, 1, 1, "Some CPU"),
        ("Another", 25, 17, 1, "Some CPU"),
    ],
)
def test_microarchitectures(vendor: str, family: int, model: int, stepping: int, name: str) -> None:
    fields = {"vendor_id": vendor, "cpu family": family, "model": model, "stepping": stepping, "model name": "Some CPU"}
    assert cpu.microarchitecture({key: str(value) for key, value in fields.items()}) == name


def test_a_cpu_that_says_little_has_a_name() -> None:
    assert cpu.microarchitecture({}) == "unknown CPU"


@pytest.mark.parametrize(
    ("flags", "name"),
    [("avx512f avx2 fma", "AVX-512"), ("avx2 fma", "AVX2 + FMA"), ("avx2", cpu.BASELINE), ("", cpu.BASELINE)],
)
def test_instruction_set_by_flags(flags: str, name: str) -> None:
    assert cpu.Cpu("", frozenset(flags.split()), 0).instruction_set[0] == name


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("avx512_bf16", "AVX-512 BF16"), ("avx512", "AVX-512"), ("avx2", "AVX2 + FMA"), ("generic", cpu.BASELINE)],
)
def test_instruction_sets_that_our_kernels_may_not_use_are_passed_over(
    wanted: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHMLA_CPU", wanted)
    monkeypatch.setattr(cpu, "parse_cpuinfo", lambda _: {"flags": "fma avx2 avx512f avx512_bf16"})
    assert cpu.this_cpu().instruction_set[0] == name


def test_limits_are_medians_and_dram_is_the_best_of_the_ways() -> None:
    text = output(fp32_flops=[180e9, 190e9, 170e9], dram_read_prefetched=[45e9])
    found = limits.limits_of(limits.parse_output(text, 2), "AVX2 + FMA", 2)
    assert found.fp32_flops == 180e9
    assert found.dram_read == 45e9
    assert found.peak(torch.bfloat16) == found.peak(torch.float32) == 180e9
    assert found.peak_name(torch.bfloat16) == "fp32 multiply-add, AVX2 + FMA"


def test_bf16_peak_where_the_cpu_has_the_instruction() -> None:
    found = limits.limits_of(limits.parse_output(output(bf16_flops=[380e9]), 2), "AVX-512 BF16", 2)
    assert found.peak(torch.bfloat16) == 380e9
    assert found.peak(torch.float16) == found.peak(torch.float32) == 190e9


def test_impossible_samples_are_dropped() -> None:
    kept = limits.parse_output(output(fp32_flops=[190e9, 1e15, 185e9], dram_read=[40e9, 41e9, 900e9]), 2)
    assert kept["fp32_flops"] == [190e9, 185e9]
    assert kept["dram_read"] == [40e9, 41e9]  # no DRAM is faster than the L2 caches


@pytest.mark.parametrize("name", ["hz", "fp32_flops", "l2_read", "l3_read", "dram_read"])
@pytest.mark.parametrize("values", [[1e15, 1e15, 1e9], [0.0], []])
def test_mostly_impossible_samples_are_an_error(name: str, values: list[float]) -> None:
    with pytest.raises(limits.LimitsError, match=name):
        limits.parse_output(output(**{name: values}), 2)


@pytest.mark.parametrize("values", [[900e9, 900e9, 40e9], [0.0], []])
def test_mostly_impossible_samples_of_dram_alone_are_an_error(values: list[float]) -> None:
    with pytest.raises(limits.LimitsError, match="dram_read"):
        limits.parse_output(printed(dram(*values)), 2, hz=3e9)


@given(st.lists(st.floats(1e9, 400e9), min_size=1), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_speed_of_dram_is_the_median_of_the_fastest_way(plain: list[float], gain: float, other: float) -> None:
    samples = {
        name: [by * sample for sample in plain] for name, by in zip(limits.DRAM, (1.0, gain, other), strict=True)
    }
    assert limits.dram_read_of(samples) == max(map(statistics.median, samples.values()))


def test_dram_is_measured_alone_or_with_the_others() -> None:
    with limits.LimitMeter(threads=1) as meter:
        alone = meter.measure_dram(seconds=0.0)
        assert set(alone) == set(meter.samples) == set(limits.DRAM)
        meter.measure(seconds=0.0)
        assert {"hz", "fp32_flops", "l2_read", *limits.DRAM} < set(meter.samples)
        for name, values in alone.items():
            assert meter.samples[name][: len(values)] == values
            assert len(meter.samples[name]) > len(values)
