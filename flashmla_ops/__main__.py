"""``flashmla build | verify | info | explain | demo | serve``, or ``python -m flashmla_ops`` with the same words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def _build(into: Path | None, verbose: bool) -> int:
    from flashmla_ops.cpu import build
    from flashmla_ops.errors import BuildError

    try:
        if into is not None:
            print(build.copy_to(into, verbose=verbose))
            return 0
        libraries = dict.fromkeys([build.STABLE_ABI, *build.in_wheels(), *build.KERNELS.values()])
        for path in build.find_or_build([*libraries], verbose=verbose):
            print(path)
    except (BuildError, OSError) as error:
        print(f"flashmla: {error}", file=sys.stderr)
        return 1
    return 0


def _build_cuda(archs: list[str]) -> int:
    from flashmla_ops.cuda.catalogue import build
    from flashmla_ops.errors import BuildError

    try:
        for line in build(archs):
            print(line, flush=True)
    except BuildError as error:
        print(f"flashmla: {error}", file=sys.stderr)
        return 1
    return 0


def _verify(words: argparse.Namespace) -> int:
    from flashmla_ops.cuda import verify
    from flashmla_ops.errors import BuildError

    wanted = [*verify.chosen(words.arch or ("sm_80", "sm_90a"), words.list, words.only)]
    options = {name: getattr(words, name) for name in ("mutations", "results", "document", "jobs")}
    try:
        return verify.command(wanted, **options)
    except BuildError as error:
        print(f"flashmla: {error}", file=sys.stderr)
        return 1


def _info() -> int:
    import flashmla_ops
    from flashmla_build import compiler
    from flashmla_ops import capability
    from flashmla_ops.cpu import build
    from flashmla_ops.errors import BuildError

    def or_why_not(find: Callable[[], object]) -> object:
        try:
            return find()
        except BuildError as error:
            return f"none: {error}"

    print(f"flashmla_ops {flashmla_ops.__version__}")
    print(f"compiler     {or_why_not(lambda: ' '.join(compiler(BuildError)))}")
    print(f"cache        {or_why_not(build.STORE.root)}")
    print(f"kernels      {build.find(build.STABLE_ABI) or 'none'}")
    for choice in capability.implementations():
        state = "active" if choice.active else "available" if choice.available else "not on this processor"
        print(f"{choice.name:<12} {state}")
    return 0


def _explain() -> int:
    from flashmla_ops import capability

    print(capability.explain())
    return 0


def _demo(model: str) -> int:
    from flashmla_ops.demo.__main__ import main as demo
    from flashmla_ops.demo.timing import sleep_when_idle

    sleep_when_idle()
    return demo(model)


def _serve(words: list[str]) -> int:
    try:
        from flashmla_ops.integrations.transformers import serving
    except ModuleNotFoundError as error:
        print(f"flashmla: {error.name} is not installed: pip install 'flashmla-ops[serve]'", file=sys.stderr)
        return 1
    return serving.command(words)


def _add_verify(command: argparse.ArgumentParser, archs: tuple[str, ...]) -> None:
    command.add_argument("--arch", action="append", choices=archs, help="may be repeated (sm_80 and sm_90a)")
    lists = ("all", "representatives")
    command.add_argument("--list", choices=lists, default="all", help="all kernels, or one of each kind (all)")
    command.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="those whose name has all of these")
    command.add_argument("--mutations", action="store_true", help="also drop each wait and barrier in turn (slow)")
    command.add_argument("--jobs", type=int, default=1, help="compilations at once (1)")
    command.add_argument("--results", type=Path, help="write the results there, as JSON")
    command.add_argument("--document", type=Path, help="then write the page there (docs/cuda_attention.md)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flashmla", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile the C++ kernels of all instruction sets ahead of first use")
    build.add_argument("--verbose", action="store_true", help="print each compiler command")
    build.add_argument("--into", type=Path, metavar="FOLDER", help="and copy there what a wheel holds")
    archs = ("sm_80", "sm_86", "sm_89", "sm_90a")
    cuda_help = "the attention kernels of this architecture instead; may be repeated; needs the extra cuda, and no GPU"
    build.add_argument("--cuda", action="append", choices=archs, help=cuda_help)
    verify = "run the attention kernels for CUDA in the emulator, against float64; needs the extra cuda, and no GPU"
    _add_verify(commands.add_parser("verify", help=verify, description=verify), archs)
    commands.add_parser("info", help="versions, paths and implementations, one a line")
    commands.add_parser("explain", help="what runs here, and why")
    demo = commands.add_parser("demo", help="run a small MLA model with and without FlashMLA; needs the extra demo")
    demo.add_argument("model", nargs="?", choices=("tiny", "smollm2"), default="tiny", help="smollm2: real weights")
    serve = "transformers' OpenAI-compatible server with FlashMLA, and its command line; needs the extra serve"
    commands.add_parser("serve", help=serve, add_help=False)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "serve":
        return _serve(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command == "build" and chosen.cuda:
        return _build_cuda(chosen.cuda)
    if chosen.command == "build":
        return _build(chosen.into, chosen.verbose)
    if chosen.command == "verify":
        return _verify(chosen)
    if chosen.command == "demo":
        return _demo(chosen.model)
    return {"info": _info, "explain": _explain}[chosen.command]()


if __name__ == "__main__":
    sys.exit(main())
