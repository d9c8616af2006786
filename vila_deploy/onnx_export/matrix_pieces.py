"""Cut matrices into pieces of columns, for compilers that need a contiguous block for each."""

from __future__ import annotations

# TensorRT 10.3 on an Orin asks for one contiguous block of 1.73 times a float16 output head while
# it compiles it (hokwangchoi/jetson-orin-nano-benchmarks, a report of JetPack 6.2). Of the 268 MB
# that the kernel keeps for such blocks, the rest of the system has its share.
CONTIGUOUS_FACTOR = 1.73
MAX_MATRIX_BYTES = 96_000_000
COLUMN_MULTIPLE = 64


def column_ranges(
    columns: int, column_bytes: float, max_bytes: int | None
) -> list[tuple[int, int]]:
    """Return the (first, end) columns of each piece: as few as possible, of about equal width.

    Args:
        column_bytes: of one column of the matrix [inputs, outputs].
        max_bytes: of a piece; None leaves the matrix whole.
    """
    if max_bytes is None or columns * column_bytes <= max_bytes:
        return [(0, columns)]
    widest = max(1, int(max_bytes / column_bytes))
    multiple = COLUMN_MULTIPLE if widest >= COLUMN_MULTIPLE else 1
    widest -= widest % multiple
    count = -(-columns // widest)
    width = -(-columns // (count * multiple)) * multiple
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def largest_piece_bytes(columns: int, column_bytes: float, max_bytes: int | None) -> int:
    """Return the bytes of the largest piece of a matrix."""
    ranges = column_ranges(columns, column_bytes, max_bytes)
    return int(max(end - start for start, end in ranges) * column_bytes)
