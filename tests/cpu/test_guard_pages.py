"""Nothing is read outside a cache, whatever indices and formats say: memory on both of its sides cannot be accessed.

In a process of its own, which a fault would end.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flashmla_ops.formats import NATIVE, QUANTIZED
from tests.support.sparse import invalid_indices

PAGES, PAGE_SIZE = 3, 5
INT = torch.int32


def guarded(data: Tensor, at_the_end: bool) -> Tensor:
    """A copy whose last byte lies before an inaccessible page, or its first behind one. Its memory is never freed."""
    step, size = mmap.PAGESIZE, data.numel() * data.element_size()
    room = -(-size // step) * step
    area = mmap.mmap(-1, room + 2 * step)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for edge in (start, start + step + room):
        if libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(step), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = step + (room - size if at_the_end else 0)
    view = torch.frombuffer(area, dtype=torch.uint8, offset=offset, count=size).view(data.dtype).view(data.shape)
    return view.copy_(data)


def attend(cache: Tensor, name: str, h_q: int, dtype: torch.dtype) -> None:
    """Every operator that reads the cache, at its first and last rows and at what lies outside."""
    d = QUANTIZED[name].elements if name != NATIVE else cache.size(3)
    d_v = min(d, 512)
    n = PAGES * PAGE_SIZE
    q = torch.randn(2, 1, h_q, d).to(dtype)
    indices = torch.tensor([[0, n - 1, *invalid_indices(n)], [*invalid_indices(n), n - 1, 0]], dtype=INT)[:, None]
    extra = {"extra_kv_cache": cache, "extra_indices": indices.flip(-1), "extra_row_format": name}
    out, _ = torch.ops.flashmla.sparse_decode(q, cache, None, indices, d_v, row_format=name, **extra)
    assert out.isfinite().all()
    torch.ops.flashmla.sparse_prefill(q[:, 0], cache[0], indices, d_v, row_format=name)
    table = torch.tensor([[2, 0, 1], [1, 2, 0]], dtype=INT)
    lengths = torch.tensor([n, 11], dtype=INT)
    out, _ = torch.ops.flashmla.decode(q, cache, None, table, lengths, d_v, row_format=name)
    assert out.isfinite().all()
    rows = torch.randn(3, 1, d).to(cache.dtype if name == NATIVE else dtype)
    torch.ops.flashmla.append_(cache, rows, torch.tensor([0, -1, n - 1]), name)


def run_all() -> None:
    for name in (NATIVE, *QUANTIZED):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for d in (40, 576) if name == NATIVE else (0,):
                for at_the_end in (False, True):
                    if name == NATIVE:
                        data = torch.randn(PAGES, PAGE_SIZE, 1, d).to(dtype)
                    else:
                        data = torch.zeros(PAGES, PAGE_SIZE, 1, QUANTIZED[name].bytes, dtype=torch.uint8)
                    for h_q in (1, 3, 16, 128):
                        attend(guarded(data, at_the_end), name, h_q, dtype)


@pytest.mark.parametrize("isa", ["", "generic"])
def test_nothing_outside_is_touched(isa: str) -> None:
    environment = os.environ | ({"FLASHMLA_CPU": isa} if isa else {})
    code = "from tests.cpu.test_guard_pages import run_all; run_all(); print('done')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    assert done.stdout.strip() == "done"


def test_a_read_outside_would_be_seen() -> None:
    code = (
        "import ctypes, torch; from tests.cpu.test_guard_pages import guarded;"
        "ctypes.string_at(guarded(torch.zeros(8), True).data_ptr(), 33)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0
