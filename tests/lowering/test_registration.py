"""The backend's name, its options, and the compilations of others, which it must leave alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.graph  # it imports the table by name
from torch import Tensor
from torch._inductor import lowering as inductor
from torch._inductor.codegen import common

import flashmla_ops
import lowering
from flashmla_ops.errors import ArgumentError
from lowering import Settings, backend, cache_key, registration, versions
from lowering.explain.program import Program, read_programs
from lowering.passes import PASSES
from lowering.session import session
from lowering.settings import CHOICES


def write(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    torch.ops.flashmla.append_(cache, rows * 2, slots)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 4, 1, 8), torch.ones(2, 1, 8), torch.tensor([3, -1])


def steps_with(**kwargs: object) -> list[str]:
    torch._dynamo.reset()
    with versions.without_caches(), read_programs() as sources:
        torch.compile(write, fullgraph=True, **kwargs)(*arguments())  # type: ignore[call-overload]
    return [step.kind for step in Program.joined(sources).steps]


@pytest.fixture(autouse=True)
def disabled() -> Iterator[None]:
    yield
    lowering.disable()


def test_the_name_is_known_to_torch() -> None:
    assert "flashmla" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("flashmla") is backend.flashmla


def test_without_a_table_of_users_lowerings_ours_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.11; an operator that Inductor lowers, and one of ours, which it calls."""
    flashmla, aten = torch.ops.flashmla, torch.ops.aten
    asked = []

    def cosine(x: object) -> object:
        asked.append("sin")
        return inductor.lowerings[aten.cos.default](x)

    def no_opinion(*_: object) -> None:
        asked.append("bmm")

    monkeypatch.delattr(inductor, "user_lowerings", raising=False)
    monkeypatch.setitem(inductor.lowerings, aten.sin.default, inductor.lowerings[aten.sin.default])
    monkeypatch.delitem(inductor.lowerings, flashmla.bmm.default, raising=False)
    versions.enter_lowering(aten.sin.default, cosine)
    versions.enter_lowering(flashmla.bmm.default, no_opinion)
    x = torch.randn(2, 3, 3)
    torch._dynamo.reset()
    with versions.without_caches():
        found = torch.compile(lambda x: flashmla.bmm(torch.sin(x), x), fullgraph=True)(x)
    torch.testing.assert_close(found, flashmla.bmm(torch.cos(x), x))
    assert sorted(asked) == ["bmm", "sin"]


def test_enable_and_disable_change_the_default_only() -> None:
    assert steps_with() == ["kernel", "flashmla"]
    for _ in range(2):
        flashmla_ops.enable_compile()
        assert lowering.is_enabled()
    assert steps_with() == ["kernel"]
    assert steps_with(backend="inductor") == ["kernel", "flashmla"]
    for _ in range(2):
        lowering.disable()
        assert not lowering.is_enabled()
    assert steps_with() == ["kernel", "flashmla"]
    assert steps_with(backend="flashmla") == ["kernel"]


def test_enabling_from_many_threads_keeps_the_first_default() -> None:
    before = versions.default_backend()
    threads = [threading.Thread(target=lowering.enable) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lowering.disable()
    assert versions.default_backend() == before


def test_modes_and_options_of_inductor_are_taken_and_checked() -> None:
    assert steps_with(backend="flashmla", mode="max-autotune-no-cudagraphs") == ["kernel"]
    assert steps_with(backend="flashmla", options={"epilogue_fusion": False}) == ["kernel"]
    assert steps_with(backend="flashmla", options={"flashmla.fuse_append": False}) == ["kernel", "flashmla"]
    for options in ({"no_such_option": 1}, {"flashmla.no_such": 1}, {"flashmla.decode": "fast"}):
        with pytest.raises(Exception, match=r"no_such|decode"):
            steps_with(backend="flashmla", options=options)


@pytest.mark.parametrize(
    "wrong", [1, 0, 1.0, None, "no", "true", "True", "", [], ("auto",), torch.tensor(True)], ids=repr
)
@pytest.mark.parametrize("name", Settings.__dataclass_fields__)
def test_a_setting_takes_its_own_values_only(name: str, wrong: object) -> None:
    with pytest.raises(ArgumentError) as raised:
        backend.split_options({backend.PREFIX + name: wrong})
    assert (raised.value.argument, raised.value.actual) == (name, repr(wrong))
    assert Settings.__dataclass_fields__.keys() == CHOICES.keys()
    for choice in CHOICES[name]:
        assert getattr(backend.split_options({backend.PREFIX + name: choice})[0], name) is choice


def test_a_session_belongs_to_its_thread_and_ends() -> None:
    seen: list[object] = []
    with lowering.active(Settings(decode="template")) as current:
        assert session() is current
        thread = threading.Thread(target=lambda: seen.append(session()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert session() is None
    choose = common.device_codegens["cpu"].scheduling
    assert type(choose(None)).__module__ == "torch._inductor.codegen.cpp"


def test_the_users_pass_runs_before_ours() -> None:
    order: list[str] = []

    class Theirs(versions.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            order.append("theirs")

        def uuid(self) -> str:
            return "theirs"

    PASSES.append(lambda graph, record: order.append("ours"))
    try:
        steps_with(backend="flashmla", options={"joint_custom_pre_pass": Theirs()})
    finally:
        PASSES.pop()
    assert order == ["theirs", "ours"]
    joined = versions.join_passes([Theirs(), Theirs()], registration.RunPasses())
    assert joined.uuid() == ("theirs", "theirs", registration.RunPasses().uuid())
    assert versions.join_passes(lambda graph: None, Theirs()).uuid() is None


def test_the_tag_is_extended_and_never_replaced() -> None:
    once = cache_key.extended_tag("theirs", Settings())
    assert once.startswith("theirs+flashmla-")
    assert cache_key.extended_tag(once, Settings()) == once
    assert cache_key.extended_tag("", Settings(decode="template")) != cache_key.extended_tag("", Settings())
    with versions.patch_compiler({"cache_key_tag": "theirs"}):
        with lowering.active():
            assert torch.compiler.config.cache_key_tag == once
        assert torch.compiler.config.cache_key_tag == "theirs"
