"""Cost of quantizing and building, and the graphs that TensorRT compiles."""

from __future__ import annotations

from benchmarks.page_tables.sources import Row, markdown, results

PARTS = ("vision", "llm")


def quantize_cost() -> str:
    """Return memory, disk and time of whole quantizations."""
    rows = []
    for row in results("quantization-memory"):
        if row.get("checkpoint_layers"):
            continue
        evaluated = ", with evaluation" if row.get("evaluated") else ""
        rows.append(
            [
                f"{row['shapes']}, {row['weights']} weights",
                f"{row['algorithm']}{evaluated}",
                str(row["tokens"] or ""),
                f"{row['input_bytes'] / 1e9:.2f} → {row['output_bytes'] / 1e9:.2f} GB",
                f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
                f"{row['seconds'] / 60:.0f} min on {row['threads']}",
            ]
        )
    titles = ["model", "algorithm", "calibration tokens", "weights", "peak memory", "time, threads"]
    return markdown(titles, rows)


def tensorrt_graphs() -> str:
    """Return how many greedy tokens of TensorRT's graphs differ from fp32 PyTorch's."""
    rows = [
        [
            row["model"],
            row["dialect"],
            str(row["tokens_that_differ"]),
            ", ".join(f"{margin:.4f}" for margin in row["margins"]),
            str(row["fp16_pytorch_differs"]),
            f"{row['kl_mean']:.1e}",
            f"{row['kl_mean_of_fp16_pytorch']:.1e}",
        ]
        for row in sorted(
            results("tensorrt-graphs"),
            key=lambda row: (row.get("model", ""), row.get("dialect", "")),
        )
        if "tokens_that_differ" in row
    ]
    titles = ["model", "dialect", "tokens of 1280 that differ", "margins of their logits"]
    return markdown(
        [*titles, "fp16 PyTorch differs in", "mean KL", "mean KL of fp16 PyTorch"], rows
    )


def tensorrt_engines() -> str:
    """Return time, memory and size of engines compiled without a GPU."""
    rows = []
    for row in sorted(results("tensorrt-engines"), key=_weights):
        plans = row["plan_bytes"]
        sizes = [f"{plans[part] / 1e9:.2f} GB" if part in plans else "left ²" for part in PARTS]
        own, resident = row["peak_own_bytes"], row["peak_resident_bytes"]
        beside, left = " ¹" if "beside" in row else "", " ³" if "left" in row else ""
        rows.append(
            [
                row["model"],
                row["target"],
                f"{row['seconds']:.0f} s{beside}",
                f"{row['cpu_seconds']:.0f} s",
                f"{own / 1e9:.1f} GB ({resident / 1e9:.1f}){left}",
                *sizes,
                f"{row['plan_over_weights']:.3f}",
            ]
        )
    titles = ["model", "target", "time", "CPU time", "memory", "tower", "LLM", "engine ÷ weights"]
    return markdown(titles, rows)


def _weights(row: Row) -> tuple[int, str]:
    return sum(row["weight_bytes"].values()) + row.get("llm_graph_weight_bytes", 0), row["target"]
