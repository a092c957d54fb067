"""Where queries, keys and values of generated attention come from: tensors ``[b, h, s, d]``, and caches of them."""

from __future__ import annotations

from dataclasses import dataclass

from tests.lowering.fuzz.builder import Builder


@dataclass(frozen=True)
class Shape:
    """Names or numbers of sizes, as ``setup`` may write them."""

    b: str
    h: str
    s: str
    d: str
    dtype: str


def tensor(b: Builder, of: Shape, name: str) -> str:
    """A variable ``[b, h, s, d]``: an input, or a view of one, or computed."""
    like = f"dtype=torch.{of.dtype}"
    dims = (of.b, of.h, of.s, of.d)

    def randn(*sizes: str, factor: str = "") -> str:
        return b.input(f"torch.randn({', '.join(sizes)}, {like}){factor}", name)

    n_b, n_h, n_d = (b.number(each) for each in (of.b, of.h, of.d))
    style = b.rng.randrange(20)
    if style == 0:
        return b.let(f"{randn(of.b, of.s, of.h, of.d)}.transpose(1, 2)")
    if style == 1:
        return b.let(f"{randn(of.b, of.s, of.h, of.d)}.permute(0, 2, 1, 3)")
    if style == 2:
        x = randn(of.b, of.s, f"{of.h} * {of.d}")
        return b.let(f"{x}.view({b.size(x, 0)}, {b.size(x, 1)}, {n_h}, {n_d}).transpose(1, 2)")
    if style == 3:
        x = randn(of.b, of.s, "12")
        w = randn(f"{of.h} * {of.d}", "12", factor=" * 0.3")
        return b.let(f"F.linear({x}, {w}).unflatten(-1, ({n_h}, -1)).transpose(1, 2)")
    if style == 4:
        start = b.rng.randrange(3)
        return b.let(f"{randn(of.b, of.h, of.s, f'{of.d} + 2')}[..., {start}:{start + n_d}]")
    if style == 5:
        return b.let(f"{randn('2', *dims)}[{b.pick(0, 1, -1)}]")
    if style == 6:
        return b.let(f"{randn(of.b, f'{of.h} + 1', of.s, of.d)}[:, {b.pick(f':{n_h}', '1:', f'-{n_h}:')}]")
    if style == 7:
        return b.let(f"{randn(of.b, of.h, of.d, of.s)}{b.pick('.mT', '.transpose(-1, -2)', '.transpose(2, 3)')}")
    if style == 8:
        x = randn(*dims)
        lower = b.pick(of.dtype, "bfloat16", "float64")
        return b.let(
            b.pick(
                f"({x}.mT + 1).mT",
                f"{x}.mT.to(torch.{lower}).mT.to(torch.{of.dtype})",
                f"{x}.mT.contiguous().mT",
                f"({x}.mT * 1.5).transpose(2, 3)",
                f"{x}.transpose(1, 2).relu().transpose(1, 2)",
            )
        )
    if style == 9 and n_b > 1:
        return b.let(f"{randn('1', of.h, of.s, of.d)}.expand({n_b if not b.varying else b.pick(n_b)}, -1, -1, -1)")
    if style == 10:
        x = randn(of.b, of.s, "3", of.h, of.d)
        return b.let(b.pick(f"{x}.unbind(2)[1].transpose(1, 2)", f"{x}.permute(2, 0, 3, 1, 4)[{b.pick(0, 2)}]"))
    if style == 11:
        x = randn(of.b, of.s, f"2 * {of.h} * {of.d}")
        part = b.let(f"{x}.chunk(2, -1)[{b.pick(0, 1)}]")
        return b.let(f"{part}.unflatten(2, ({n_h}, {n_d})).transpose(1, 2)")
    if style == 12:
        x = randn(*dims)
        half = f"torch.cat([-{x}[..., {n_d // 2}:], {x}[..., :{n_d // 2}]], -1)"
        return b.let(f"{x} * 0.8 + {half} * 0.6")
    if style == 13:
        return b.let(
            f"{randn(*dims)}{b.pick('.clone()', '.contiguous()', ' * 1.0', ' + 0', '.flip(2)', '.roll(1, 2)')}"
        )
    if style == 14:
        x = randn(of.s, of.b, f"{of.h} * {of.d}")
        return b.let(f"{x}.view({b.size(x, 0)}, -1, {n_h}, {n_d}).permute(1, 2, 0, 3)")
    return randn(*dims, factor=b.pick("", "", "", " * 3", " * 40", " * 12000") if name == "q" else "")


def crop(b: Builder, x: str, y: str) -> tuple[str, str]:
    """The same part of the tokens of two tensors, with bounds that may lie outside; now and then of one only."""
    n = b.shape(x)[2]
    bounds = [None, 0, 1, 2, -1, -2, -3, -8, -12, n - 1, n, n + 3, 1 - n, -n, -n - 2]
    start, stop = (b.rng.choice(bounds) for _ in range(2))
    part = f"{'' if start is None else start}:{'' if stop is None else stop}" + b.pick("", "", "", ":2", ":3")
    cropped = [
        b.let(b.pick(f"{each}[:, :, {part}]", f"{each}[..., {part}, :]")) if ":2" in part or b.chance(0.9) else each
        for each in (x, y)
    ]
    return cropped[0], cropped[1]


def chosen(b: Builder, x: str, y: str) -> tuple[str, str]:
    """Those tokens of two tensors that an input says: how many, nobody knows before."""
    n = b.shape(x)[2]
    keep = b.input(f"torch.arange({n}) % 3 != {b.pick(0, 1, 4)}", "keep")
    if b.chance(0.5):
        rows = b.let(b.pick(f"torch.nonzero({keep})[:, 0]", f"torch.nonzero({keep}).squeeze(1)"), "keep")
        return b.let(f"{x}.index_select(2, {rows})"), b.let(f"{y}[:, :, {rows}]")
    if b.chance(0.5):
        return b.let(f"{x}[:, :, {keep}]"), b.let(f"{y}[:, :, {keep}]")
    count = b.let(f"{keep}.sum().item()", "n")
    b.do(f"torch._check({count} <= {n})")
    b.do(f"torch._check({count} > 0)")
    return b.let(f"{x}[:, :, :{count}]"), b.let(f"{y}[:, :, :{count}]")


def repeated(b: Builder, x: str, heads: int) -> str:
    """KV heads for each query head."""
    h, d = b.shape(x)[1], b.shape(x)[3]
    n = heads // h
    s = b.size(x, 2)
    if n == 1 and b.chance(0.7):
        return x
    return b.let(
        b.pick(
            f"{x}[:, :, None].expand(-1, -1, {n}, -1, -1).reshape({b.size(x, 0)}, {heads}, {s}, {d})",
            f"{x}.repeat_interleave({n}, 1)",
            f"{x}.repeat_interleave({n}, dim=1, output_size={heads})",
            f"torch.repeat_interleave({x}, repeats={n}, dim=1)",
            f"{x}[:, None].expand(-1, {n}, -1, -1, -1).flatten(1, 2)",
            f"{x}.repeat(1, {n}, 1, 1)",
            f"{x}.unsqueeze(2).expand(-1, {h}, {n}, -1, -1).flatten(1, 2)",
        )
    )


@dataclass(frozen=True)
class Cache:
    """Keys and values, what else the program returns of them, and the position of the first query in code."""

    k: str
    v: str
    kept: tuple[str, ...] = ()
    at: str | None = None


def cache(b: Builder, of: Shape, d_v: str, new: str) -> Cache:
    """Keys and values of ``of.s`` tokens, of which the last or some in the middle are new."""
    value = Shape(of.b, of.h, of.s, d_v, of.dtype)
    style = b.rng.randrange(12)
    if style <= 3:
        return Cache(tensor(b, of, "k"), tensor(b, value, "v"))
    if style == 4 and of.d == d_v:
        k = tensor(b, of, "k")
        return Cache(k, k)
    if style == 5:
        k = tensor(b, of, "k")
        width = min(b.number(d_v), b.shape(k)[3])
        return Cache(k, b.let(f"{k}[..., {b.pick(f':{width}', f'-{width}:')}]"))
    if style == 6:
        return Cache(*crop(b, tensor(b, of, "k"), tensor(b, value, "v")))
    if style == 7:
        return _joined(b, of, value, new)
    if style == 9 and b.chance(0.25):
        return Cache(*chosen(b, tensor(b, of, "k"), tensor(b, value, "v")))
    if style == 8 and of.d == d_v:
        return _paged(b, of, new)
    return _written(b, of, value, new)


def _joined(b: Builder, of: Shape, value: Shape, new: str) -> Cache:
    """``cat`` of a past and of new tokens, perhaps the last few of them."""
    pairs = []
    for each, name in ((of, "k"), (value, "v")):
        past = b.input(f"torch.randn({each.b}, {each.h}, {each.s}, {each.d}, dtype=torch.{each.dtype})", name)
        fresh = tensor(b, Shape(each.b, each.h, new, each.d, each.dtype), name)
        pairs.append(b.let(f"torch.cat([{past}, {fresh}], {b.pick(2, -2)})", name))
    k, v = pairs
    kept = (k, v) if b.chance(0.6) else ()
    if b.chance(0.4):
        k, v = crop(b, k, v)
    return Cache(k, v, kept)


def _written(b: Builder, of: Shape, value: Shape, new: str) -> Cache:
    """A static cache that new tokens are written into at a position that is a number or an input."""
    n, n_new = b.number(of.s), b.number(new)
    first = b.rng.choice([0, 1, max(0, n - n_new), -2, -n_new, n - n_new + 1]) if n_new <= n else 0
    later = b.rng.choice([first, 0, 1, -1, n - n_new, n - n_new + 1])
    at = b.input(f"torch.tensor([{first}, {later}][call % 2])", "at") if b.chance(0.6) else None
    position = at or str(first)
    row = b.let(f"torch.arange({n_new}) + {position}", "p") if not b.varying and b.chance(0.8) else None
    if row is None:
        row = b.let(b.pick(f"torch.tensor([{first}])", f"torch.arange({first}, {first} + {n_new})"), "p")
    how = b.rng.randrange(8)
    in_place = b.chance(0.5)
    made = []
    for each, name in ((of, "k"), (value, "v")):
        x = b.input(f"torch.randn({each.b}, {each.h}, {each.s}, {each.d}, dtype=torch.{each.dtype})", name)
        fresh = tensor(b, Shape(each.b, each.h, new, each.d, each.dtype), name)
        made.append(_write(b, x, fresh, row, first, n_new, how, in_place))
    return Cache(made[0], made[1], tuple(made) if b.chance(0.6) else (), position)


def _write(b: Builder, x: str, fresh: str, at: str, first: int, n_new: int, how: int, in_place: bool) -> str:
    stop = first + n_new if first >= 0 or first + n_new < 0 else None
    span = f"{first}:{'' if stop is None else stop}"
    if how == 0:
        return b.let(f"{x}.slice_scatter({fresh}, 2, {first}, {stop})")
    if how == 1:
        b.do(f"{x}[:, :, {span}] = {fresh}")
        return x
    if how == 2:
        b.do(f"{x}[:, :, {span}].copy_({fresh})")
        return x
    if how <= 4:
        if in_place:
            b.do(f"{x}.index_copy_(2, {at}, {fresh})")
            return x
        return b.let(f"{x}.index_copy(2, {at}, {fresh})")
    if how == 5 and not in_place:
        return b.let(f"torch.ops.aten.index_put({x}, [None, None, {at}], {fresh})")
    if how == 6 and not in_place:
        return b.let(f"{x}.clone().index_fill_(2, {at}, 0.5)")
    b.do(f"{x}[:, :, {at}] = {fresh}")
    return x


def _paged(b: Builder, of: Shape, new: str) -> Cache:
    """A paged cache of keys and values, one page a sequence, that new rows are appended to."""
    n, n_new = b.number(of.s), b.number(new)
    slab = f"torch.zeros(2, {of.b}, {of.s}, {of.h}, {of.d}, dtype=torch.{of.dtype})"
    slots = b.input(f"torch.arange({of.b})[:, None] * {of.s} + torch.arange({new}) + {max(0, n - n_new)}", "slots")
    rows = b.input(f"torch.randn({of.b} * {new}, {of.h}, {of.d}, dtype=torch.{of.dtype})", "rows")
    caches = [b.input(slab, "slab") for _ in range(2)]
    layer = b.pick(0, 1)
    if b.chance(0.5):
        names = [b.let(f"{each}[{layer}]", "cache") for each in caches]
        b.do(f"torch.ops.flashmla.append_.two({names[0]}, {names[1]}, {rows}, {rows} * 2, {slots}.flatten())")
    else:
        names = [b.let(f"{each}.select(0, {layer})", "cache") for each in caches]
        for each in names:
            b.do(f"torch.ops.flashmla.append_({each}, {rows} + 1, {slots}.flatten())")
    k, v = (b.let(f"{each}.transpose(1, 2)") for each in names)
    return Cache(k, v)
