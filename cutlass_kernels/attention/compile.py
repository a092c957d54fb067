"""Compile one kernel into a folder: ``python -m cutlass_kernels.attention.compile ARCH FOLDER KIND FIELDS``.

It runs in a process of its own, which imports the DSL. ``FIELDS`` is the configuration as JSON.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
import typing
from pathlib import Path
from typing import Any

from cutlass_kernels.attention import elf
from cutlass_kernels.attention.around_config import AppendConfig, MergeConfig, ScheduleConfig
from cutlass_kernels.attention.config import CombineConfig, Config, DecodeConfig, DecodeSm90Config

CONFIGS: dict[str, type[Config]] = {
    config.kind: config
    for config in (DecodeConfig, DecodeSm90Config, CombineConfig, AppendConfig, MergeConfig, ScheduleConfig)
}
#: Codes of `struct` for the types of parameters.
CODES = {"Int64": "q", "Int32": "i", "Float32": "f"}


def arguments_of(kind: Any) -> list[tuple[str, str]]:
    """Names and codes of the numbers in a NamedTuple: of those in it that are such tuples too, "name.field"."""
    found = []
    for name, annotation in typing.get_type_hints(kind).items():
        inner = [] if annotation.__name__ in CODES else arguments_of(annotation)
        found += [(f"{name}.{field}", code) for field, code in inner] or [(name, CODES[annotation.__name__])]
    return found


def filled(kind: Any) -> Any:
    """A tuple of zeros."""
    hints = typing.get_type_hints(kind).values()
    return kind(*(each(0) if each.__name__ in CODES else filled(each) for each in hints))


def kernel_of(config: Config) -> Any:
    """The class of a module has its name: `DecodeKernel` is in `decode`."""
    module = importlib.import_module(f"cutlass_kernels.attention.{config.kind}")
    name = "".join(part.capitalize() for part in config.kind.split("_"))
    return getattr(module, f"{name}Kernel")(config)


def compile_into(config: Config, arch: str, folder: Path) -> None:
    """Write kernel.ptx, kernel.cubin and report.json."""
    from cutlass import cute

    from cutlass_kernels.attention import ptx

    ptx.TARGET = arch
    kernel = kernel_of(config)
    started = time.monotonic()
    type(kernel).kernel.set_name_prefix(config.name, remove_cutlass_symbol=True, keep_mangled_name=False)
    options = f"--gpu-arch {arch} --keep-ptx --keep-cubin --dump-dir {folder}"
    compiled = cute.compile(kernel.launch, filled(kernel.arguments), options=options)
    for dumped in folder.iterdir():
        dumped.unlink()
    (folder / "kernel.ptx").write_text(compiled.__ptx__)
    (folder / "kernel.cubin").write_bytes(compiled.__cubin__)
    found = re.search(r"\.entry (\S+)\(", compiled.__ptx__)
    assert found is not None
    facts = {
        "name": config.name,
        "kind": config.kind,
        "fields": config.fields(),
        "arch": arch,
        "entry": found[1],
        "parameters": arguments_of(kernel.arguments),
        "seconds": round(time.monotonic() - started, 2),
        **elf.usage(compiled.__cubin__),
    }
    (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n")


def main(words: list[str]) -> None:
    arch, folder, kind, fields = words
    compile_into(CONFIGS[kind].of(json.loads(fields)), arch, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
