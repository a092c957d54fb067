"""The emulator does not model everything: a list, so that nobody takes silence for a proof."""

from __future__ import annotations

#: One sentence each. Everything else in the PTX that is executed is either modelled or refused.
LIMITS: tuple[str, ...] = (
    "PTX is executed, not machine code: what ptxas makes of it (registers, spills, scheduling) is trusted.",
    "No timing: clocks read 0, and counters say nothing about speed.",
    "Threads of a warp that are at one place run in step: races between lanes of one warp are not looked for.",
    "Races are looked for by 4-byte words; two accesses narrower than a word are not compared with each other.",
    "In global memory a write is compared with the writes before it, not with reads, and not with the copies of TMA.",
    "Races in global memory are looked for among at most 512 warps at once; a relaxed read-modify-write acquires.",
    "Values are seen in program order: a missing fence is noticed as a race, never by a stale value.",
    "Of the proxies only the asynchronous one is followed, and only where it reads what the generic one wrote.",
    "A warpgroup's wait for wgmma ends its product for all four warps; a device may let one warp go on before another.",
    "A missing wgmma.fence is noticed where registers were written before it, not where they were only read.",
    "Asynchronous work lands all at once, in one of three orders; a device may interleave it in others.",
    "More than 48 mbarriers in one cluster share agents in the race check, which may hide races between them.",
    "Sums of matrix instructions are taken in float32 in our order; a device's rounding inside is undocumented.",
    "Sums of fp8 products are float32 too, where a Hopper device keeps 13 fraction bits of what it adds.",
    ".approx functions are as exact as numpy's; a device may differ in the last bits.",
    "fma.f64 is computed in long double and may differ from a fused one in the last bit.",
    "Unwritten registers hold a fixed pattern, and reading one is not reported.",
    "Values that nobody wrote are followed by lanes, not by bits, and not through wgmma, which reports them at once.",
    "A grid's CTAs beyond what the multiprocessors hold, two each where they fit, run after the first ones have ended.",
    "A setmaxnreg by fewer registers than a thread needs is not noticed: how many it needs is for ptxas to say.",
    "CTAs of a number of threads that is no multiple of 32 are refused.",
    "Sparse mma, block-scaled and sub-byte types, im2col, cp.reduce, textures, tcgen05 and all of sm_100 are refused.",
    "Host streams and events order nothing: every launch and copy is done when its call returns.",
)
