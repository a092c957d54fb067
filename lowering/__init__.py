"""The Inductor integration: the `flashmla` backend of torch.compile.

    torch.compile(model, backend="flashmla", fullgraph=True)

is Inductor with the graph passes of `lowering.passes` and with lowerings that generate `append_` into the kernel that
computes its rows and, where asked for, `decode` together with what follows it. `explain` shows what that did to a
model.
"""

from lowering.explain import Explanation, explain
from lowering.registration import active, disable, enable, is_enabled
from lowering.settings import Settings

__all__ = ["Explanation", "Settings", "active", "disable", "enable", "explain", "is_enabled"]
