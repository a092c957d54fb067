"""``python -m flashmla_ops build | info | explain``."""

from __future__ import annotations

import argparse
import sys


def _build(verbose: bool) -> int:
    from flashmla_ops.cpu import build
    from flashmla_ops.errors import BuildError

    try:
        built = build.find_or_build(verbose=verbose)
    except BuildError as error:
        print(f"flashmla: {error}", file=sys.stderr)
        return 1
    print(f"{built.path} ({built.binding})")
    return 0


def _info() -> int:
    import flashmla_ops
    from flashmla_ops import capability
    from flashmla_ops.cpu import build

    print(f"flashmla_ops {flashmla_ops.__version__}")
    print(f"compiler     {build.compiler() or 'none'}")
    print(f"cache        {build.cache_root()}")
    for choice in capability.implementations():
        state = "active" if choice.active else "available" if choice.available else "not on this processor"
        print(f"{choice.name:<12} {state}")
    return 0


def _explain() -> int:
    from flashmla_ops import capability

    print(capability.explain())
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashmla_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="compile the C++ kernels ahead of first use").add_argument(
        "--verbose", action="store_true", help="print each compiler command"
    )
    commands.add_parser("info", help="versions, paths and implementations, one a line")
    commands.add_parser("explain", help="what runs here, and why")
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        return _build(chosen.verbose)
    return _info() if chosen.command == "info" else _explain()


if __name__ == "__main__":
    sys.exit(main())
