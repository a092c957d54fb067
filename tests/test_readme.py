"""The code of the README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "flashmla_ops" / "fixtures" / "tiny_mla_lm"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_drop_in_snippet_runs() -> None:
    names: dict[str, Any] = {}
    exec(snippets()[0], names)
    assert names["out"].shape == (2, 1, 16, 512)
    assert names["lse"].shape == (2, 16, 1)
    assert names["out"].isfinite().all()


@pytest.mark.slow
def test_the_operator_snippet_compiles() -> None:
    names: dict[str, Any] = {}
    drop_in, operator, *_ = snippets()
    exec(drop_in + operator, names)
    compiled = names["attend"](*(names[name] for name in ("q", "kv_cache", "block_table", "cache_seqlens")))
    torch.testing.assert_close(compiled, names["out"] * 2)


@pytest.mark.slow
def test_the_transformers_snippet_generates() -> None:
    pytest.importorskip("transformers")
    snippet = snippets()[2].replace("path/to/a/deepseek_v3/model", str(FIXTURE))
    exec("import torch\n" + snippet, {})
