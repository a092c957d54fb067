"""Which CPU this is: a name that tells cores apart which their vendor sells under one, and what it can execute."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: Instruction sets, best first: name, the flags of /proc/cpuinfo that show it, the compiler options that use it.
INSTRUCTION_SETS = (
    ("AVX-512 BF16", {"avx512f", "avx512_bf16"}, ("-mavx512f", "-mavx512bf16")),
    ("AVX-512", {"avx512f"}, ("-mavx512f",)),
    ("AVX2 + FMA", {"avx2", "fma"}, ("-mavx2", "-mfma")),
)
BASELINE = "baseline"  # what the compiler assumes when told nothing
#: How many of them a value of FLASHMLA_CPU passes over, so that limits are of what our kernels may use.
PASSED_OVER = {"avx512": 1, "avx2": 2, "generic": 3}
#: By vendor and family, the models of each microarchitecture, first and last. AMD's are those of Linux,
#: arch/x86/kernel/cpu/amd.c; Intel's those of arch/x86/include/asm/intel-family.h.
MICROARCHITECTURES: dict[tuple[str, int], dict[str, tuple[tuple[int, int], ...]]] = {
    ("AuthenticAMD", 0x17): {
        "Zen 2": ((0x30, 0x4F), (0x60, 0x7F), (0x90, 0x91), (0xA0, 0xAF)),
        "Zen": ((0x00, 0x2F), (0x50, 0x5F)),
    },
    ("AuthenticAMD", 0x19): {"Zen 4": ((0x10, 0x1F), (0x60, 0xAF)), "Zen 3": ((0x00, 0x0F), (0x20, 0x5F))},
    ("AuthenticAMD", 0x1A): {
        "Zen 5": ((0x00, 0x2F), (0x40, 0x4F), (0x60, 0x7F)),
        "Zen 6": ((0x50, 0x5F), (0x80, 0xCF)),
    },
    ("GenuineIntel", 6): {
        "Haswell": ((0x3C, 0x3C), (0x3F, 0x3F), (0x45, 0x46)),
        "Broadwell": ((0x3D, 0x3D), (0x47, 0x47), (0x4F, 0x4F), (0x56, 0x56)),
        "Skylake-SP": ((0x55, 0x55),),
        "Ice Lake": ((0x6A, 0x6A), (0x6C, 0x6C), (0x7D, 0x7E)),
        "Sapphire Rapids": ((0x8F, 0x8F),),
        "Emerald Rapids": ((0xCF, 0xCF),),
        "Granite Rapids": ((0xAD, 0xAE),),
        "Sierra Forest": ((0xAF, 0xAF),),
        "Alder Lake": ((0x97, 0x97), (0x9A, 0x9A)),
        "Raptor Lake": ((0xB7, 0xB7), (0xBA, 0xBA), (0xBF, 0xBF)),
        "Meteor Lake": ((0xAA, 0xAA), (0xAC, 0xAC)),
    },
    ("GenuineIntel", 0x13): {"Diamond Rapids": ((0x01, 0x01),)},
}
#: Three microarchitectures share the model of Skylake-SP; the stepping tells them apart.
CASCADES = {5: "Cascade Lake", 6: "Cascade Lake", 7: "Cascade Lake", 10: "Cooper Lake", 11: "Cooper Lake"}
FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Cpu:
    """The parts of /proc/cpuinfo and /sys that name the machine."""

    model: str
    flags: frozenset[str]
    l3_bytes: int
    microarchitecture: str = "unknown"
    passed_over: int = 0  # of the instruction sets

    @property
    def features(self) -> list[str]:
        """The flags that choose kernels, ours or a peer's."""
        return [name for name in FEATURES if name in self.flags]

    @property
    def instruction_set(self) -> tuple[str, tuple[str, ...]]:
        """The best instruction set that is not passed over: name and compiler options."""
        for name, needed, options in INSTRUCTION_SETS[self.passed_over :]:
            if needed <= self.flags:
                return name, options
        return BASELINE, ()


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo."""
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def microarchitecture(fields: dict[str, str]) -> str:
    """Its name, such as "Zen 4", by vendor, family, model and stepping; the model name where they are not known."""
    vendor = fields.get("vendor_id", "")
    family, model, stepping = (int(fields.get(key, -1)) for key in ("cpu family", "model", "stepping"))
    for known, models in MICROARCHITECTURES.get((vendor, family), {}).items():
        if any(first <= model <= last for first, last in models):
            return CASCADES.get(stepping, known) if known == "Skylake-SP" else known
    return fields.get("model name", "unknown CPU")


def this_cpu() -> Cpu:
    fields = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    flags = frozenset(fields.get("flags", fields.get("Features", "")).split())  # ``Features`` on Arm
    passed_over = PASSED_OVER.get(os.environ.get("FLASHMLA_CPU", ""), 0)
    return Cpu(fields.get("model name", "unknown CPU"), flags, l3_bytes(), microarchitecture(fields), passed_over)


def l3_bytes() -> int:
    """Size of the last-level cache that the first CPU sees; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (cache / "level").read_text().strip() == "3":
            size = (cache / "size").read_text().strip()  # such as "32768K"
            sizes = [int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]]
    return sizes[0]
