"""Masks of generated attention: conditions on positions in every dtype, and every way to apply one."""

from __future__ import annotations

from dataclasses import dataclass

from tests.lowering.fuzz.builder import Builder

#: The last whole number before a type wraps or rounds.
LAST = {
    "uint8": 255,
    "int8": 127,
    "int16": 2**15 - 1,
    "int32": 2**31 - 1,
    "float16": 2**11,
    "bfloat16": 2**8,
    "float32": 2**24,
}
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Masked:
    """A condition ``seen`` (a bool variable, True where a key is seen) that broadcasts to ``[b, h, s_q, s_kv]``."""

    seen: str


def positions(b: Builder, q: str, k: str, at: str | None) -> tuple[str, str, str]:
    """Variables with the positions of queries (a column) and of keys, and the offset of the first query in code."""
    s_q, s_kv = b.size(q, -2), b.size(k, -2)
    often = 0.7 if b.shape(k)[-2] > 120 else 0.25  # some types end at 127, 255, 256 or 2048
    dtype = b.pick(*INTEGERS, *FLOATS) if b.chance(often) else "int64"
    offset = at if at is not None else f"({s_kv} - {s_q})"
    j = b.let(_row(b, s_kv, dtype), "j")
    if dtype in LAST and b.chance(0.4):  # both sides wrap or round, near where their type ends
        start = LAST[dtype] - b.rng.randint(-2, b.shape(k)[-2] + 2)
        change = b.pick(f"+ {start}", f"+ {start}", f"+ {start // 2} + {start - start // 2}", f"- ({-start})")
        j = b.let(f"{j} {change}", "j")
        i = b.let(f"({_row(b, s_q, dtype)} {change})[:, None]", "i")
        return i, j, offset
    style = b.rng.randrange(5)
    if style == 0:  # the offset goes into the query's position
        i = b.let(f"({_row(b, s_q, dtype)} + {offset})[:, None]", "i")
        return i, j, "0"
    if style == 1 and at is None:
        start = f"{s_kv} - {s_q}"
        i = b.let(f"torch.arange({start}, {s_kv}, dtype=torch.{dtype}).unsqueeze(-1)", "i")
        return i, j, "0"
    if style == 2:
        i = b.let(f"torch.ones({s_q}, dtype=torch.int64).cumsum(0).sub(1)[:, None]", "i")
        return i, j, offset
    return b.let(f"{_row(b, s_q, dtype)}[:, None]", "i"), j, offset


def _row(b: Builder, n: str, dtype: str) -> str:
    if dtype == "int64":
        return b.pick(f"torch.arange({n})", f"torch.arange(0, {n}, 1)", f"torch.arange({n} + 1)[:-1]")
    return b.pick(f"torch.arange({n}).to(torch.{dtype})", f"torch.arange({n}, dtype=torch.{dtype})")


def condition(b: Builder, q: str, k: str, at: str | None) -> str:
    """A variable that is True where a key is seen: mostly causal, now and then nearly, or something else."""
    if at is None and b.chance(0.17):
        return b.let(_other(b, q, k), "seen")
    i, j, offset = positions(b, q, k, at)
    offset = f"{offset} {b.pick('+ 1', '- 1', '- 2', '+ 2')}" if b.chance(0.08) else offset
    plain = f"{j} <= {i} + {offset}"
    text = b.pick(
        plain,
        plain,
        plain,
        f"{i} + {offset} >= {j}",
        f"~({j} > {i} + {offset})",
        f"torch.logical_not({j} > ({i} + {offset}))",
        f"{j} - {i} <= {offset}",
        f"({j} - {i} - {offset}) < 1",
        f"{j} < {i} + {offset} + 1",
        f"-{j} >= -{i} - {offset}",
        f"2 * {j} <= 2 * {i} + 2 * ({offset})",
        f"({j} <= {i} + {offset}) & ({j} >= 0)",
        f"torch.logical_and({j} <= {i} + {offset}, torch.ones_like({j}, dtype=torch.bool))",
        f"({j} <= {i} + {offset}) | ({j} < 0)",
        f"torch.where({j} > {i} + {offset}, False, True)",
    )
    if b.chance(0.12):
        w = b.pick(1, 2, 4, 1000)
        text = f"({text}) " + b.pick(
            f"& ({j} > {i} + {offset} - {w})", f"| ({j} < {w})", f"& ({j} < {w} + {i} * 0)", f"^ ({j} < 0)"
        )
    return b.let(text, "seen")


def _other(b: Builder, q: str, k: str) -> str:
    """Conditions that no causal mask has, or that are inputs."""
    s_q, s_kv = b.size(q, -2), b.size(k, -2)
    n_q, n_kv, n_b = b.shape(q)[-2], b.shape(k)[-2], b.shape(q)[0]
    j = f"torch.arange({s_kv})"
    diagonal = f"{s_kv} - {s_q}"
    choices = [
        f"torch.ones({s_q}, {s_kv}, dtype=torch.bool).tril({diagonal})",
        f"torch.ones({s_q}, {s_kv}).tril(diagonal={diagonal}).bool()",
        f"torch.ones({s_q}, {s_kv}, dtype=torch.bool).triu({diagonal} + 1).logical_not()",
        f"torch.tril(torch.ones({s_q}, {s_kv})) == 1",
        f"{j} < {s_kv} - {b.pick(0, 1, 2)}",
        f"{j} < {max(1, n_kv - 1)}",
        f"{j}[None] // 2 <= torch.arange({s_q})[:, None] // 2 + {diagonal}",
        f"({j} << 1)[None] <= (torch.arange({s_q})[:, None] << 1) + 2 * ({diagonal})",
        f"({j} % 4)[None] <= torch.arange({s_q})[:, None] + {diagonal}",
        f"torch.ones({s_kv}, dtype=torch.bool)",
        f"torch.ones({s_q}, {s_kv}, dtype=torch.bool)",
    ]
    if not b.varying:
        row = b.input(f"torch.arange({n_kv + 1}) // 3", "s")
        length = b.input(f"torch.tensor({b.rng.randint(1, max(1, n_kv))})", "n")
        lengths = b.input(f"torch.randint(1, {n_kv + 1}, ({n_b},))", "n")
        padding = b.input(f"torch.arange({n_kv})[None] < torch.randint(1, {n_kv + 1}, ({n_b}, 1))", "m")
        ones = b.input(f"torch.ones({n_b}, {n_kv}, dtype=torch.int64)", "m")
        square = b.input(f"torch.ones({n_q}, {n_kv}, dtype=torch.bool).tril({n_kv - n_q})", "m")
        causal = f"({j} <= torch.arange({s_q})[:, None] + {diagonal})"
        choices += [
            f"({row}[1:] == {row}[:-1])[None].expand({s_q}, {s_kv})",
            f"{row}[1:][None] <= {row}[:{s_q}, None] + {n_kv}",
            f"{row}[1:] - {row}[:-1] <= {b.pick(0, 1)}",
            f"{j} < {length}",
            f"{j} < {lengths}[:, None, None, None]",
            f"{padding}[:, None, None]",
            f"{padding}[:, None, None] & {causal}",
            f"{ones}[:, None, None, :].bool() & {causal}",
            f"{ones}[:, None, None, :] != 0",
            f"({ones}.cumsum(-1) <= {n_kv})[:, None, None]",
            f"{square}",
            f"{square} & {causal}",
        ]
    return str(b.rng.choice(choices))


def additive(b: Builder, seen: str, dtype: str) -> str:
    """A variable that is added to scores."""
    least = b.pick("-math.inf", f"torch.finfo(torch.{dtype}).min")
    if b.chance(0.2):
        least = b.pick(*(f"torch.finfo(torch.{each}).min" for each in FLOATS), "-1e9", "-1e4")
    if b.chance(0.65):
        name = b.attempt(f"torch.where({seen}, 0.0, {least}).to(torch.{dtype})", "mask")
        if name is not None:
            return name
    code = b.pick(
        f"torch.where({seen}, 0.0, {least})",
        f"torch.zeros({seen}.shape, dtype=torch.{dtype}).masked_fill(~{seen}, {least})",
        f"torch.full({seen}.shape, {least}, dtype=torch.float64).masked_fill({seen}, 0).to(torch.{dtype})",
        f"(1.0 - {seen}.to(torch.{dtype})) * torch.finfo(torch.{dtype}).min",
        f"torch.where({seen}, torch.zeros((), dtype=torch.{dtype}), torch.full((), {least}, dtype=torch.{dtype}))",
        f"(~{seen}).to(torch.{dtype}) * {least if 'inf' not in least else '-1e30'}",
        f"{seen}.to(torch.{dtype})",
        f"{seen}.to(torch.{b.pick(*INTEGERS)}) * 1",
        f"{seen}.float().log()",
        f"({seen}.to(torch.{dtype}) - 1) * 65504.0",
    )
    name = b.attempt(code, "mask")
    if name is None:
        name = b.let(f"torch.where({seen}, 0.0, -math.inf).to(torch.{dtype})", "mask")
    return name
