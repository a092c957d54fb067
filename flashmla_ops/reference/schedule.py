"""The decode schedule: how the work of one `decode` call is cut into parts.

The work is a line of *items*, one for each (sequence, KV head, block of query rows), each as long as its sequence
counted in units of `UNIT` tokens. The line is cut into ``num_parts`` pieces of equal length, wherever the cuts fall; an
item that a cut goes through is computed in pieces and merged by LSE. A query row is one (query token, head of the KV
head's group).

Layout of the tensor, int32: ``[b, s_q, h_q, h_kv, num_parts, row_block, 0, 0]``, the ``b`` lengths it was made for,
then ``num_parts + 1`` pairs (item, first token): where each part starts, the last pair being the end of the line.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 32  # tokens: cuts fall on multiples of this
MIN_UNITS = 2  # a part is not made shorter than this: waking a thread costs more than it saves
MAX_ROWS = 128  # query rows of an item: what keeps the fp32 accumulators of a core in its L2 cache
ROW_STEP = 16  # an item's rows are a multiple of this where there is a choice (one AVX-512 vector of heads)
MAX_PARTS = 1024
HEADER = 8


def schedule_numel(b: int, num_parts: int) -> int:
    """Number of int32 elements of a schedule."""
    return HEADER + b + 2 * (num_parts + 1)


def row_block(b: int, s_q: int, h_q: int, h_kv: int, num_parts: int) -> int:
    """Query rows of an item. With fewer sequences than parts, heads are split before sequences: it needs no merge."""
    rows = s_q * (h_q // h_kv)
    blocks = -(-num_parts // max(b * h_kv, 1))
    wanted = -(-rows // max(blocks, 1))
    return min(-(-wanted // ROW_STEP) * ROW_STEP, MAX_ROWS)


def decode_schedule(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int, num_parts: int) -> Tensor:
    """See the module's description; ``cache_seqlens [b] int32`` -> ``[schedule_numel(b, num_parts)] int32``."""
    lengths: list[int] = cache_seqlens.tolist()
    block = row_block(len(lengths), s_q, h_q, h_kv, num_parts)
    items_per_sequence = h_kv * -(-s_q * (h_q // h_kv) // block) if block else 0  # block 0: no query heads
    units = [max(1, -(-length // UNIT)) for length in lengths for _ in range(items_per_sequence)]
    total = sum(units)

    starts: list[int] = []
    item, before = 0, 0  # `before`: units of the items that precede `item`
    for part in range(num_parts + 1):
        cut = min(total, max(total * part // num_parts, part * MIN_UNITS))
        while item < len(units) and before + units[item] <= cut:
            before += units[item]
            item += 1
        starts += [item, (cut - before) * UNIT]

    header = [len(lengths), s_q, h_q, h_kv, num_parts, block, 0, 0]
    return torch.tensor(header + lengths + starts, dtype=torch.int32, device=cache_seqlens.device)
