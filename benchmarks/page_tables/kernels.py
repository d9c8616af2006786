"""What compiled kernels are like."""

from __future__ import annotations

from benchmarks.page_tables.sources import markdown, results


def kernel_instructions() -> str:
    """Return the loop of each int4 product on 9.0, and what it asks of a multiprocessor."""
    rows = [
        [
            row["model"],
            row["product"],
            f"{row['rows']} × {row['split']}, {row['stages']}",
            f"{row['registers']}, {row['shared_bytes'] / 1024:.1f} KB",
            f"{row['loop']}, {row['per_weight']:.2f}",
            f"{100 * row['issue_share']:.0f}%",
            f"{row['programs']}, {row['waves']:.2f}",
            f"{row['kib_in_flight']:.0f} KB",
        ]
        for row in results("gpu-instructions")
    ]
    titles = [
        "model", "product", "rows × warps, stages", "registers, shared memory",
        "instructions of the loop, a weight", "of the issue slots", "programs, waves", "in flight",
    ]  # fmt: skip
    return markdown(titles, rows)
