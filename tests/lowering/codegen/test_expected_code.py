"""The code that is generated, beside what we expect of it: readable files, compared line by line.

They are for torch 2.13, without vectors and for two threads, so that they are the same on every machine. After an
intended change: FLASHMLA_WRITE_EXPECTED=1 python -m pytest tests/lowering/codegen/test_expected_code.py, and read the
diff.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lowering.compiled import Compiled
from tests.lowering.layers import mla_inputs, mla_layer
from tests.lowering.ops.test_append import layer_inputs, one_cache, poisoned, quantized_cache, two_caches
from tests.lowering.ops.test_decode import CASE, decode_then, gate_residual_cast, step_arguments

EXPECTED = Path(__file__).parent / "expected"
SAME_EVERYWHERE = {"cpp.simdlen": 0, "cpp.threads": 2}
SLOTS = torch.tensor([7, -1, 100, 7, 127])


def computed_slots(cache: Tensor, x: Tensor, positions: Tensor) -> None:
    """Slots that the same kernel computes are finished, and checked, before the first row is written."""
    torch.ops.flashmla.append_(cache, x * 2, torch.where(positions > 0, positions * 3, -1))


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[], tuple[Tensor, ...]]]] = {
    "append_one_cache": (one_cache, {}, lambda: (*poisoned(576), *layer_inputs(5), SLOTS)),
    "append_two_caches": (two_caches, {}, lambda: (*poisoned(512, 64), *layer_inputs(5), SLOTS)),
    "append_quantized": (
        quantized_cache,
        {},
        lambda: (torch.zeros(8, 16, 1, 656, dtype=torch.uint8), *layer_inputs(5), SLOTS),
    ),
    "append_computed_slots": (
        computed_slots,
        {},
        lambda: (torch.zeros(4, 8, 2, 16), torch.ones(3, 2, 16), torch.tensor([4, 0, 9])),
    ),
    "absorbed_layer": (mla_layer, {}, mla_inputs),
    "decode_gate_residual_cast": (
        decode_then(gate_residual_cast),
        {"flashmla.decode": "template"},
        lambda: step_arguments(CASE),
    ),
}


def kernels_of(source: str) -> str:
    """The C++ functions of a generated module, and the calls, without headers and comments."""
    functions = re.findall(r'^extern "C"\s+void.*?^}$', source, re.MULTILINE | re.DOTALL)
    body = source[source.index("def call(") :]
    calls = re.findall(r"^\s+(cpp_\w+\(.*\)|torch\.ops\.\w+.*|buf\d+ = .*)$", body, re.MULTILINE)
    return "\n\n".join([*functions, "\n".join(call.strip() for call in calls)]) + "\n"


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the files are for torch 2.13")
@pytest.mark.parametrize("name", CASES)
def test_generated_code_is_as_expected(name: str) -> None:
    function, options, arguments = CASES[name]
    compiled = Compiled(function, options | SAME_EVERYWHERE)
    compiled(*arguments())
    (source,) = compiled.sources
    path, code = EXPECTED / f"{name}.txt", kernels_of(source)
    if os.environ.get("FLASHMLA_WRITE_EXPECTED") == "1":
        path.write_text(code)
    assert code == path.read_text(), f"{path} differs; see this file's docstring"
