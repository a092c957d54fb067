"""Autograd's view of the operators: gradients that they state, others refused, however asked for; mutations counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from flashmla_ops.errors import NotDifferentiableError
from flashmla_ops.ops import _autograd
from flashmla_ops.ops._library import DEFINED, operator
from tests.support.calls import CALLS, DIFFERENTIABLE, MUTATED, WITH_GRADIENT, get, replaced, run

Function = Callable[[Tensor], Tensor]


def test_every_operator_has_a_call_here() -> None:
    assert set(CALLS) == set(DEFINED)


def plain(function: Function, x: Tensor) -> Any:
    return function(x.clone().requires_grad_())


def dual(function: Function, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


def dual_without_grad(function: Function, x: Tensor) -> Any:
    with torch.no_grad():
        return dual(function, x)


def of_a_module(function: Function, x: Tensor) -> Any:
    module = nn.Module()
    module.x = nn.Parameter(x.clone())
    module.forward = lambda: function(module.x)
    return torch.func.grad(lambda state: torch.func.functional_call(module, state, ()))({"x": x})


WAYS: dict[str, Callable[[Function, Tensor], Any]] = {
    "plain": plain,
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad_and_value": lambda f, x: torch.func.grad_and_value(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "dual": dual,
    "dual_without_grad": dual_without_grad,
    "functional_call": of_a_module,
    "grad_of_grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(lambda z: (y * z).sum())(x).sum() + f(y))(x),
    "grad_compiled": lambda f, x: torch.compile(torch.func.grad(f), backend="aot_eager")(x),
    "grad_of_its_grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x),
    "vmap_of_grad": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, x])),
}


def scalar_of(name: str, argument: str) -> tuple[Function, Tensor]:
    """The sum of what the operator returns and writes, as a function of one argument."""
    arguments = CALLS[name].arguments()

    def function(x: Tensor) -> Tensor:
        written = {key: arguments[key].clone() for key in CALLS[name].mutated if key != argument}
        return torch.stack([y.sum() for y in run(name, replaced(arguments | written, argument, x))]).sum()

    return function, get(arguments, argument)


@pytest.mark.parametrize(("name", "argument"), DIFFERENTIABLE)
@pytest.mark.parametrize("way", ["plain", "grad", "jvp", "dual"])
def test_a_derivative_is_refused(name: str, argument: str, way: str) -> None:
    function, x = scalar_of(name, argument)
    with pytest.raises(NotDifferentiableError) as caught:
        WAYS[way](function, x)
    assert (caught.value.op, caught.value.argument) == (name.partition(".")[0], argument)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "grad_compiled"])
@pytest.mark.parametrize(("name", "argument"), [("gemm", "a"), ("attend_masked", "q"), ("merge_states", "outs[1]")])
def test_however_it_is_asked_for(name: str, argument: str, way: str) -> None:
    function, x = scalar_of(name, argument)
    with pytest.raises(NotDifferentiableError, match=f"argument '{argument.partition('[')[0]}"):
        WAYS[way](function, x)


@pytest.mark.parametrize(("name", "argument"), WITH_GRADIENT)
@pytest.mark.parametrize("way", ["jvp", "dual", "dual_without_grad", "hessian", "grad_of_its_grad"])
def test_a_derivative_that_is_no_gradient_is_refused(name: str, argument: str, way: str) -> None:
    function, x = scalar_of(name, argument)
    with pytest.raises(NotDifferentiableError, match=r"no gradient for it|no backward"):
        WAYS[way](function, x)


@pytest.mark.parametrize(("name", "argument"), WITH_GRADIENT)
def test_a_second_backward_is_refused(name: str, argument: str) -> None:
    function, x = scalar_of(name, argument)
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="a second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(("name", "argument"), WITH_GRADIENT)
def test_every_way_to_a_gradient_finds_the_same(name: str, argument: str) -> None:
    torch._dynamo.reset()
    function, x = scalar_of(name, argument)
    leaf = x.clone().requires_grad_()
    function(leaf).backward()
    assert leaf.grad is not None
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaf_of_compiled = x.clone().requires_grad_()
    compiled(leaf_of_compiled).backward()
    found = {
        "compiled": leaf_of_compiled.grad,
        "grad": torch.func.grad(function)(x),
        "vjp": torch.func.vjp(function, x)[1](torch.ones(()))[0],
        "jacrev": torch.func.jacrev(function)(x),
        "functional_call": of_a_module(function, x)["x"],
        "grad_compiled": WAYS["grad_compiled"](function, x),
        "vmap_of_grad": WAYS["vmap_of_grad"](function, x)[1],
    }
    for way, gradient in found.items():
        torch.testing.assert_close(gradient, leaf.grad, msg=lambda text, way=way: f"{way}: {text}")


def test_a_call_without_gradients_takes_no_more_steps_in_python() -> None:
    """Than one of an operator that has none."""

    def calls(name: str) -> int:
        arguments, op, events = CALLS[name].arguments(), operator(name), []
        op(**arguments)
        sys.setprofile(lambda frame, event, _: events.append(frame) if event == "call" else None)
        try:
            op(**arguments)
        finally:
            sys.setprofile(None)
        return len(events)

    assert {calls(name) for name in sorted({name for name, _ in WITH_GRADIENT})} == {calls("attend_masked")}


def test_a_derivative_is_refused_when_compiled() -> None:
    function, x = scalar_of("gemm", "a")
    with pytest.raises(RuntimeError, match="argument 'a' requires a gradient, but the operator has no backward"):
        WAYS["grad_compiled"](function, x)


@pytest.mark.parametrize("name", CALLS)
def test_what_asks_for_no_derivative_of_it_runs_as_ever(name: str) -> None:
    arguments = CALLS[name].arguments()

    def beside(x: Tensor) -> Tensor:
        return x.square().sum() + sum(y.double().sum() for y in run(name, arguments)).float() * 0

    def detached(x: Tensor) -> Tensor:
        with torch.no_grad():
            run(name, arguments)
        return x.square().sum()

    x = torch.ones(3)
    assert torch.equal(torch.func.grad(detached)(x), 2 * x)
    assert torch.equal(torch.func.jvp(detached, (x,), (x,))[1], torch.tensor(6.0))
    if not CALLS[name].mutated:  # under a transform, torch refuses to write what was captured
        assert torch.equal(torch.func.grad(beside)(x), 2 * x)


@pytest.mark.parametrize(("name", "argument"), [*DIFFERENTIABLE, *WITH_GRADIENT])
def test_without_gradients_tensors_that_require_one_are_served(name: str, argument: str) -> None:
    function, x = scalar_of(name, argument)
    expected = function(x.clone())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(function(x.clone().requires_grad_()), expected)


@pytest.mark.parametrize(("name", "argument"), MUTATED)
def test_a_mutation_raises_the_version(name: str, argument: str) -> None:
    arguments = CALLS[name].arguments()
    tensor, base = arguments[argument], arguments[argument].new_zeros(2, *arguments[argument].shape)
    for given, counted in ((tensor, tensor), (base[1], base)):
        before = {key: x._version for key, x in arguments.items() if isinstance(x, Tensor)}
        version = counted._version
        operator(name)(**arguments | {argument: given})
        assert counted._version > version
        unwritten = before.keys() - CALLS[name].mutated
        assert all(arguments[key]._version == before[key] for key in unwritten)


@pytest.mark.parametrize(("name", "argument"), MUTATED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "flashmla"])
def test_a_mutation_raises_the_version_when_compiled(name: str, argument: str, backend: str) -> None:
    torch._dynamo.reset()
    op, arguments = operator(name), CALLS[name].arguments()
    before = {key: x._version for key, x in arguments.items() if isinstance(x, Tensor)}
    torch.compile(lambda **named: op(**named), backend=backend, fullgraph=True)(**arguments)
    assert {key for key, version in before.items() if arguments[key]._version > version} == set(CALLS[name].mutated)


@pytest.mark.parametrize(("name", "argument"), [x for x in MUTATED if x[1] != "summaries"])  # those are bytes
def test_a_backward_learns_of_a_mutation(name: str, argument: str) -> None:
    arguments = CALLS[name].arguments()
    weight = torch.ones_like(arguments[argument], requires_grad=True)
    loss = (weight * arguments[argument]).sum()
    operator(name)(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("name", "argument"), MUTATED)
def test_an_inference_tensor_refuses_outside_inference_mode(name: str, argument: str) -> None:
    arguments = CALLS[name].arguments()
    with torch.inference_mode():
        arguments[argument] = torch.zeros_like(arguments[argument])
        operator(name)(**arguments)
        written = arguments[argument].zero_()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        operator(name)(**arguments)
    assert (written == 0).all()


def test_what_failed_wrote_nothing_and_is_not_counted() -> None:
    arguments = CALLS["append_"].arguments() | {"slot_mapping": torch.tensor([0, 99, 1])}
    with pytest.raises(RuntimeError, match="slots below"):
        operator("append_")(**arguments)
    assert arguments["kv_cache"]._version == 0


@pytest.fixture
def in_python() -> Iterator[torch._ops.OpOverload]:
    """An operator that C++ does not know: the kernels of both keys are those of Python."""
    library = torch.library.Library("flashmla_test", "DEF")  # noqa: TOR901
    library.define("add_(Tensor(a!) a, Tensor[] others) -> ()")
    library.impl("add_", lambda a, others: [a.add_(x) for x in others] and None, "CompositeExplicitAutograd")
    op = torch.ops.flashmla_test.add_.default
    _autograd.complete(library, {"add_": op}, {})
    yield op
    library._destroy()


@pytest.mark.parametrize("way", ["plain", "grad", "jvp", "dual"])
def test_in_python_a_derivative_is_refused(in_python: torch._ops.OpOverload, way: str) -> None:
    def function(x: Tensor) -> Tensor:
        in_python(a := torch.zeros(3), [torch.ones(3), x])
        return a.sum()

    with pytest.raises(NotDifferentiableError, match=r"argument 'others\[1\]'"):
        WAYS[way](function, torch.ones(3))
    with torch.no_grad():
        assert function(torch.ones(3, requires_grad=True)) == 6


def test_in_python_a_mutation_is_counted(in_python: torch._ops.OpOverload) -> None:
    base, x = torch.zeros(2, 3), torch.ones(3)
    in_python(base[1], [x])
    assert (base._version, x._version) == (1, 0)
    assert torch.equal(base[1], x)
    with torch.inference_mode():
        a = torch.zeros(3)
        in_python(a, [x])
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        in_python(a, [x])
    assert torch.equal(a, x)
