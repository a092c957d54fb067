"""Every place where torch 2.11 to 2.15 differ, and every private name of Inductor that the package needs.

Developed and tested with 2.13.0. What a version lacks is found by looking for it, never by comparing numbers, and then
either has a fallback here or raises `UnsupportedTorchError` that names it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.backends import registry
from torch._inductor.custom_graph_pass import CustomGraphPass

from flashmla_ops.errors import ArgumentError, FlashMLAError

__all__ = [
    "CustomGraphPass",
    "UnsupportedTorchError",
    "after_ordering",
    "compile_fx",
    "default_backend",
    "enter_lowering",
    "frozen_inputs",
    "generates_python",
    "inductor_options",
    "join_passes",
    "lacks_kernel_proxy",
    "may_alias",
    "patch_compiler",
    "patch_inductor",
    "remove_noop_ops",
    "resets_division_flag",
    "set_default_backend",
    "unknown_option",
    "without_caches",
]


class UnsupportedTorchError(FlashMLAError, ImportError):
    """This torch lacks something that the package needs."""


def unknown_option(name: str, known: Sequence[str]) -> ArgumentError:
    return ArgumentError("compile", "options", f"of ours {', '.join(known)}", name)


def default_backend() -> Any:
    """The backend that ``torch.compile`` uses where none is named."""
    get = getattr(registry, "get_default_backend", None)
    return get() if get is not None else "inductor"


def set_default_backend(backend: Any) -> None:
    setter = getattr(registry, "set_default_backend", None)
    if setter is None:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} has no torch._dynamo.backends.registry.set_default_backend; name the backend:"
            ' torch.compile(model, backend="flashmla")'
        )
    setter(backend)


def inductor_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's configuration for a mode and options, checked as ``torch.compile(backend="inductor")`` checks them."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def compile_fx(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx as inductor  # seconds, and only when compiling

    compiled: Any = inductor(graph, inputs, config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def patch_inductor(changes: dict[str, Any]) -> AbstractContextManager[Any]:
    """Inductor's configuration changed for a while, in this thread."""
    from torch._inductor import config

    context: AbstractContextManager[Any] = config.patch(changes)
    return context


def patch_compiler(changes: dict[str, Any]) -> AbstractContextManager[Any]:
    """The configuration of torch.compiler changed for a while, in this thread."""
    config: Any = torch.compiler.config
    return config.patch(changes)  # type: ignore[no-any-return]


def without_caches() -> AbstractContextManager[Any]:
    """Compile everything anew: no cache of torch's is read or written."""
    return patch_inductor({"force_disable_caches": True})


def remove_noop_ops(graph: torch.fx.Graph) -> None:
    from torch._inductor.fx_passes.post_grad import remove_noop_ops as remove

    remove(graph)


def frozen_inputs(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The inputs that Inductor's freezing turns into constants after this graph's joint passes; none without it."""
    from torch._inductor import config

    context = torch._guards.TracingContext.try_get()
    if not config.freezing or torch.is_grad_enabled() or context is None or context.fw_metadata is None:
        return set()
    metadata: Any = context.fw_metadata
    kept = {info.base_idx for info in metadata.output_info}
    kept |= {i for i, info in enumerate(metadata.input_info) if info.mutates_data or info.mutates_metadata}
    parameters = zip(context.params_flat_unwrap_subclasses or (), graph.find_nodes(op="placeholder"), strict=False)
    return {node for i, (_, node) in enumerate(parameters) if i not in kept}


def generates_python() -> bool:
    """Whether the compilation under way generates Python; packages are C++."""
    from torch._inductor import config

    return not config.cpp_wrapper


class _Sequence(CustomGraphPass):
    """Passes one after the other, where Inductor takes a single one."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any | None:
        ids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in ids else tuple(ids)


def join_passes(theirs: Any, ours: CustomGraphPass) -> CustomGraphPass:
    """One pass that runs theirs (None, one or several) and then ours. Without a ``uuid`` of each, nothing is cached."""
    if theirs is None:
        return ours
    return _Sequence([*(theirs if isinstance(theirs, (list, tuple)) else [theirs]), ours])


def enter_lowering(target: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Have Inductor ask ``function`` how to lower an operator; where it returns None, all is as without it."""
    from torch._inductor import lowering as inductor

    table = getattr(inductor, "user_lowerings", None)
    if table is not None:
        table[target] = function
    else:
        inductor.lowerings[target] = _asked_first(target, function)


def _asked_first(target: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch 2.13 does with its table of user's lowerings, for older ones: a node of the graph, asked once."""
    from torch._inductor import lowering as inductor
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    if target not in inductor.lowerings:  # Inductor would enter its fallback at the first call, in this way
        tag = get_layout_constraint_tag(target, with_default=True)
        inductor.make_fallback(target, layout_constraint=inductor.tag_to_layout_constraint(tag), warn=False)
    theirs = inductor.lowerings[target]
    asked = threading.local()

    def lower(*args: Any, **kwargs: Any) -> Any:
        found = None
        if V.graph.current_node.target == target and not getattr(asked, "now", False):
            asked.now = True
            try:
                found = function(*args, **kwargs)
            finally:
                asked.now = False
        return theirs(*args, **kwargs) if found is None else found

    return lower


def may_alias(allow_alias: bool = True) -> bool:
    """Whether a piece of a `cat` may be computed in its slice: torch 2.15 hands it on, older ones allow it."""
    return allow_alias


def resets_division_flag() -> bool:
    """Whether generated kernels keep a pointer into their stack that must be cleared before an exception leaves."""
    from torch._inductor.codegen.cpp import KernelGroup

    return "inductor_cpu_integer_div_error_flag = nullptr" in inspect.getsource(KernelGroup.codegen_group)


def lacks_kernel_proxy() -> str:
    """Why C++ loops cannot be generated by a class of ours; empty if Inductor has the place for it."""
    from torch._inductor.codegen.cpp import CppScheduling

    present = hasattr(CppScheduling, "kernel_proxy_cls")
    return "" if present else f"torch {torch.__version__} has no CppScheduling.kernel_proxy_cls"


def select(name: str, choices: list[Any], inputs: list[Any], layout: Any, values: dict[int, Any]) -> tuple[Any, bool]:
    """Inductor's choice of the fastest, and whether it is one of its templates. ``values`` make inputs to time with."""
    from torch._inductor import ir, select_algorithm

    found = select_algorithm.autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=values)
    box: Any = found[0] if isinstance(found, tuple) else found
    return box, isinstance(box.data.data, ir.TemplateBuffer)


def after_ordering(reorder: Callable[[list[Any], Callable[[list[Any]], int]], list[Any]]) -> None:
    """Have ``reorder(nodes, peak)`` follow Inductor's own order of a graph; without that step nothing is reordered."""
    from torch._inductor import memory

    original = memory.reorder_for_peak_memory

    def ordered(nodes: list[Any], buffers: Any, fused: Any, inputs: Any, outputs: Any, *rest: Any) -> list[Any]:
        found = original(nodes, buffers, fused, inputs, outputs, *rest)

        def peak(order: list[Any]) -> int:
            _, freeable = memory.prepare_planning_info(order, buffers, fused, inputs, outputs)
            return int(memory.estimate_peak_memory(order, freeable, outputs)[0])

        return reorder(found, peak)

    memory.reorder_for_peak_memory = ordered  # type: ignore[assignment]


def source_name(node: torch.fx.Node) -> str:
    """Dynamo's name of where an input of its graph comes from: "L['x']"; the node's own name where it has none."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", node.name)
    return str(name() if callable(name) else name)  # a method until torch 2.9
