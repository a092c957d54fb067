"""Our lowerings inside Inductor: installed once, dormant until a compilation asks for them.

Inductor's tables are global to the process, its configuration belongs to a thread. So nothing here switches a table on
and off: `install` enters our lowerings for good, and each looks whether the compilation that called it is one of ours
(`session`), otherwise Inductor's own treatment follows. Compilations of other backends, in this thread or another, are
as if we were not there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from lowering import cache_key, versions
from lowering.passes import PASSES, run_passes
from lowering.session import Session, opened, session
from lowering.settings import Settings

BACKEND = "flashmla"


_LOCK = threading.RLock()
_installed = False
_default_before: Any = None
_enabled = False


class RunPasses(versions.CustomGraphPass):
    """`PASSES` as one pass of Inductor's, with the identity that its caches ask for."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        current = session()
        if current is None:
            run_passes(graph, Settings())
        else:
            current.rewrites.append(run_passes(graph, current.settings, current.names))

    def uuid(self) -> str:
        names = ",".join(f"{p.__module__}.{getattr(p, '__qualname__', type(p).__qualname__)}" for p in PASSES)
        return f"{cache_key.source_hash()}:{names}"


def install() -> None:
    """Enter our lowerings into Inductor's tables. Idempotent; any thread may call it at any time."""
    global _installed
    with _LOCK:
        if _installed:
            return
        # They import Inductor, which takes seconds.
        from lowering.codegen import cpp, order
        from lowering.ops import append, decode, offsets, products

        cpp.install()
        append.install()
        decode.install()
        offsets.install()
        order.install()
        products.install()
        _installed = True


def inductor_patches(existing: dict[str, Any]) -> dict[str, Any]:
    """Inductor options that run our passes, after those of the user."""
    theirs = existing.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
    return existing | {"joint_custom_pre_pass": versions.join_passes(theirs, RunPasses())}


@contextlib.contextmanager
def active(settings: Settings | None = None) -> Iterator[Session]:
    """Every Inductor compilation of this thread inside the block uses our lowerings and passes.

    For what is not `torch.compile`: ``torch._inductor.aoti_compile_and_package`` and the like.
    """
    with entered(settings or Settings()) as current, versions.patch_inductor(inductor_patches({})):
        yield current


@contextlib.contextmanager
def entered(settings: Settings) -> Iterator[Session]:
    """A session without the passes in Inductor's configuration: for who hands that over by other ways."""
    install()
    tag = cache_key.extended_tag(torch.compiler.config.cache_key_tag, settings)
    with opened(settings) as current, versions.patch_compiler({"cache_key_tag": tag}):
        yield current


def enable() -> None:
    """Make `flashmla` the backend of every ``torch.compile`` that names none. Idempotent."""
    global _default_before, _enabled
    with _LOCK:
        if not _enabled:
            _default_before = versions.default_backend()
            versions.set_default_backend(BACKEND)
            _enabled = True


def disable() -> None:
    """Undo `enable`; what was compiled stays compiled. Idempotent."""
    global _enabled
    with _LOCK:
        if _enabled:
            versions.set_default_backend(_default_before)
            _enabled = False


def is_enabled() -> bool:
    return _enabled
