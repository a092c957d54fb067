"""Programs that hold no attention, and some that hold little else than operators of ours."""

from __future__ import annotations

from tests.lowering.fuzz.builder import Builder

UNARY = (
    "{x}.t() if {x}.dim() == 2 else {x}.transpose(0, 1)",
    "{x}.transpose(-1, -2)",
    "{x}.transpose(-1, -2).contiguous()",
    "{x}.permute(*range({x}.dim())[::-1])",
    "{x} * 2 + 1",
    "{x}.sin()",
    "{x}.relu()",
    "{x}.exp().log1p()",
    "{x}.sum(0)",
    "{x}.sum(-1, keepdim=True)",
    "{x}.transpose(0, 1).sum(-1)",
    "{x}.mean(0, keepdim=True) + {x}",
    "{x}.amax(-1)",
    "{x}.transpose(-1, -2).softmax(-1)",
    "{x}.softmax(0)",
    "F.layer_norm({x}, {x}.shape[-1:])",
    "F.layer_norm({x}.transpose(-1, -2), ({x}.shape[-2],))",
    "F.layer_norm({x}.transpose(-1, -2) + 1, ({x}.shape[-2],))",
    "{x}.clone()",
    "{x}.flip(0)",
    "{x}.roll(3, -1)",
    "{x}.flatten()",
    "{x}[1:]",
    "{x}[..., ::2]",
    "{x}[..., -5:]",
    "{x}.to(torch.bfloat16).float()",
    "{x}.to(torch.int32) % 7",
    "{x}.cumsum(-1)",
    "{x}.argmax(-1)",
    "{x}.var(-1)",
    "F.pad({x}, (1, 2))",
    "torch.where({x} > 0, {x}, 0.0)",
    "{x}.unsqueeze(0).expand(2, *{x}.shape)",
    "{x}.index_select(0, torch.arange({x}.shape[0] - 1, -1, -1))",
    "{x}.tril()",
    "{x}.as_strided((3, 2), (2, 1))",
    "torch.ops.fuzz.strides({x}.transpose(-1, -2) + 1)",
    "{x}[{x}[:, 0] > 0] if {x}.dim() == 2 else {x}",
    "F.avg_pool1d({x}, 2)",
)
BINARY = (
    "{x} + {y}",
    "{x} * {y}",
    "{x} + {y}.transpose(-1, -2)",
    "{x}.transpose(-1, -2) - {y}",
    "torch.where({y} > 0, {x}.transpose(-1, -2), 0.0)",
    "torch.cat([{x}, {y}])",
    "torch.cat([{x}, {y}.transpose(-1, -2)], -1)",
    "torch.stack([{x}, {y}])",
    "{x} @ {y}",
    "{x} @ {y}.transpose(-1, -2)",
    "F.layer_norm({x}.transpose(-1, -2) + {y}, {y}.shape[-1:])",
    "({x}.transpose(-1, -2) + {y}).sum(0)",
    "({x} + {y}.transpose(-1, -2)).amax(-1)",
    "torch.maximum({x}, {y})",
    "{x}.scatter_add(0, torch.zeros({y}.shape, dtype=torch.int64), {y})",
    "torch.index_put({x}, (torch.arange(3),), {y}[:3])",
)
EFFECTS = (
    "{x}.add_({y})",
    "{x}.add_({y}.transpose(-1, -2))",
    "{x}.copy_({y}.transpose(-1, -2))",
    "{x}.add_(torch.where({y}.transpose(-1, -2) > 0, {y}.transpose(-1, -2), 0.0))",
    "{x}.transpose(-1, -2).mul_({y})",
    "{x}[1:3] = {y}[1:3]",
    "{x}[:, 1:] += {y}[:, 1:]",
    "torch.add({x}, {y}, out={x})",
    "{x}.mul_({x}.transpose(-1, -2).transpose(-1, -2))",
    "{x}.index_add_(0, torch.tensor([0, 1, 0]), {y}[:3])",
    "{x}.clamp_(-0.5, 0.5)",
    "{x}.zero_()",
)


def pool(b: Builder) -> list[str]:
    """Inputs that fit one another, straight and transposed, of sizes with and without tails."""
    m, n = b.pick(17, 16, 20, 33, 48, 5), b.pick(48, 17, 16, 64, 3, 20)
    sizes = b.pick((m, n), (m, n), (m, n), (2, m, n), (m, m))
    b.sizes.update({f"n{i}": each for i, each in enumerate(sizes)})
    b.scope.update(b.sizes)
    names = [f"n{i}" for i in range(len(sizes))]
    turned = [*names[:-2], names[-1], names[-2]]
    dtype = b.pick("float32", "float32", "float32", "bfloat16", "float64")
    made = [b.input(f"torch.randn({', '.join(each)}, dtype=torch.{dtype})") for each in (names, names, turned)]
    if b.chance(0.3):
        made.append(b.input(f"torch.randn({', '.join(turned)}, dtype=torch.{dtype}).transpose(-1, -2)"))
    return made


def ordinary(b: Builder) -> list[str]:
    """Operators and effects on a few tensors; what the program returns."""
    known = pool(b)
    for _ in range(b.rng.randint(1, 6)):
        x, y = b.rng.choice(known), b.rng.choice(known)
        draw = b.rng.random()
        if draw < 0.25:
            try:
                b.do(b.rng.choice(EFFECTS).format(x=x, y=y))
            except Exception:
                continue
        elif (made := b.attempt(b.rng.choice(UNARY if draw < 0.6 else BINARY).format(x=x, y=y))) is not None:
            known.append(made)
    return known[-3:] if b.chance(0.5) else known[-1:]


def products(b: Builder) -> list[str]:
    """Linear layers with few rows: `gemm` with what can be fused to it, and `bmm`."""
    m, k, n = b.pick(1, 2, 5, 33), b.pick(16, 24, 32), b.pick(16, 32, 48)
    b.sizes.update({"m": m, "k": k, "n": n})
    b.scope.update(b.sizes)
    dtype = b.pick("float32", "float32", "bfloat16")
    x = b.input(f"torch.randn(m, k, dtype=torch.{dtype})" + b.pick("", "", ".t().contiguous().t()"))
    w = b.input(f"torch.randn({b.pick('n', '2 * n')}, k, dtype=torch.{dtype})" + b.pick("", "", "[:, :]", "[::2]"))
    bias = b.input(f"torch.randn({b.shape(w)[0]}, dtype=torch.{dtype})")
    y = b.let(
        b.pick(f"F.linear({x}, {w})", f"F.linear({x}, {w}, {bias})", f"{x} @ {w}.T", f"torch.addmm({bias}, {x}, {w}.T)")
    )
    half = b.shape(y)[1] // 2
    residual = b.input(f"torch.randn({', '.join(map(str, b.shape(y)))}, dtype=torch.{dtype})")
    outputs = [y] if b.chance(0.3) else []
    for _ in range(b.rng.randint(1, 3)):
        code = b.pick(
            f"F.silu({y}[:, :{half}]) * {y}[:, {half}:]",
            f"{y} + {residual}",
            f"{residual} + {y}",
            f"{y}.relu()",
            f"{y}.view({m}, 2, -1) + 1",
            f"F.linear({y}, torch.ones(8, {b.shape(y)[-1]}, dtype={b[y].dtype}))",
            f"{y}.t()",
            f"{y}.as_strided((2,), (1,))",
            f"torch.ops.fuzz.strides({y})",
            f"{y}.unflatten(-1, (2, -1)).transpose(0, 1)",
            f"{y} + F.linear({x}, {w})",
        )
        made = b.attempt(code)
        if made is not None and b[made].dim() == 2:
            y = made
        elif made is not None:
            outputs.append(made)
    if b.chance(0.3):
        heads = b.input(f"torch.randn(2, k, 8, dtype=torch.{dtype})" + b.pick("", ".mT.contiguous().mT"))
        outputs.append(
            b.let(b.pick(f"{x}[None].expand(2, -1, -1) @ {heads}", f"torch.einsum('mk,hkn->mhn', {x}, {heads})"))
        )
    return [*outputs, y]
