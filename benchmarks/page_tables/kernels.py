"""What compiled kernels are like."""

from __future__ import annotations

from benchmarks.page_tables.predicted import CONTEXT, MODELS, TARGET
from benchmarks.page_tables.sources import markdown, results
from vila_deploy.bench.predict import AttentionCode, step_model
from vila_deploy.bench.predict_prompt import KERNELS_OF_TORCH, PromptModel
from vila_deploy.checkpoint.presets import preset

PROMPTS = (256, 1024)


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


def prompt_launches() -> str:
    """Return launches and predicted milliseconds of a prompt on an H200, as a graph and before."""
    rows = []
    for shown, model in MODELS.items():
        for tokens in PROMPTS:
            llm = preset(model, "int4").llm
            now = PromptModel(llm, "h200", tokens)
            before = PromptModel(llm, "h200", tokens, KERNELS_OF_TORCH, graph=False)
            one_by_one = PromptModel(llm, "h200", tokens, graph=False)
            rows.append(
                [
                    shown, str(tokens), f"{before.launches}, {1e3 * before.seconds:.1f}",
                    f"{one_by_one.launches}, {1e3 * one_by_one.seconds:.1f}",
                    f"{1e3 * now.seconds:.1f}",
                ]
            )  # fmt: skip
    titles = [
        "model", "tokens", "by torch: launches, ms", "our kernels one by one: launches, ms",
        "as a graph: ms",
    ]  # fmt: skip
    return markdown(titles, rows)


def kernel_attention() -> str:
    """Return attention's parts on 9.0 by warps and splits, and what that is predicted to take."""
    rows = []
    for row in results("gpu-attention"):
        code = AttentionCode(
            row["warps"], row["ahead"], row["loop"], row["behind"] + row["merging"], split=0
        )
        step = step_model(preset(MODELS[row["model"]], "int4").llm, TARGET, "merged-attention")
        seconds = step.attention_seconds(CONTEXT, code=code, splits=row["splits"])
        rows.append(
            [
                row["model"],
                f"{row['warps']}, {row['splits']}",
                f"{row['registers']}, {row['shared_bytes'] / 1024:.0f} KB",
                f"{row['ahead']}, {row['loop']}, {row['behind']}, {row['merging']}",
                f"{seconds * 1e6:.2f} µs",
            ]
        )
    titles = [
        "model", "warps, splits", "registers, shared memory",
        "instructions ahead of the loop, in it, behind it, merging", "predicted",
    ]  # fmt: skip
    return markdown(titles, rows)
