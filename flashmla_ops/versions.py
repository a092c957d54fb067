"""Which releases of torch and transformers were tested. Another one is never refused: it is said once, and runs."""

from __future__ import annotations

import re
import warnings

#: The oldest and the newest release that the tests ran with.
TESTED = {"torch": ("2.11", "2.15"), "transformers": ("5.17", "5.24")}


def warn_if_untested(package: str, version: str) -> None:
    """Warn if ``version`` of ``package`` lies outside what was tested: once, as Python does for one place and text."""
    oldest, newest = TESTED[package]
    if _release(oldest) <= _release(version) <= _release(newest):
        return
    known = f"{package} {version} has not been tested with this release of flashmla_ops ({oldest} to {newest} have)"
    warnings.warn(f"flashmla: {known}; what it can run, runs", stacklevel=2)


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number, (2, 15) for "2.15.0a0+git123"; () for what does not begin with them."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()
