"""Programs that call operators of ours themselves, with neighbours that may be fused to them."""

from __future__ import annotations

from collections.abc import Callable

from tests.lowering.fuzz.builder import Builder


def _append(b: Builder) -> list[str]:
    chosen = {
        "pages": b.pick(1, 2, 5),
        "page": b.pick(4, 8, 3),
        "h": b.pick(1, 1, 2),
        "d": b.pick(16, 8, 20),
        "n": b.pick(1, 3, 5, 9),
    }
    b.sizes.update(chosen)
    b.scope.update(chosen)
    dtype = b.pick("float32", "bfloat16", "float16")
    shape = b.pick(
        ("torch.zeros(2, pages, page, h, d, dtype=torch.{0})", "{1}[1]"),
        ("torch.zeros(3, pages, page, h, d, dtype=torch.{0})", "{1}[2]"),
        ("torch.zeros(pages, 2, page, h, d, dtype=torch.{0})", "{1}[:, 1]"),
        ("torch.zeros(pages, page, h, d, dtype=torch.{0})", "{1}"),
        ("torch.zeros(pages, page, h, d + 8, dtype=torch.{0})", "{1}[..., 4:-4]"),
        ("torch.zeros(pages + 1, page, h, d, dtype=torch.{0})", "{1}[1:]"),
        ("torch.zeros(pages, h, page, d, dtype=torch.{0})", "{1}.transpose(1, 2)"),
        ("torch.zeros(1, page, h, d, dtype=torch.{0}).expand(pages, -1, -1, -1)", "{1}"),
        (
            "torch.zeros(pages * page, h, d, dtype=torch.{0})",
            f"{{1}}.view(-1, {chosen['page']}, {chosen['h']}, {chosen['d']})",
        ),
    )
    slab = b.input(shape[0].format(dtype), "slab")
    cache = slab if shape[1] == "{1}" else b.let(shape[1].format(dtype, slab), "cache")
    rows = b.input(f"torch.randn(n, h, d, dtype=torch.{b.pick('float32', dtype)})", "rows")
    slots = b.input(
        b.pick(
            "torch.randperm(pages * page).repeat(9)[:n]",
            "torch.arange(n) % (pages * page)",
            "torch.randint(-1, pages * page, (n,))",
            "torch.randint(-1, pages * page, (2 * n,))[::2]",
            "torch.arange(n) + pages * page - 1",
        ),
        "slots",
    )
    code = b.pick(
        f"{rows}",
        f"{rows} * 2",
        f"F.normalize({rows}, dim=-1)",
        f"{rows}.flip(-1)",
        f"{rows} + {rows}.mean(-1, keepdim=True)",
    )
    made = b.let(f"({code}).to({cache}.dtype)", "rows")
    outputs = [b.let(f"{cache} + 1")] if b.chance(0.2) else []
    call = f"torch.ops.flashmla.append_({cache}, {made}, {slots})"
    try:
        b.do(call)
    except Exception:
        if b.chance(0.9):
            b.do(f"{slots} = {slots}.clamp(max={chosen['pages'] * chosen['page'] - 1})")
            try:
                b.do(call)
            except Exception:
                return [made]
        else:
            b.steps.append(type(b.steps[-1])("", call))
    for _ in range(b.rng.randrange(3)):
        outputs.append(
            b.let(b.pick(f"{cache}.sum(-1)", f"{slab} * 2", f"{cache}[-1]", f"{made} + 1", f"{cache}.flatten()"))
        )
    return outputs or [made]


def _decode(b: Builder) -> list[str]:
    chosen = {"b": b.pick(1, 2, 3), "s_q": b.pick(1, 1, 2), "h_kv": b.pick(1, 1, 2), "group": b.pick(1, 2, 4)}
    chosen |= {"page": b.pick(4, 8), "max": b.pick(1, 3), "d_v": b.pick(16, 32), "d_r": b.pick(0, 8)}
    b.sizes.update(chosen)
    b.scope.update(chosen)
    dtype = b.pick("float32", "float32", "bfloat16")
    q = b.input(f"torch.randn(b, s_q, h_kv * group, d_v + d_r, dtype=torch.{dtype})", "q")
    kv = b.input(f"torch.randn(b * max, page, h_kv, d_v + d_r, dtype=torch.{dtype})", "kv")
    table = b.input("torch.randperm(b * max).to(torch.int32).view(b, max)", "table")
    lengths = b.input("torch.randint(0, page * max + 1, (b,)).to(torch.int32)", "lengths")
    q2 = b.let(b.pick(f"{q} * 0.5", f"{q}.clone()", f"{q}.transpose(1, 2).contiguous().transpose(1, 2)"), "q")
    d_v, heads = chosen["d_v"], chosen["h_kv"] * chosen["group"]
    causal = f"causal={b.pick(True, False)}"
    if b.chance(0.3):
        w = b.input(f"torch.randn(h_kv * group, d_v, 8, dtype=torch.{dtype})" + b.pick("", ".mT.contiguous().mT"), "w")
        weight = f"{w}.mT" if b.chance(0.5) else w
        both = b.attempt(
            f"torch.ops.flashmla.decode_up({q2}, {kv}, None, {table}, {lengths}, {weight}, {d_v}, {causal})"
        )
        if both is not None:
            return [b.let(f"{both}[0] + 1"), b.let(f"{both}[1]")]
    both = b.let(f"torch.ops.flashmla.decode({q2}, {kv}, None, {table}, {lengths}, {d_v}, {causal})")
    out = b.let(f"{both}[0]")
    gate = b.input(f"torch.randn(b, s_q, h_kv * group, d_v, dtype=torch.{dtype})", "gate")
    w = b.input(f"torch.randn(h_kv * group, d_v, 8, dtype=torch.{dtype})", "w")
    code = b.pick(
        f"{out} * torch.sigmoid({gate}) + 1",
        f"{out}.flatten(2) * {gate}.flatten(2)",
        f"{out}.transpose(1, 2)",
        f"torch.einsum('bihc,hcx->bihx', {out}, {w})",
        f"torch.bmm({out}.flatten(0, 1).transpose(0, 1), {w})",
        f"torch.ops.flashmla.bmm({out}.flatten(0, 1).transpose(0, 1), {w})",
        f"({out} * {gate}).sum(-1)",
        f"{out}.view(-1, {heads} * {d_v})",
        f"torch.ops.flashmla.merge_states([{out}, {out} * 2], [{both}[1], {both}[1] + 1])[0]",
    )
    return [b.attempt(code) or out, *([b.let(f"{both}[1]")] if b.chance(0.4) else [])]


def _prefill(b: Builder) -> list[str]:
    chosen = {"s": b.pick(5, 9, 70), "h_kv": b.pick(1, 2), "group": b.pick(1, 2), "d": b.pick(16, 24)}
    b.sizes.update(chosen)
    b.scope.update(chosen)
    dtype = b.pick("float32", "float32", "bfloat16")
    q = b.input(f"torch.randn(s, h_kv * group, d, dtype=torch.{dtype})", "q")
    k, v = (b.input(f"torch.randn(s, h_kv, d, dtype=torch.{dtype})", name) for name in "kv")
    bounds = b.input("torch.tensor([0, 2, s], dtype=torch.int32)", "bounds")
    q2 = b.let(b.pick(f"{q} * 2", f"{q}.transpose(0, 1).contiguous().transpose(0, 1)"), "q")
    both = b.let(f"torch.ops.flashmla.prefill({q2}, {k}, {v}, {bounds}, {bounds}, {b.pick(True, False)})")
    out = b.let(f"{both}[0]")
    return [
        b.let(b.pick(f"{out} + 1", f"{out}.flatten(1)", f"{out}.transpose(0, 1).contiguous()")),
        b.let(f"{both}[1]"),
    ]


def _gemm(b: Builder) -> list[str]:
    chosen = {"m": b.pick(1, 3, 40), "k": b.pick(16, 32), "n": b.pick(16, 24)}
    b.sizes.update(chosen)
    b.scope.update(chosen)
    dtype = b.pick("float32", "float32", "bfloat16")
    x = b.input(f"torch.randn(m, k, dtype=torch.{dtype})")
    w = b.input(f"torch.randn(n, k, dtype=torch.{dtype})", "w")
    bias = b.input(f"torch.randn(n, dtype=torch.{dtype})")
    draw = b.rng.randrange(4)
    if draw == 0:
        held = b.input(f"torch.zeros(m, n, dtype=torch.{dtype})", "held")
        b.do(f"torch.ops.flashmla.gemm.out({x} * 2, {w}, {bias}, out={held})")
        return [b.let(f"{held} + 1")]
    if draw == 1:
        rows = b.let(f"torch.ops.flashmla.quantize_rows(torch.cat([{x}, {x}], -1).repeat(1, 36)[:, :576].contiguous())")
        return [rows, b.let(f"torch.ops.flashmla.dequantize_rows({rows})")]
    if draw == 2:
        heads = b.input(f"torch.randn(2, k, 8, dtype=torch.{dtype})" + b.pick("", ".mT.contiguous().mT"))
        y = b.let(f"torch.ops.flashmla.bmm(torch.stack([{x}, {x} + 1]), {heads})")
        return [b.let(b.pick(f"{y} + 1", f"{y}.transpose(0, 1).flatten(1)", f"{y}.sum(0)"))]
    activation = b.pick("none", "silu_mul")
    y = b.let(f"torch.ops.flashmla.gemm({x} + 1, {w}, {bias}, activation='{activation}')")
    return [b.let(b.pick(f"{y}.relu()", f"{y}.t()", f"{y}.view(-1)", f"{y} + {y}.mean()")), y]


#: Each with its weight.
KINDS: dict[Callable[[Builder], list[str]], float] = {_append: 4, _decode: 3, _prefill: 1, _gemm: 2}


def ours(b: Builder) -> list[str]:
    (kind,) = b.rng.choices(list(KINDS), list(KINDS.values()))
    return kind(b)
