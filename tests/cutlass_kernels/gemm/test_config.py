"""The rules of a `GemmConfig`: every rule named when broken, and nothing illegal constructed."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_kernels.errors import ConfigError
from cutlass_kernels.gemm.catalogue import LISTS, SM80_TILES, by_name, fused, kernels, sm80, sm90
from cutlass_kernels.gemm.config import BYTES, FAMILIES, SHARED_MEMORY, TYPES, GemmConfig, problems
from cutlass_kernels.gemm.epilogue import ACTIVATIONS, Epilogue

EPILOGUES = st.builds(
    Epilogue,
    row_scale=st.booleans(),
    col_scale=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from([*ACTIVATIONS, "tanh"]),
    gate=st.booleans(),
    residual=st.booleans(),
)
#: Fields of any configuration, legal or not.
ANY = st.fixed_dictionaries(
    {
        "arch": st.sampled_from([*TYPES, *TYPES, "sm_70"]),
        "tile": st.tuples(
            st.sampled_from([0, 16, 24, 64, 128, 256]),
            st.sampled_from([8, 16, 64, 128, 256, 512]),
            st.sampled_from([16, 32, 64, 128]),
        ),
        "a": st.sampled_from(["bf16", "fp16", "e4m3", "s8", "f32"]),
        "weight": st.sampled_from(["bf16", "fp16", "e4m3", "s8"]),
        "d": st.sampled_from(["bf16", "fp16", "f32"]),
        "family": st.sampled_from([*FAMILIES, "sparse"]),
        "warps": st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 2)),
        "stages": st.integers(0, 9),
        "cluster": st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 2)),
        "schedule": st.sampled_from(["multistage", "pingpong", "cooperative"]),
        "stream_k": st.booleans(),
        "epilogue": EPILOGUES | st.just(Epilogue()),
    }
)


def attempt(values: dict[str, Any]) -> GemmConfig | list[str]:
    """The configuration, or the rules that it breaks."""
    try:
        return GemmConfig(**values)
    except ConfigError as error:
        return error.problems


@settings(max_examples=500)
@given(ANY)
def test_a_refusal_names_the_argument_and_both_values(values: dict[str, Any]) -> None:
    found = attempt(values)
    if isinstance(found, list):
        assert found
        names = {field.name for field in fields(GemmConfig)}
        names |= {field.name for field in fields(Epilogue)} | {"gate and residual", "a, weight"}
        for problem in found:
            argument, _, rest = problem.partition(": expected ")
            assert argument in names, problem
            assert ", got " in rest or "alone" in rest, problem


@st.composite
def neighbours(draw: st.DrawFn) -> GemmConfig | list[str]:
    """A shipped kernel with up to two fields changed: about half of them are legal."""
    config = draw(st.sampled_from(kernels()))
    values = {field.name: getattr(config, field.name) for field in fields(GemmConfig)}
    changed = draw(ANY)
    for name in draw(st.lists(st.sampled_from(sorted(values)), max_size=2, unique=True)):
        values[name] = changed[name]
    return attempt(values)


@settings(max_examples=500)
@given(neighbours())
def test_what_is_legal_fits_the_machine(config: GemmConfig | list[str]) -> None:
    if isinstance(config, list):
        return
    m, n, _ = config.tile
    assert config.shared_memory() <= SHARED_MEMORY[config.arch]
    assert m * n <= 128 * config.threads
    assert (config.a, config.weight) in TYPES[config.arch]
    assert re.fullmatch(r"[a-z][a-z0-9_]*", config.name)
    assert config.alignment("a") * BYTES[config.a] == 16
    assert not config.splits or not config.stream_k
    assert not problems(config)


@settings(max_examples=300)
@given(neighbours(), neighbours())
def test_one_name_one_kernel(first: GemmConfig | list[str], second: GemmConfig | list[str]) -> None:
    if isinstance(first, GemmConfig) and isinstance(second, GemmConfig):
        assert (first.name == second.name) == (first == second)


SMALL, HOPPER = sm80("small"), sm90((64, 64, 64))
BROKEN: list[tuple[GemmConfig, dict[str, Any], str]] = [
    (SMALL, {"arch": "sm_70"}, "arch"),
    (SMALL, {"tile": (64, 64)}, "tile"),
    (SMALL, {"tile": (64, 24, 64)}, "tile"),
    (SMALL, {"tile": (64, 64, 16)}, "tile"),
    (SMALL, {"tile": (16, 64, 64), "warps": (1, 4, 1)}, "tile"),
    (SMALL, {"tile": (256, 128, 64)}, "tile"),
    (SMALL, {"stages": 2}, "stages"),
    (sm80("large"), {"stages": 4}, "stages"),
    (SMALL, {"warps": (3, 1, 1)}, "warps"),
    (SMALL, {"warps": (2, 2, 2)}, "warps"),
    (SMALL, {"warps": (0, 2, 1)}, "warps"),
    (SMALL, {"cluster": (2, 1, 1)}, "cluster"),
    (SMALL, {"schedule": "pingpong"}, "schedule"),
    (SMALL, {"a": "e4m3", "weight": "e4m3"}, "a, weight"),
    (SMALL, {"d": "fp16"}, "d"),
    (SMALL, {"a": "s8", "weight": "s8"}, "epilogue"),
    (SMALL, {"family": "sparse"}, "family"),
    (SMALL, {"family": "grouped", "tile": (128, 128, 64)}, "tile"),
    (SMALL, {"stream_k": True, "tile": (128, 128, 64)}, "tile"),
    (SMALL, {"family": "batched", "epilogue": fused()}, "epilogue"),
    (SMALL, {"family": "batched", "stream_k": True}, "stream_k"),
    (SMALL, {"family": "batched", "weight": "s8", "epilogue": fused()}, "weight"),
    (SMALL, {"stream_k": True, "epilogue": fused()}, "epilogue"),
    (SMALL, {"epilogue": Epilogue(activation="tanh")}, "activation"),
    (SMALL, {"epilogue": Epilogue(gate=True, residual=True)}, "gate and residual"),
    (SMALL, {"epilogue": Epilogue(gate=True, activation="relu")}, "gate"),
    (HOPPER, {"family": "grouped"}, "arch"),
    (HOPPER, {"schedule": "multistage"}, "schedule"),
    (HOPPER, {"stages": 3}, "stages"),
    (HOPPER, {"warps": (4, 1, 1)}, "warps"),
    (HOPPER, {"cluster": (3, 1, 1)}, "cluster"),
    (HOPPER, {"schedule": "cooperative"}, "tile"),
    (HOPPER, {"tile": (64, 8, 64)}, "tile"),
    (HOPPER, {"tile": (64, 64, 32)}, "tile"),
    (HOPPER, {"tile": (128, 256, 64)}, "tile"),
    (HOPPER, {"tile": (64, 256, 64), "epilogue": fused()}, "tile"),
    (HOPPER, {"stream_k": True}, "stream_k"),
]


@pytest.mark.parametrize(("config", "changed", "argument"), BROKEN)
def test_each_rule(config: GemmConfig, changed: dict[str, Any], argument: str) -> None:
    with pytest.raises(ConfigError) as raised:
        replace(config, **changed)
    assert argument in {problem.split(": expected")[0] for problem in raised.value.problems}


def test_names_in_the_catalogue_are_unique_and_found() -> None:
    names = [config.name for config in kernels()]
    assert len(names) == len(set(names))
    assert all(by_name(name).name == name for name in names)
    with pytest.raises(KeyError):
        by_name("no such kernel")


def test_lists_are_parts_of_the_catalogue() -> None:
    everything = set(kernels())
    for name, configs in LISTS.items():
        assert set(configs()) <= everything, name
    assert len(LISTS["smoke"]()) == 3


def test_the_catalogue_has_every_family_type_and_scheduler() -> None:
    kinds = {(config.arch, config.family, config.a, config.weight) for config in LISTS["representatives"]()}
    for arch in TYPES:
        assert {(arch, "linear", "bf16", "bf16"), (arch, "batched", "bf16", "bf16")} <= kinds
        assert any(config.stream_k for config in kernels() if config.arch == arch)
        assert any(config.a == "fp16" for config in kernels() if config.arch == arch)
    assert {
        ("sm_80", "grouped", "bf16", "bf16"),
        ("sm_80", "linear", "s8", "s8"),
        ("sm_80", "linear", "bf16", "s8"),
    } <= kinds
    assert ("sm_90a", "linear", "e4m3", "e4m3") in kinds
    assert {config.tile for config in kernels() if config.arch == "sm_80"} == {tile for tile, *_ in SM80_TILES.values()}
