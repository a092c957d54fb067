"""``python -m cutlass_kernels list | generate | build | verify``: see --help of each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cutlass_kernels.build import libraries
from cutlass_kernels.errors import CutlassKernelsError
from cutlass_kernels.gemm import generate
from cutlass_kernels.gemm.catalogue import LISTS
from cutlass_kernels.gemm.config import TYPES, GemmConfig


def chosen(arguments: argparse.Namespace) -> list[GemmConfig]:
    """The kernels that the options of a command select."""
    return [
        config
        for config in LISTS[arguments.list]()
        if (not arguments.arch or config.arch in arguments.arch) and all(part in config.name for part in arguments.only)
    ]


def _list(arguments: argparse.Namespace) -> int:

    for config in chosen(arguments):
        built = libraries.find(config)
        print(f"{config.name:<72} {'built' if built else '-'}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    for config in chosen(arguments):
        path = arguments.out / f"{config.name}.cu"
        path.write_text(generate.source(config))
        print(path)
    return 0


def _build(arguments: argparse.Namespace) -> int:

    for built in libraries.build(chosen(arguments), jobs=arguments.jobs):
        registers = max(entry.registers for entry in built.report.entries)
        print(f"{built.config.name:<72} {registers:>3} registers  {built.library}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from cutlass_kernels import verify

    return verify.command(
        chosen(arguments),
        jobs=arguments.jobs,
        results=arguments.results,
        document=arguments.document,
        mutations=arguments.mutations,
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m cutlass_kernels", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--arch", action="append", choices=sorted(TYPES), help="only these; may be repeated")
        added.add_argument(
            "--only", nargs="*", default=[], metavar="TEXT", help="only kernels whose name has all of these"
        )
        added.add_argument("--list", choices=sorted(LISTS), default="all", help="which list of kernels (all)")
        return added

    command("list", "the kernels, and whether they are built")
    command("generate", "write the CUDA sources; needs nvidia-cutlass, no device and no compiler").add_argument(
        "--out", type=Path, default=Path("build/cutlass"), help="folder (build/cutlass)"
    )
    for name, text in (
        ("build", "compile into the cache; needs nvidia-cutlass and nvcc"),
        ("verify", "build, then run each library in the emulator and compare with float64"),
    ):
        command(name, text).add_argument("--jobs", type=int, help="compilations at once (one a core)")
    verify = commands.choices["verify"]
    verify.add_argument("--results", type=Path, help="write the results there, as JSON")
    verify.add_argument(
        "--document",
        type=Path,
        help="then update the summary in it (docs/cuda.md), and cuda_verify.md beside it",
    )
    verify.add_argument("--mutations", action="store_true", help="also drop each wait and barrier in turn (slow)")
    return top


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    run = {"list": _list, "generate": _generate, "build": _build, "verify": _verify}[arguments.command]
    try:
        return run(arguments)
    except CutlassKernelsError as error:
        print(f"cutlass_kernels: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
