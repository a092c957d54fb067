"""Attention as models write it: SDPA and softmax written out in every spelling, over generated heads and masks."""

from __future__ import annotations

from tests.lowering.fuzz import heads, masks
from tests.lowering.fuzz.builder import Builder

#: Numbers of tokens around which types of positions end.
EDGES = (127, 128, 129, 130, 255, 256, 257, 258, 300, 2047, 2048, 2050)


def sizes(b: Builder) -> None:
    """Choose the sizes of one attention: b, h, h_kv, s_q, s_kv, d, d_v and the new tokens of a cache."""
    rng = b.rng
    h_kv = rng.choice([1, 1, 2, 2, 4])
    chosen = {
        "b": rng.choice([1, 2, 2, 3]),
        "h": h_kv * rng.choice([1, 1, 1, 2, 3]),
        "h_kv": h_kv,
        "s_q": rng.choice([1, 1, 2, 3, 5, 5, 8]),
        "s_kv": rng.choice([1, 4, 5, 9, 9, 9, 12, 17, 33]),
        "d": rng.choice([8, 16, 16, 16, 24, 32]),
    }
    chosen["d_v"] = chosen["d"] if b.chance(0.75) else rng.choice([8, 16, 24, 1])
    draw = rng.random()
    if draw < 0.12:
        chosen |= {"b": 1, "h": 2, "h_kv": 1, "d": 8, "d_v": 8, "s_kv": rng.choice(EDGES)}
        chosen["s_q"] = chosen["s_kv"] if chosen["s_kv"] <= 300 and b.chance(0.6) else rng.choice([1, 3, 130])
    elif draw < 0.2:
        chosen |= {"s_q": rng.choice([65, 70]), "s_kv": rng.choice([70, 65, 80, 130])}
    elif draw < 0.23:
        chosen[rng.choice(["s_q", "s_kv", "d", "d_v", "b"])] = 0
    if chosen["s_q"] > chosen["s_kv"] and b.chance(0.8):
        chosen["s_q"] = max(1, chosen["s_kv"])
    chosen["new"] = chosen["s_q"]
    b.sizes.update(chosen)
    b.scope.update(chosen)


def attention(b: Builder) -> tuple[str, list[str]]:
    """The result ``[b, h, s_q, d_v]`` in some layout, and other tensors that the program returns."""
    dtype = b.pick("float32", "float32", "float32", "float32", "bfloat16", "float16")
    q = heads.tensor(b, heads.Shape("b", "h", "s_q", "d", dtype), "q")
    kv_heads = "h_kv" if b.chance(0.5) else "h"
    cache = heads.cache(b, heads.Shape("b", kv_heads, "s_kv", "d", dtype), "d_v", "new")
    return attend(b, q, cache), list(cache.kept)


def attend(b: Builder, q: str, cache: heads.Cache) -> str:
    k, v, at = cache.k, cache.v, cache.at
    h = b.shape(q)[1]
    fewer = b.shape(k)[1] != h
    gqa = fewer and b.chance(0.4)
    if fewer and not gqa and not (b.shape(k)[1] == 1 and b.chance(0.5)):
        k, v = heads.repeated(b, k, h), heads.repeated(b, v, h)
    if b.chance(0.02):
        v = b.let(f"{v}[:, :, :1]")
    written = not gqa and not b.chance(0.5)
    # Torch's own attention reads past the end of keys that are fewer than the values, and writes there for gradients.
    if not written and b.shape(k)[2] == b.shape(v)[2]:
        return _sdpa(b, q, k, v, at, gqa)
    return _written_out(b, q, k, v, at)


def _dtype(b: Builder, x: str) -> str:
    return str(b[x].dtype).removeprefix("torch.")


def _sdpa(b: Builder, q: str, k: str, v: str, at: str | None, gqa: bool) -> str:
    options = []
    if b.chance(0.5):
        options.append(f"scale={b.pick(0.2, 0.5, 1.0)}")
    if gqa:
        options.append("enable_gqa=True")
    if b.chance(0.2):
        options.append("dropout_p=0.0")
    draw = b.rng.random()
    if at is not None or draw < 0.42:
        seen = masks.condition(b, q, k, at)
        mask = seen if b.chance(0.65) else masks.additive(b, seen, _dtype(b, q))
        if b.chance(0.2) and b[mask].dim() == 2:
            mask = b.let(f"{mask}[None, None]" + b.pick("", f".expand({b.size(q, 0)}, -1, -1, -1)"), "mask")
        options.append(f"attn_mask={mask}")
    elif draw < 0.6:
        options.append("is_causal=True")
    call = f"F.scaled_dot_product_attention({', '.join([q, k, v, *options])})"
    made = b.attempt(call, "y")
    if made is None:  # the mask has another type than the scores, or another shape
        options = [each for each in options if "mask" not in each]
        made = b.let(f"F.scaled_dot_product_attention({', '.join([q, k, v, *options])})", "y")
    return made


def _written_out(b: Builder, q: str, k: str, v: str, at: str | None) -> str:
    if b.chance(0.15):
        q = b.let(f"{q} * {b.pick(0.25, 0.3, 2)}")
    if b.chance(0.08):
        k = b.let(f"{k} * 0.5")
    scores = _scores(b, q, k)
    scale = b.pick("* 0.3", "/ 4.0", f"* {b.size(q, -1)} ** -0.5", "/ math.sqrt(16)", "")
    if b.chance(0.03):
        scale = "* torch.tensor(0.25)"
    after = b.chance(0.08)
    if scale and not after:
        scores = b.let(f"{scores} {scale}", "s")
    if at is not None or b.chance(0.4):
        scores = _mask(b, scores, q, k, at)
    if after and scale:
        scores = b.let(f"{scores} {scale}", "s")
    if b.chance(0.03):
        scores = b.let(b.pick(f"20 * torch.tanh({scores} / 20)", f"{scores}.clamp(-5, 5)", f"{scores} + 1"), "s")
    weights = _softmax(b, scores, _dtype(b, q))
    if b[weights].dtype != b[v].dtype:
        weights = b.let(f"{weights}.to({v}.dtype)", "w")
    if b.chance(0.25):
        weights = b.let(b.pick(f"F.dropout({weights}, p=0.1, training=False)", f"F.dropout({weights}, p=0.0)"), "w")
    return _product(b, weights, v)


def _scores(b: Builder, q: str, k: str) -> str:
    same = b.shape(q)[:2] == b.shape(k)[:2]
    choices = [f"{q} @ {k}.mT", f"torch.matmul({q}, {k}.transpose(-1, -2))", f"{q} @ {k}.transpose(2, 3)"]
    if same:
        shape = f"{b.size(q, 0)}, {b.size(q, 1)}, {b.size(q, 2)}, {b.size(k, 2)}"
        flat = f"{q}.flatten(0, 1), {k}.flatten(0, 1).transpose(1, 2)"
        rows = f"{b.size(q, 0)} * {b.size(q, 1)}, {b.size(q, 2)}, {b.size(k, 2)}"
        zeros = f"torch.zeros({rows}, dtype={q}.dtype)"
        choices += [
            f"torch.einsum('bhid,bhjd->bhij', {q}, {k})",
            f"({k} @ {q}.mT).mT",
            f"torch.bmm({flat}).view({shape})",
            f"torch.baddbmm({zeros}, {flat}, beta={b.pick(0, 1)}, alpha={b.pick(1, 0.3)}).view({shape})",
        ]
    return b.let(b.rng.choice(choices), "s")


def _mask(b: Builder, scores: str, q: str, k: str, at: str | None) -> str:
    seen = masks.condition(b, q, k, at)
    least = b.pick("-math.inf", "-math.inf", f"torch.finfo({scores}.dtype).min", f"torch.finfo({scores}.dtype).min")
    if b.chance(0.2):
        least = b.pick("torch.finfo(torch.float16).min", "torch.finfo(torch.bfloat16).min", "-1e9", "-1e4")
    draw = b.rng.random()
    made = None
    if draw < 0.35:
        made = b.attempt(f"{scores}.masked_fill(~{seen}, {least})", "s")
    elif draw < 0.55:
        made = b.attempt(f"torch.where({seen}, {scores}, {least})", "s")
    elif draw < 0.58:
        made = b.attempt(f"{scores} + {seen}", "s")
    if made is None:
        made = b.attempt(f"{scores} + {masks.additive(b, seen, _dtype(b, scores))}", "s")
    return made or scores


def _softmax(b: Builder, scores: str, dtype: str) -> str:
    shifted = f"({scores} - {scores}.amax(-1, keepdim=True)).exp()"
    style = b.rng.randrange(12)
    if style == 0:
        exp = b.let(shifted, "w")
        return b.let(f"{exp} / {exp}.sum(-1, keepdim=True)", "w")
    if style == 1 and b.chance(0.3):
        return b.let(f"F.log_softmax({scores}, -1).exp()", "w")
    if style == 1:
        return b.let(f"torch.softmax({scores}.float(), -1).to(torch.{dtype})", "w")
    return b.let(
        b.pick(
            f"torch.softmax({scores}, -1)",
            f"{scores}.softmax(dim=-1)",
            f"F.softmax({scores}, dim=-1, dtype=torch.float32).to(torch.{dtype})",
            f"F.softmax({scores}, -1)",
            f"torch.softmax({scores}, {scores}.dim() - 1)",
        ),
        "w",
    )


def _product(b: Builder, weights: str, v: str) -> str:
    choices = [f"{weights} @ {v}", f"torch.matmul({weights}, {v})"]
    if b.shape(weights)[:2] == b.shape(v)[:2] and b.shape(weights)[3] == b.shape(v)[2]:
        shape = f"{b.size(weights, 0)}, {b.size(weights, 1)}, {b.size(weights, 2)}, {b.size(v, 3)}"
        choices += [
            f"torch.einsum('bhij,bhjx->bhix', {weights}, {v})",
            f"torch.einsum('bhij,bhjx->bihx', {weights}, {v}).transpose(1, 2)",
            f"torch.bmm({weights}.flatten(0, 1), {v}.flatten(0, 1)).view({shape})",
        ]
    return b.let(b.rng.choice(choices), "y")


def latents(b: Builder) -> tuple[str, list[str]]:
    """Multi-head Latent Attention, expanded to heads or absorbed, written in this or that way."""
    chosen = {"b": b.pick(1, 2), "h": b.pick(1, 2, 4), "s_q": b.pick(1, 1, 3, 5), "s_kv": b.pick(5, 9, 17)}
    chosen |= {"d_c": b.pick(16, 32), "d_n": b.pick(8, 16), "d_r": b.pick(8, 4), "d_v": b.pick(8, 16)}
    b.sizes.update(chosen)
    b.scope.update(chosen)
    dtype = b.pick("float32", "float32", "bfloat16")
    h, d_n, d_v = chosen["h"], chosen["d_n"], chosen["d_v"]

    def randn(*names: str, name: str = "a") -> str:
        return b.input(f"torch.randn({', '.join(names)}, dtype=torch.{dtype})", name)

    q = randn("b", "h", "s_q", "d_n + d_r", name="q")
    c = b.pick(lambda: randn("b", "1", "s_kv", "d_c", name="c"), lambda: _latent_cache(b, dtype))()
    rope = randn("b", "1", "s_kv", "d_r", name="r")
    if b.chance(0.3):
        return _absorbed(b, q, c, rope), []
    part = b.pick("", "", "", f"[..., :{chosen['d_c'] // 2}]")
    if part:
        w_k, w_v = randn("h * d_n", "d_c", name="w"), randn("h * d_v", "d_c // 2", name="w")
        k_nope = b.let(f"F.linear({c}[:, 0], {w_k}).unflatten(-1, ({h}, {d_n})).transpose(1, 2)", "k")
        v = b.let(f"F.linear({c}[:, 0]{part}, {w_v}).unflatten(-1, ({h}, {d_v})).transpose(1, 2)", "v")
    else:
        w = randn("h * (d_n + d_v)", "d_c", name="w")
        up = b.let(f"F.linear({c}[:, 0], {w}).view({b.size(c, 0)}, {b.size(c, 2)}, {h}, {d_n + d_v}).transpose(1, 2)")
        k_nope, v = (b.let(f"{up}.split([{d_n}, {d_v}], -1)[{i}]") for i in (0, 1))
        if b.chance(0.1):
            v = b.let(f"{v} + 1")
    k = b.let(f"torch.cat([{k_nope}, {rope}.expand(-1, {h}, -1, -1)], -1)", "k")
    return attend(b, q, heads.Cache(k, v)), [c] if b.chance(0.1) else []


def _latent_cache(b: Builder, dtype: str) -> str:
    past = b.input(f"torch.randn(b, 1, s_kv - 1, d_c, dtype=torch.{dtype})", "c")
    fresh = b.input(f"torch.randn(b, 1, 1, d_c, dtype=torch.{dtype})", "c")
    return b.let(f"torch.cat([{past}, {fresh}], 2)", "c")


def _absorbed(b: Builder, q: str, c: str, rope: str) -> str:
    h, d_n, d_v = b.sizes["h"], b.sizes["d_n"], b.sizes["d_v"]
    like = str(b[q].dtype)
    w_k = b.input(f"torch.randn(h, d_n, d_c, dtype={like}) * 0.3", "w")
    w_v = b.input(f"torch.randn(h, d_c, d_v, dtype={like}) * 0.3", "w")
    up = b.pick(f"torch.einsum('bhid,hdc->bhic', {q}[..., :{d_n}], {w_k})", f"{q}[..., :{d_n}] @ {w_k}")
    both = b.let(f"torch.cat([{up}, {q}[..., {d_n}:]], -1)", "q")
    rows = b.let(f"torch.cat([{c}, {rope}], -1)", "k")
    y = attend(b, both, heads.Cache(rows, c))
    code = b.pick(
        f"torch.einsum('bhic,hcx->bhix', {y}, {w_v})",
        f"{y} @ {w_v}",
        f"torch.bmm({y}.transpose(0, 1).flatten(1, 2), {w_v}).view({h}, {b.size(y, 0)}, -1, {d_v}).transpose(0, 1)",
    )
    return b.attempt(code, "y") or b.let(f"{y} @ {w_v}", "y")
