"""Under autocast floating inputs are cast, as torch's attention casts them, and caches, scales and lse are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashmla_ops.ops._library import DEFINED, operator
from tests.support.calls import CALLS, run

CAST = ("prefill", "gemm", "bmm", "grouped_gemm")
TO_THE_CACHE = ("attend_masked", "sparse_decode", "sparse_prefill", "decode", "decode_up", "append_", "append_.two")
#: Arguments that keep their type whatever happens.
CACHES = ("kv_cache", "k_cache", "extra_kv_cache", "kv")
KEPT = ("lses", "attn_sink", "weight_scale", *CACHES)
LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def converted(arguments: dict[str, Any], dtype: torch.dtype, keep: tuple[str, ...] = KEPT) -> dict[str, Any]:
    """The floating tensors in ``dtype``, but for those of ``keep``."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name not in keep else x
        for name, x in arguments.items()
    }


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", CAST)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_are_cast(name: str, mixed: bool, dtype: torch.dtype, compiled: bool) -> None:
    arguments = CALLS[name].arguments()
    expected = run(name, converted(arguments, dtype))
    if mixed:  # as behind a layer that autocast has run in its dtype
        first = next(iter(arguments))
        arguments[first] = arguments[first].to(dtype)
    call = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    with torch.autocast("cpu", dtype):
        assert_same(call(name, arguments), expected)
    with torch.autocast("cpu", dtype), torch.autocast("cpu", enabled=False):
        assert run(name, CALLS[name].arguments())[0].dtype == torch.float32


@pytest.mark.parametrize("name", TO_THE_CACHE)
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cache_decides(name: str, cache: torch.dtype, others: torch.dtype, compiled: bool) -> None:
    """The other arguments are cast to the cache's dtype; the cache itself is not touched."""
    call = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    plain = CALLS[name].arguments()
    kept = ("attn_sink", "mask")
    caches = {key: x.to(cache) for key, x in plain.items() if key in CACHES}
    given = converted(plain, others, kept) | caches
    expected = run(name, converted(given, cache, kept) | {key: x.clone() for key, x in caches.items()})
    with torch.autocast("cpu", LOW):
        assert_same(call(name, given), expected)


def test_a_result_dtype_that_is_asked_for_stays() -> None:
    arguments = CALLS["gemm"].arguments() | {"out_dtype": torch.float32}
    with torch.autocast("cpu", LOW):
        (out,) = run("gemm", arguments)
    assert_same([out], run("gemm", converted(arguments, LOW, (*KEPT, "residual"))))


def test_int8_weights_and_quantised_caches_stay() -> None:
    a, weight = torch.randn(2, 8), torch.randint(-9, 9, (16, 8), dtype=torch.int8)
    cache, rows = torch.zeros(1, 2, 1, 656, dtype=torch.uint8), torch.randn(1, 1, 576)
    with torch.autocast("cpu", LOW):
        out = torch.ops.flashmla.gemm(a, weight, weight_scale=torch.ones(16))
        torch.ops.flashmla.append_(cache, rows, torch.tensor([1]), "fp8_v32")
    assert_same([out], [torch.ops.flashmla.gemm(a.to(LOW), weight, weight_scale=torch.ones(16))])
    assert torch.equal(cache[0, 1], torch.ops.flashmla.quantize_rows(rows)[0])


def test_parts_are_merged_in_the_widest_dtype() -> None:
    arguments = CALLS["merge_states"].arguments()
    outs = [arguments["outs"][0].to(LOW), arguments["outs"][1]]
    with torch.autocast("cpu", LOW):
        assert_same(run("merge_states", arguments), run("merge_states", CALLS["merge_states"].arguments() | arguments))
        mixed = run("merge_states", arguments | {"outs": outs})
    assert_same(mixed, run("merge_states", arguments | {"outs": [outs[0].float(), outs[1]]}))


@pytest.mark.parametrize("name", [name for name in DEFINED if name.endswith(".out")])
def test_out_overloads_cast_nothing(name: str) -> None:
    arguments = CALLS[name].arguments()
    with torch.autocast("cpu", LOW):
        assert run(name, arguments)[0].dtype == torch.float32


def test_double_is_refused_as_without_autocast() -> None:
    with torch.autocast("cpu", LOW), pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        torch.ops.flashmla.gemm(torch.ones(2, 8).double(), torch.ones(16, 8).double())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_keys_of_both_devices_have_the_rules(device: str) -> None:
    for name in (*CAST, *TO_THE_CACHE, "merge_states"):
        key = f"Autocast{device.upper()}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator(name).name(), key)


def test_a_mask_that_is_added_follows_the_queries() -> None:
    arguments = CALLS["attend_masked"].arguments()
    arguments["mask"] = arguments["mask"].to(LOW)
    expected = run("attend_masked", arguments | {"mask": arguments["mask"].float()})
    with torch.autocast("cpu", LOW):
        assert_same(run("attend_masked", arguments | {"q": arguments["q"].float()}), expected)
