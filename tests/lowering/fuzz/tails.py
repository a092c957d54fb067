"""Code around and behind attention: observers of strides, mutation, control flow, other operators."""

from __future__ import annotations

from collections.abc import Callable

from tests.lowering.fuzz.builder import Builder


def _views(b: Builder, y: str) -> list[str]:
    d = b.shape(y)[-1]
    code = b.pick(
        f"{y}.transpose(1, 2).flatten(2)",
        f"{y}.transpose(1, 2).reshape({b.size(y, 0)}, {b.size(y, 2)}, -1)",
        f"{y}.transpose(1, 2).contiguous()",
        f"{y}.flatten(1, 2)",
        f"{y}.view(-1, {d})",
        f"{y}.flatten()",
        f"{y}.permute(2, 0, 1, 3)",
        f"{y}.mT",
        f"{y}[:, :, -1:]",
        f"{y}[..., :{max(1, d // 2)}]",
        f"{y}.view({b.size(y, 0)} * {b.size(y, 1)}, {b.size(y, 2)}, {d})",
        f"{y}.unflatten(-1, (2, -1))",
        f"{y}.transpose(1, 2).view({b.size(y, 0)}, {b.size(y, 2)}, -1)",
    )
    return [b.attempt(code, "z") or y]


def _strided(b: Builder, y: str) -> list[str]:
    n = b[y].numel()
    code = b.pick(
        f"{y}.as_strided(({max(1, n // 2)},), (1,))",
        f"torch.as_strided({y}, {tuple(b.shape(y))}, {tuple(b[y].contiguous().stride())})",
        f"torch.ops.fuzz.needs_contiguous({y})",
        f"torch.ops.fuzz.strides({y})",
        f"torch.ops.fuzz.strides({y} + 1)",
        f"torch.ops.fuzz.strides({y}.transpose(1, 2))",
        f"torch.empty_like({y}).copy_({y})",
        f"torch.tensor({y}.is_contiguous())",
        f"torch.tensor({y}.stride())",
    )
    return [y, b.attempt(code, "z") or y]


def _arithmetic(b: Builder, y: str) -> list[str]:
    d = b.shape(y)[-1]
    w = b.input(f"torch.randn({d}, {d}, dtype={b[y].dtype}) * 0.2", "w")
    code = b.pick(
        f"{y} * 2 + 1",
        f"F.linear({y}, {w})",
        f"{y} + F.silu(F.linear({y}, {w}))",
        f"F.layer_norm({y}, ({d},))",
        f"F.layer_norm({y}.transpose(1, 2) + 1, ({d},))",
        f"{y}.sum((0, 2))",
        f"{y}.transpose(1, 2).float().mean(1)",
        f"{y}.to(torch.{b.pick('float32', 'bfloat16', 'float64')})",
        f"{y} @ {w}.T",
        f"torch.cat([{y}, {y} + 1], {b.pick(0, 1, 2, 3)})",
        f"{y}.cumsum(2)",
        f"{y}.gelu() if False else F.gelu({y})",
    )
    return [b.attempt(code, "z") or y]


def _mutation(b: Builder, y: str) -> list[str]:
    held = b.input(f"torch.zeros({', '.join(map(str, b.shape(y)))}, dtype={b[y].dtype})", "held")
    code = b.pick(
        f"{y}.add_(1)",
        f"{y}.transpose(1, 2).mul_(2)",
        f"{y}[:, :, 0] = 0",
        f"{held}.copy_({y})",
        f"{held}.add_({y})",
        f"{held}.transpose(1, 2).copy_({y}.transpose(1, 2))",
        f"torch.add({y}, 1, out={held})",
        f"torch.mul({y}, {y}, out={held})",
        f"torch.ops.fuzz.write_({y})",
        f"torch.ops.fuzz.write_({held})",
        f"{held}[..., 0].add_({y}[..., 0])",
        f"{b.rng.choice(b.inputs)}.mul_(1)",
    )
    try:
        b.do(code)
    except Exception:
        return [y]
    return [y, held] if b.chance(0.5) else [y]


def _selected(b: Builder, y: str) -> list[str]:
    code = b.pick(
        # How many are chosen depends on no rounding: every number equals itself.
        f"{y}[{y} == {y}]",
        f"torch.nonzero({y} == {y})",
        f"torch.masked_select({y}, {y} < 1e6)",
        f"{y}.gather(-1, {y}.argmax(-1, keepdim=True))",  # its place jumps where two are nearly equal
        f"{y}.flatten()[{y}.flatten() > 0].sum()",
        f"{y}.topk(1).values",
        f"{y}.sort(-1).values",
    )
    return [y, b.attempt(code, "z") or y]


def _branch(b: Builder, y: str) -> list[str]:
    flag = b.input(f"torch.tensor({b.pick(True, False)})", "flag")
    draw = b.rng.randrange(3)
    if draw == 0:
        yes = b.define("yes", "def NAME(x):\n    return x * 2")
        no = b.define("no", "def NAME(x):\n    return " + b.pick("x + 1", "x.clone()", "x.sin()"))
        return [b.let(f"torch.cond({flag}, {yes}, {no}, ({y},))", "z")]
    if draw == 1:
        q = b.input(f"torch.randn(1, 2, 3, {b.pick(8, 16)})", "q")
        body = "F.scaled_dot_product_attention(x, x, x)"
        yes = b.define("yes", f"def NAME(x):\n    return {body}")
        no = b.define("no", f"def NAME(x):\n    return {b.pick(body + ' * 2', 'x.cos()')}")
        return [y, b.let(f"torch.cond({flag}, {yes}, {no}, ({q},))", "z")]
    going = b.define("going", "def NAME(n, x):\n    return n < 3")
    body = b.define("body", "def NAME(n, x):\n    return n + 1, x * 0.5")
    loop = b.let(f"torch._higher_order_ops.while_loop({going}, {body}, (torch.tensor(0), {y}))", "z")
    return [b.let(f"{loop}[1]", "z")]


def _flex(b: Builder, y: str) -> list[str]:
    if b.shape(y)[-1] not in (16, 32) or b.shape(y)[2] < 1:
        return [y]
    flex = "torch.nn.attention.flex_attention.flex_attention"
    return [b.attempt(f"{flex}({y}, {y}, {y})", "z") or y]


def _aliases(b: Builder, y: str) -> list[str]:
    x = b.rng.choice([each for each in b.inputs if b[each].dim() > 0] or b.inputs)
    return [
        y,
        b.attempt(b.pick(f"{y}.transpose(0, 1)", f"{x}.detach()", f"{x}[:1]", f"{y}[:1]", f"{x}.view_as({x})"), "z")
        or y,
    ]


def _broken(b: Builder, y: str) -> list[str]:
    """A graph break, and a view behind it."""
    b.do("torch._dynamo.graph_break()")
    return _views(b, y)


#: Code that may follow, each with its weight.
TAILS: dict[Callable[[Builder, str], list[str]], float] = {
    _views: 5,
    _strided: 3,
    _arithmetic: 4,
    _mutation: 3,
    _selected: 2,
    _branch: 1.5,
    _flex: 0.5,
    _aliases: 1.5,
    _broken: 0.5,
}


def behind(b: Builder, y: str) -> list[str]:
    """Zero to three of `TAILS` behind a tensor; what the program returns."""
    outputs = [y]
    for _ in range(b.pick(0, 1, 1, 2, 3)):
        (tail,) = b.rng.choices(list(TAILS), list(TAILS.values()))
        last = outputs.pop()
        outputs += tail(b, last) if b[last].dim() == 4 or tail in (_branch, _selected) else [last]
    return outputs
