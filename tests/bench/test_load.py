"""What the load of a server counts, with a server that answers from a list."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from bench.report import RESULTS
from bench.vllm import load
from bench.vllm.__main__ import DOCUMENT, MARK, chapter, failures
from cutlass_kernels.tables import marked


class Answering:
    """Gives every request its tokens, but for those that ask for an odd number of them."""

    def stream(self, body: Mapping[str, Any]) -> Iterator[Any]:
        if body["max_tokens"] % 2:
            raise OSError("status 500")
        yield {"choices": [{"text": "a"}]}
        yield {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}


def test_requests_are_the_same_every_time_and_of_mixed_lengths() -> None:
    requests = load.trace(200)
    assert requests == load.trace(200)
    assert len({r.tokens for r in requests}) > 30
    assert len({len(r.prompt) for r in requests}) > 100
    assert max(len(r.prompt) + r.tokens for r in requests) <= load.MAX_LENGTH
    beginnings = [tuple(r.prompt[: load.SYSTEM_TOKENS]) for r in requests]
    assert max(beginnings.count(each) for each in set(beginnings)) > 5


def test_a_request_without_its_tokens_is_lost() -> None:
    requests = [load.Request([3], tokens) for tokens in (2, 3, 4, 6)]
    answers, seconds = load.run(Answering(), requests, clients=3)  # type: ignore[arg-type]
    assert [a.tokens for a in answers] == [2, 0, 4, 6]
    summary = load.summarize(requests, answers, seconds)
    assert (summary.requests, summary.lost) == (4, 1)
    assert summary.tokens_per_second == pytest.approx(12 / seconds)
    assert summary.last_p50 <= summary.last_p99


def test_what_is_wrong_is_named() -> None:
    after = {"running": 1.0, "kv_cache_usage": 0.0, "wrong_requests_without_a_typed_error": ["cut JSON"]}
    result = {"group": "MLA", "servers": {"flashmla": {"lost": 2}, "other": {"lost": 0}}, "after_killed_clients": after}
    assert [each.split(":")[1].split()[0] for each in failures(result)] == ["flashmla", "8", "cut"]
    good = {"running": 0.0, "kv_cache_usage": 0.0, "wrong_requests_without_a_typed_error": []}
    assert failures({"group": "MLA", "servers": {"flashmla": {"lost": 0}}, "after_killed_clients": good}) == []


def test_the_document_shows_the_committed_load() -> None:
    whole = json.loads((RESULTS / "serve-load.json").read_text())
    assert marked(MARK, chapter(whole)) in DOCUMENT.read_text()
