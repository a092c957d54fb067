"""The suites, in the order in which ``python -m bench all`` runs them."""

from bench.suite import Peer, Suite
from bench.suites import (
    append,
    arena,
    backward,
    compile_time,
    decode,
    decode_shapes,
    decode_up,
    dist,
    end_to_end,
    gqa_decode,
    merge,
    models,
    op_overhead,
    options,
    pool,
    prefill,
    quant,
    scaling,
    serve,
    small_gemm,
    sparse,
    sparsity,
    v41_block,
)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        decode.SUITE,
        decode_shapes.SUITE,
        decode_up.SUITE,
        gqa_decode.SUITE,
        prefill.SUITE,
        backward.SUITE,
        options.SUITE,
        sparse.SUITE,
        sparsity.SUITE,
        v41_block.SUITE,
        small_gemm.SUITE,
        quant.SUITE,
        append.SUITE,
        merge.SUITE,
        arena.SUITE,
        op_overhead.SUITE,
        scaling.SUITE,
        dist.SUITE,
        end_to_end.SUITE,
        models.SUITE,
        serve.SUITE,
        pool.SUITE,
        compile_time.SUITE,
    )
}


def peer_names() -> list[str]:
    """The names of all suites' peers, each once."""
    return list(dict.fromkeys(peer.name for suite in SUITES.values() for peer in suite.peers))


def select(suite: Suite, names: list[str] | None) -> tuple[Peer[object], ...]:
    """The suite's peers with these names; all of them for None. Names of other suites' peers are passed over."""
    if unknown := set(names or ()) - set(peer_names()):
        raise ValueError(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(peer_names())}")
    return tuple(peer for peer in suite.peers if names is None or peer.name in names)
