"""The memory of a pool: for each layer a slab, or two, of any row format."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.formats import NAMES, NATIVE, QUANTIZED
from flashmla_ops.kv_cache.sizes import n_bytes
from flashmla_ops.kv_cache.slab import as_cache, copy_pages, new_slab
from flashmla_ops.kv_cache.tables import PageCopy

#: So much is touched between two looks at the clock.
CHUNK = 256 << 20
#: Preallocation that takes longer shows how far it is.
SILENT_SECONDS = 1.0
#: Poisoned pages are filled with this: NaN as float32, bfloat16, float16, e4m3 and e8m0, and so as any scale.
POISON = 0xFF


@dataclass(frozen=True)
class Layer:
    """The rows of one layer, and how they lie."""

    format: str  # a name of `flashmla_ops.formats`
    widths: tuple[int, ...]  # elements of a row, of one tensor or two
    page_size: int
    h_kv: int
    dtype: torch.dtype  # of the tensors: bytes for a quantised format

    @property
    def row_widths(self) -> tuple[int, ...]:
        """Elements of the tensors' last dimensions."""
        return self.widths if self.format == NATIVE else (QUANTIZED[self.format].bytes,)

    @property
    def token_bytes(self) -> int:
        return sum(self.row_widths) * self.h_kv * self.dtype.itemsize


def layer_of(format: str, d: int | Sequence[int] | None, page_size: int, h_kv: int, dtype: torch.dtype | None) -> Layer:
    """A layer, checked: see `KVPool` for the arguments. Raises `ArgumentError`."""
    if format not in NAMES:
        raise ArgumentError("kv_pool", "format", f"one of {', '.join(NAMES)}", format)
    for name, size in (("page_size", page_size), ("h_kv", h_kv)):
        if size < 1:
            raise ArgumentError("kv_pool", name, "at least 1", size)
    widths = (d,) if isinstance(d, int) else None if d is None else tuple(d)
    if format == NATIVE:
        if widths is None or len(widths) not in (1, 2) or min(widths) < 1:
            raise ArgumentError("kv_pool", "d", "the elements of a row, or of the rows of two tensors", d)
        return Layer(format, widths, page_size, h_kv, dtype or torch.get_default_dtype())
    elements = QUANTIZED[format].elements
    if widths not in (None, (elements,)):
        raise ArgumentError("kv_pool", "d", f"{elements}, the elements of a row of {format}", d)
    if dtype not in (None, torch.uint8):
        raise ArgumentError("kv_pool", "dtype", f"torch.uint8 or None, for rows of {format}", dtype)
    return Layer(format, (elements,), page_size, h_kv, torch.uint8)


class Storage:
    """Slabs of ``n_pages`` pages of ``page_size`` tokens. A layer of smaller pages has several of them for each."""

    def __init__(self, n_pages: int, page_size: int, device: torch.device | str | None) -> None:
        self.n_pages, self.page_size, self.device = n_pages, page_size, device
        self.layers: list[Layer] = []
        self.slabs: list[tuple[Tensor, ...]] = []

    def add(self, layer: Layer) -> None:
        """Slabs for another layer. Raises `ArgumentError` if its pages do not divide those of the pool."""
        if self.page_size % layer.page_size:
            raise ArgumentError("kv_pool", "page_size", f"a divisor of {self.page_size}", layer.page_size)
        n_pages = self.n_pages * self.parts(layer)
        shape = (n_pages, layer.page_size, layer.h_kv)
        self.slabs.append(tuple(new_slab(*shape, width, layer.dtype, self.device) for width in layer.row_widths))
        self.layers.append(layer)

    def parts(self, layer: Layer) -> int:
        """How many pages of a layer make one of the pool."""
        return self.page_size // layer.page_size

    def caches(self, layer: int) -> tuple[Tensor, ...]:
        """The one or two tensors of a layer, as operators take them: ``[n_pages, page_size, h_kv, d]``."""
        return tuple(as_cache(slab) for slab in self.slabs[layer])

    def pages(self, layer: int) -> list[Tensor]:
        """The slabs of a layer as ``[n_pages, elements]``: a page of the pool in each row."""
        return [slab.view(self.n_pages, -1) for slab in self.slabs[layer]]

    def all_pages(self) -> Iterator[Tensor]:
        """`pages` of all layers."""
        return (pages for layer in range(len(self.layers)) for pages in self.pages(layer))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers together."""
        return sum(layer.token_bytes for layer in self.layers) * self.page_size

    @property
    def n_bytes(self) -> int:
        return self.page_bytes * self.n_pages

    def copy(self, copies: Sequence[PageCopy], layer: int | None = None) -> None:
        """Copy pages, in one layer or in all. No page may be a source and a target at once."""
        if copies:
            for pages in self.all_pages() if layer is None else self.pages(layer):
                copy_pages(pages, copies)

    def poison(self, pages: Sequence[int], layer: int | None = None) -> None:
        """Fill pages, of one layer or of all, with what is NaN in every format."""
        if pages:
            index = torch.tensor(pages)
            for rows in self.all_pages() if layer is None else self.pages(layer):
                rows.view(torch.uint8)[index.to(rows.device)] = POISON

    def read(self, page: int) -> bytes:
        """The bytes of a page, all layers one after another."""
        return b"".join(rows[page].view(torch.uint8).cpu().numpy().tobytes() for rows in self.all_pages())

    def write(self, page: int, data: bytes | memoryview) -> None:
        """The inverse of `read`."""
        taken = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for rows in self.all_pages():
            here, taken = taken.split([rows[page].nbytes, len(taken) - rows[page].nbytes])
            rows[page].view(torch.uint8).copy_(here)

    def touch(self, progress: Callable[[int, int], None]) -> None:
        """Write zeros everywhere, so that the system gives all memory now. torch's threads share the work."""
        done, total = 0, sum(rows.nbytes for rows in self.all_pages())
        for rows in self.all_pages():
            for chunk in rows.view(torch.uint8).view(-1).split(CHUNK):
                chunk.zero_()
                done += chunk.numel()
                progress(done, total)

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Other tensors in place of the slabs, as ``Module.to`` asks for them."""
        self.slabs = [tuple(change(slab) for slab in slabs) for slabs in self.slabs]
        self.layers = [
            dataclasses.replace(layer, dtype=slabs[0].dtype)
            for layer, slabs in zip(self.layers, self.slabs, strict=True)
        ]
        self.device = next((slab.device for slabs in self.slabs for slab in slabs), self.device)


def progress_bar() -> Callable[[int, int], None]:
    """Shows done and total bytes on stderr by tqdm, once a second has passed, and where tqdm is installed."""
    started, bar = time.monotonic(), None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and done < total and time.monotonic() - started > SILENT_SECONDS:
            try:
                from tqdm import tqdm  # type: ignore[import-untyped]
            except ModuleNotFoundError:
                return
            bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="KV pool")
        if bar is not None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

    return show


def fitting_pages(n_pages: int | None, memory: int | str | None, page_bytes: int) -> int:
    """How many pages a pool has. Raises `ArgumentError` unless one of both is given, and enough for a page."""
    if (n_pages is None) == (memory is None):
        raise ArgumentError("kv_pool", "n_pages", "either n_pages or memory", f"{n_pages} and {memory}")
    if n_pages is None:
        assert memory is not None
        if page_bytes == 0:
            raise ArgumentError("kv_pool", "memory", "layers, whose pages fill it", "none")
        n_pages = n_bytes("kv_pool", "memory", memory) // page_bytes
        if n_pages < 1:
            raise ArgumentError("kv_pool", "memory", f"at least {page_bytes} bytes, a page of all layers", memory)
    if not 1 <= n_pages < 1 << 31:
        raise ArgumentError("kv_pool", "n_pages", "at least 1, and int32", n_pages)
    return n_pages


def common_page_size(page_sizes: Sequence[int]) -> int:
    """The tokens of a page of the pool: those of its largest pages, or more where they do not all divide them."""
    return math.lcm(*page_sizes) if page_sizes else 1
