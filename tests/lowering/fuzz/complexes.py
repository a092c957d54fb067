"""Programs of complex numbers, as rotary embeddings have them: read as real numbers, moved, conjugated, multiplied."""

from __future__ import annotations

from tests.lowering.fuzz.builder import Builder

UNARY = (
    "{x}.conj()",
    "{x}.conj()",
    "{x}.conj().resolve_conj()",
    "torch.conj_physical({x})",
    "{x}.transpose(0, -1)",
    "{x}.mT",
    "{x}[1:]",
    "{x}[..., :1]",
    "{x}.select(0, 1)",
    "{x}.unsqueeze(0)",
    "{x}.squeeze()",
    "{x}.flatten()",
    "{x}.reshape(-1, {x}.shape[0])",
    "{x}.expand(2, *{x}.shape)",
    "{x}.permute(*range({x}.dim())[::-1])",
    "{x}.clone()",
    "{x} * 2",
    "{x} * 1j",
    "-{x}",
    "{x}.exp()",
    "{x}.sum(0, keepdim=True)",
    "{x}.to(torch.complex128)",
    "torch.view_as_complex(torch.view_as_real({x}.resolve_conj()) + 1)",
)
BINARY = (
    *("{x} * {y}",) * 5,
    "{x} * {y}.conj()",
    "{x} * {y}.mT",
    "{x} * {y}[:1]",
    "{x} * {y}.real",
    "{x}.mul({y}).mul({y})",
    "{x} + {y}",
    "torch.complex({x}.real, {y}.imag) * {y}",
    "torch.complex({x}.real, {y}.imag[:1]) * {y}",
)
REALS = (
    *("torch.view_as_real({x})",) * 3,
    "torch.view_as_real({x}).flatten(-2)",
    "torch.view_as_real({x}).sum(-1)",
    "torch.view_as_real({x}.resolve_conj()).transpose(0, 1)",
    "torch.view_as_real({x}.transpose(0, -1))",
    "{x}.real",
    "{x}.imag + 1",
    "{x}.abs()",
)


def complexes(b: Builder) -> list[str]:
    """Tensors of a few sizes that fit one another, changed step by step; what is returned is real."""
    s, h, d = b.pick(3, 5, 17), b.pick(1, 2, 4), b.pick(2, 4, 8, 20)
    b.sizes.update({"s": s, "h": h, "d": d})
    b.scope.update(b.sizes)
    dtype = b.pick("float32", "float32", "float64")
    whole = b.input(f"torch.randn(s, h, 2 * d, dtype=torch.{dtype})")
    angles = b.input(f"torch.randn(s, {b.pick('1', 'h')}, d, dtype=torch.{dtype})")
    known = [
        b.let(f"torch.view_as_complex({whole}.unflatten(-1, (-1, 2)))"),
        b.let(b.pick(f"torch.polar(torch.ones_like({angles}), {angles})", f"torch.complex({angles}.cos(), {angles})")),
    ]
    if b.chance(0.5):
        conjugated = b.pick("", ".conj()")
        known.append(b.input(f"torch.view_as_complex(torch.randn(s, h, d, 2, dtype=torch.{dtype})){conjugated}"))
    for _ in range(b.rng.randint(1, 5)):
        x, y = b.rng.choice(known), b.rng.choice(known)
        code = b.rng.choice(BINARY if b.chance(0.6) else UNARY).format(x=x, y=y)
        if (made := b.attempt(code)) is not None and b[made].is_complex():
            known.append(made)
    last = known[-3:] if b.chance(0.4) else known[-1:]
    return [b.let(b.rng.choice(REALS).format(x=x)) for x in last]
