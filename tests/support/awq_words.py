"""AWQ's words unpacked by the written description, without our code."""

import numpy as np


def independent_levels(words):
    """Channel c of a word sits at bits 4·p, p = (c even: c/2, c odd: 4 + (c−1)/2)."""
    table = np.empty((words.shape[0], words.shape[1] * 8), dtype=np.int64)
    unsigned = words.numpy().astype(np.int64) % (1 << 32)
    for channel in range(table.shape[1]):
        c = channel % 8
        position = c // 2 if c % 2 == 0 else 4 + c // 2
        table[:, channel] = unsigned[:, channel // 8] // 16**position % 16
    return table
