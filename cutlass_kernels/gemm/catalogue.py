"""The kernels that we ship, and the lists of them that tests build.

Tiles follow the products around MLA (k -> n): DeepSeek-V3 q_a + kv_a 7168 -> 2112, q_b 1536 -> 24576, W_UK 128 -> 512
and W_UV 512 -> 128 over 128 heads, o_proj 16384 -> 7168; V2-Lite q 2048 -> 3072, kv_a 2048 -> 576, o 2048 -> 2048
(https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json and DeepSeek-V2-Lite's). A decode step has few
rows: small tiles, or k split, keep more multiprocessors busy than large tiles would. Prefill has many: large tiles read
each operand fewer times. Between kernels that both fit, nvidia-matmul-heuristics chooses where it is installed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from cutlass_kernels.gemm.config import GemmConfig, Triple
from cutlass_kernels.gemm.epilogue import ACTIVATIONS, Epilogue

#: Tiles of sm_80 with their warps and stages, smallest first.
SM80_TILES: dict[str, tuple[Triple, Triple, int]] = {
    "decode": ((16, 128, 64), (1, 4, 1), 4),
    "small": ((64, 64, 64), (2, 2, 1), 3),
    "wide": ((64, 128, 64), (2, 2, 1), 3),
    "tall": ((128, 64, 64), (2, 2, 1), 3),
    "square": ((128, 128, 64), (2, 2, 1), 3),
    "large": ((256, 128, 64), (4, 2, 1), 3),
}


def fused(activation: str = "none", *, gate: bool = False, residual: bool = False) -> Epilogue:
    """The epilogues of ``flashmla::gemm``: scale of weight rows, bias, activation; gate or residual."""
    return Epilogue(col_scale=True, bias=True, activation=activation, gate=gate, residual=residual)


#: Epilogues of an integer or fp8 product: both operands carry scales.
DEQUANTISE = Epilogue(row_scale=True, col_scale=True, bias=True)


def sm80(tile: str, types: str = "bf16", *, d: str | None = None, **rest: object) -> GemmConfig:
    """A kernel for sm_80 by the name of its tile."""
    shape, warps, stages = SM80_TILES[tile]
    base = GemmConfig("sm_80", shape, types, types, d or types, warps=warps, stages=stages)
    return replace(base, **rest) if rest else base  # type: ignore[arg-type]


def sm90(tile: Triple, types: str = "bf16", *, schedule: str = "pingpong", **rest: object) -> GemmConfig:
    base = GemmConfig("sm_90a", tile, types, types, types, stages=0, schedule=schedule)
    return replace(base, **rest) if rest else base  # type: ignore[arg-type]


def _quantised(arch: str) -> list[GemmConfig]:
    if arch == "sm_90a":
        base = GemmConfig(
            "sm_90a",
            (64, 64, 128),
            "e4m3",
            "e4m3",
            "bf16",
            "linear",
            stages=0,
            schedule="pingpong",
            epilogue=DEQUANTISE,
        )
        return [base, replace(base, tile=(64, 128, 128))]
    shape, warps, stages = SM80_TILES["small"]
    square, square_warps, square_stages = SM80_TILES["square"]
    return [
        GemmConfig("sm_80", shape, "s8", "s8", "bf16", warps=warps, stages=stages, epilogue=DEQUANTISE),
        GemmConfig("sm_80", square, "s8", "s8", "bf16", warps=square_warps, stages=square_stages, epilogue=DEQUANTISE),
        # bf16 times int8 weights, widened in registers: half the bytes of a decode step's weights.
        GemmConfig("sm_80", shape, "bf16", "s8", "bf16", warps=warps, stages=stages, epilogue=fused()),
        GemmConfig("sm_80", shape, "bf16", "s8", "bf16", warps=warps, stages=stages, epilogue=fused(residual=True)),
    ]


def _sm80() -> list[GemmConfig]:
    found = [sm80(tile, types) for types in ("bf16", "fp16") for tile in SM80_TILES]
    found += [sm80("small", types, d="f32") for types in ("bf16", "fp16")]
    found += [sm80("wide", stream_k=True)]
    found += [sm80("small", epilogue=fused(act, residual=res)) for act in ACTIVATIONS for res in (False, True)]
    found += [sm80("small", epilogue=fused(gate=True))]
    found += [sm80("square", epilogue=fused(act)) for act in ACTIVATIONS]
    found += [sm80("square", epilogue=fused(residual=True)), sm80("square", epilogue=fused(gate=True))]
    fp16 = (fused(), fused(residual=True), fused("silu"), fused("gelu"), fused(gate=True))
    found += [sm80("small", "fp16", epilogue=epilogue) for epilogue in fp16]
    found += [sm80(tile, types, family="batched") for types in ("bf16", "fp16") for tile in ("small", "wide", "square")]
    found += [sm80(tile, types, family="grouped") for types in ("bf16", "fp16") for tile in ("small", "wide")]
    return [*found, *_quantised("sm_80")]


def _sm90() -> list[GemmConfig]:
    found = [sm90((64, n, 64), types) for types in ("bf16", "fp16") for n in (32, 64, 128)]
    found += [sm90((128, 128, 64), types, schedule="cooperative") for types in ("bf16", "fp16")]
    found += [sm90((128, 256, 64), schedule="cooperative", cluster=(2, 1, 1))]
    found += [sm90((128, 128, 64), schedule="cooperative", stream_k=True)]
    found += [sm90((64, 64, 64), d="f32")]
    found += [sm90((64, 64, 64), epilogue=fused(activation)) for activation in ACTIVATIONS]
    found += [sm90((64, 64, 64), epilogue=fused(residual=True)), sm90((64, 64, 64), epilogue=fused(gate=True))]
    found += [sm90((64, n, 64), types, family="batched") for types in ("bf16", "fp16") for n in (64, 128)]
    return [*found, *_quantised("sm_90a")]


@cache
def kernels() -> tuple[GemmConfig, ...]:
    """Every kernel, sm_80 first."""
    return (*_sm80(), *_sm90())


def by_name(name: str) -> GemmConfig:
    """Raises `KeyError`."""
    return {config.name: config for config in kernels()}[name]


@cache
def smoke() -> tuple[GemmConfig, ...]:
    """Three that compile fast: a plain and a fused epilogue of sm_80, and TMA with wgmma."""
    return (sm80("small"), sm80("small", epilogue=fused("silu", residual=True)), sm90((64, 64, 64)))


@cache
def representatives() -> tuple[GemmConfig, ...]:
    """The first kernel of each kind: architecture, family, types, scheduler, and sort of epilogue."""
    kinds: dict[object, GemmConfig] = {}
    for config in (*smoke(), *kernels()):
        if config.a == "fp16":
            continue  # the same templates as bf16, with another type
        epilogue = config.epilogue
        sort = (epilogue.plain, epilogue.reads_c and epilogue.residual, epilogue.gate)
        kinds.setdefault((config.arch, config.family, config.a, config.weight, config.d, config.stream_k, sort), config)
    return tuple(kinds.values())


#: Names of lists, for the command line.
LISTS = {"smoke": smoke, "representatives": representatives, "all": kernels}
