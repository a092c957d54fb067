"""The memory behind pages: zeros of any shape, which come as they are written and lie on huge pages."""

from __future__ import annotations

import gc
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flashmla_ops.kv_cache import as_cache, new_slab
from flashmla_ops.kv_cache.slab import HUGE_PAGE

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory of other systems comes as torch takes it")
huge_pages = pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="this system has no transparent huge pages"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn)


def kilobytes(file: str, field: str) -> int:
    """A field of this process's status, such as ``VmRSS:  1234 kB``."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@given(
    st.integers(0, 40), st.integers(1, 3), st.integers(1, 64), st.integers(1, 600), st.sampled_from(DTYPES), st.data()
)
def test_zeros_of_any_shape(n_pages: int, h_kv: int, page_size: int, d: int, dtype: torch.dtype, data: st.DataObject):
    slabs = [new_slab(n_pages, page_size, h_kv, d, dtype, data.draw(st.sampled_from((None, "cpu")))) for _ in range(2)]
    for slab in slabs:
        assert slab.shape == (n_pages, h_kv, page_size, d)
        assert (slab.is_contiguous(), slab.dtype, slab.device.type) == (True, dtype, "cpu")
        assert not slab.view(torch.uint8).any()
        slab.view(torch.uint8).fill_(1)  # no part of the next one


def test_what_a_slab_takes_by_default():
    assert new_slab(512, 64, 1, 576).dtype == torch.get_default_dtype()
    with torch.device("meta"):
        assert new_slab(512, 64, 1, 576).device.type == "meta"
    with FakeTensorMode():
        assert isinstance(new_slab(512, 64, 1, 576), FakeTensor)


def test_compiled_without_a_break():
    compiled = torch.compile(lambda: new_slab(64, 64, 1, 576) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), torch.ones(64, 1, 64, 576))


@linux
def test_memory_comes_when_written_and_goes_with_the_slab():
    page = 64 * 576 * 2
    n_pages = math.ceil((256 << 20) / page)
    gc.collect()
    before = kilobytes("status", "VmRSS")
    slab = new_slab(n_pages, 64, 1, 576, torch.bfloat16)
    assert kilobytes("status", "VmRSS") - before < 32 << 10
    slab[: n_pages // 2] = 1
    taken = kilobytes("status", "VmRSS") - before
    assert 96 << 10 < taken < 160 << 10
    cache = as_cache(slab)
    del slab
    assert cache[0, 0, 0, 0] == 1  # a view keeps it
    del cache
    assert kilobytes("status", "VmRSS") - before < 32 << 10


@linux
@huge_pages
@pytest.mark.parametrize("n_bytes", [HUGE_PAGE, 3 * HUGE_PAGE, 10 * HUGE_PAGE + 4096])
def test_whole_huge_pages_and_no_more(n_bytes: int):
    """The part of the last huge page that a slab does not fill would be wasted."""
    before = kilobytes("smaps_rollup", "AnonHugePages")
    slab = new_slab(n_bytes // 4096, 1, 1, 4096, torch.uint8)
    slab.fill_(1)
    gained = kilobytes("smaps_rollup", "AnonHugePages") - before
    assert slab.data_ptr() % HUGE_PAGE == 0
    assert gained == n_bytes // HUGE_PAGE * HUGE_PAGE >> 10
