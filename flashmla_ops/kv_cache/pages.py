"""The books of a pool: page numbers, who holds them, and the block tables of a batch. They hold no rows.

They are in C++ (`native_pages`), and where that cannot be compiled in Python (`python_pages`), slower and the same.
"""

from __future__ import annotations

import warnings

from flashmla_ops.errors import BuildError
from flashmla_ops.kv_cache.native_pages import NativePages
from flashmla_ops.kv_cache.python_pages import PythonPages

Pages = NativePages | PythonPages


def new_pages(n_pages: int, page_size: int) -> Pages:
    """Books of ``n_pages`` free pages of ``page_size`` tokens."""
    try:
        return NativePages(n_pages, page_size)
    except (BuildError, OSError) as error:
        warnings.warn(f"flashmla: the books of the KV pool are kept in Python, slowly: {error}", stacklevel=3)
        return PythonPages(n_pages, page_size)
