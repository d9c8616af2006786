"""The ONNX graphs that TensorRT compiles, run on onnxruntime, beside fp32 and fp16 PyTorch.

All prompts go through a graph as one batch, the shorter ones padded behind their ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from tests.support.comparison import NEW_TOKENS, Prompt
from vila_deploy.backends.tensorrt import files, graphs
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.eval.metrics import compare_logits
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.conversation import encode_images
from vila_deploy.runtime.prompt import place_images
from vila_deploy.utils.arrays import Floats

MAX_SEQ_LEN = 256


@dataclass(frozen=True)
class Comparison:
    """A graph and fp16 PyTorch, compared with fp32 PyTorch.

    Args:
        pairs: (reference's tokens, graph's tokens) of each prompt.
        kl, half_kl: mean KL of the graph's and of fp16 PyTorch's next-token distributions, in nats.
        margins: where tokens differ, the reference's logit of its token minus that of the graph's.
        half_differs: how often fp16 PyTorch's token differs.
    """

    pairs: list[tuple[list[int], list[int]]]
    kl: float
    half_kl: float
    margins: list[float]
    half_differs: int


class GraphRunner:
    """The LLM graph over a batch of sequences, one row of the cache each."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, batch: int):
        llm, self._folder = checkpoint.config.llm, folder
        self._session = _load(folder / files.LLM)
        shape = (batch, llm.num_kv_heads, MAX_SEQ_LEN, llm.head_dim)
        kinds = [f"{kind}_{n}" for n in range(llm.num_layers) for kind in ("key", "value")]
        self._cache = {f"past_{kind}": np.zeros(shape, np.float16) for kind in kinds}
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, embeds: Floats, positions: Any, last: Any) -> Floats:
        """[batch, tokens, hidden] at `positions` [batch, tokens] → logits at `last` [batch]."""
        feeds = {"inputs_embeds": embeds, "positions": positions, "last": last, **self._cache}
        results = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        if "new_cache" in results:
            rows = np.arange(len(positions))[:, None]
            for name, new in zip(self._cache, results["new_cache"], strict=True):
                # Padding may exceed the cache; nothing reads it.
                columns = np.minimum(positions, MAX_SEQ_LEN - 1)
                self._cache[name][rows, :, columns] = new.swapaxes(1, 2)
        else:
            self._cache = {name: results[name.replace("past", "present")] for name in self._cache}
        return results["logits"]

    def generate_in_chunks(self, prompt: Floats, embed: Any, size: int) -> list[int]:
        """Greedy tokens after one prompt [tokens, hidden] that is read `size` tokens at a time."""
        for start in range(0, len(prompt), size):
            chunk = prompt[start : start + size]
            positions = np.arange(start, start + len(chunk))[None]
            logits = self.run(chunk[None], positions, np.array([len(chunk) - 1]))
        tokens: list[int] = []
        for step in range(NEW_TOKENS):
            tokens.append(int(logits[0].argmax()))
            positions = np.array([[len(prompt) + step]])
            logits = self.run(embed(tokens[-1:])[None], positions, np.zeros(1, np.int64))
        return tokens

    def generate(self, prompts: Sequence[Floats], embed: Any) -> tuple[Any, Floats]:
        """Greedy tokens [batch, NEW_TOKENS] and the logits that each was chosen from."""
        lengths = np.array([len(prompt) for prompt in prompts])
        padded = np.zeros((len(prompts), lengths.max(), prompts[0].shape[1]), np.float32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        positions = np.tile(np.arange(lengths.max()), (len(prompts), 1))
        logits = [self.run(padded, positions, lengths - 1)]
        for step in range(NEW_TOKENS - 1):
            tokens = logits[-1].argmax(-1)
            positions = (lengths + step)[:, None]
            logits.append(self.run(embed(tokens)[:, None], positions, np.zeros_like(lengths)))
        stacked = np.stack(logits, 1)
        return stacked.argmax(-1), stacked


def write_graphs(folder: Path, root: Path, dialect: str) -> None:
    """The graphs of the checkpoint in `root` as they are handed to TensorRT."""
    checkpoint = open_checkpoint(root)
    config = checkpoint.config
    folder.mkdir()

    def advance(text: str = "", steps: int = 1) -> None: ...

    graphs.write_vision(folder, config, checkpoint.vision, checkpoint.projector, dialect, advance)
    graphs.write_llm(folder, config, checkpoint.llm, MAX_SEQ_LEN, dialect, advance)


def embedded(root: Path, prompts: Sequence[Prompt]) -> list[Floats]:
    """The reference's embeddings [tokens, hidden] of each prompt with its images."""
    checkpoint = open_checkpoint(root)
    reference = ReferenceSession(checkpoint)
    texts, pixels = _rendered(checkpoint, prompts)
    return [
        merge_embeddings(text, encode_images(reference, each), reference.embed_tokens)
        for text, each in zip(texts, pixels, strict=True)
    ]


def compare(root: Path, folder: Path, prompts: Sequence[Prompt]) -> Comparison:
    """The graphs in `folder` beside the reference that reads the checkpoint in `root`.

    The references read each prompt with the graph's answer at once: up to the first token that
    differs, their most likely tokens are those that they would have decoded themselves.
    """
    checkpoint = open_checkpoint(root)
    reference = ReferenceSession(checkpoint)
    texts, pixels = _rendered(checkpoint, prompts)
    vision = _load(folder / files.VISION)

    def features(images: Any) -> list[Floats]:
        tiles = [tile[None] for image in images for tile in image.tiles]
        return [vision.run(None, {"pixels": tile})[0][0] for tile in tiles]

    embed = reference.embed_tokens
    asked = [merge_embeddings(t, features(p), embed) for t, p in zip(texts, pixels, strict=True)]
    runner = GraphRunner(folder, checkpoint, len(prompts))
    tokens, logits = runner.generate(asked, embed)
    exact = [
        merge_embeddings(t, encode_images(reference, p), embed)
        for t, p in zip(texts, pixels, strict=True)
    ]
    wanted = [_read(reference, prompt, row) for prompt, row in zip(exact, tokens, strict=True)]
    del reference
    half = ReferenceSession(checkpoint, torch.float16)
    rough = [
        merge_embeddings(t, encode_images(half, p), half.embed_tokens)
        for t, p in zip(texts, pixels, strict=True)
    ]
    halves = [_read(half, prompt, row) for prompt, row in zip(rough, tokens, strict=True)]
    expected = np.stack(wanted)
    best = expected.argmax(-1)
    differs = np.argwhere(best != tokens)
    return Comparison(
        pairs=[(a.tolist(), b.tolist()) for a, b in zip(best, tokens, strict=True)],
        kl=mean_kl(expected, logits),
        half_kl=mean_kl(expected, np.stack(halves)),
        margins=[
            float(expected[i, j, best[i, j]] - expected[i, j, tokens[i, j]]) for i, j in differs
        ],
        half_differs=int((np.stack(halves).argmax(-1) != best).sum()),
    )


def mean_kl(expected: Floats, actual: Floats) -> float:
    """Return the mean KL(expected ‖ actual) of logits [prompts, tokens, vocabulary], in nats."""
    kl = [
        compare_logits(torch.from_numpy(p).double(), torch.from_numpy(q).double()).kl.mean()
        for p, q in zip(expected, actual, strict=True)
    ]
    return float(torch.stack(kl).mean())


def _read(session: ReferenceSession, prompt: Floats, answer: Any) -> Floats:
    """Logits [NEW_TOKENS, vocab] from which each token of `answer` would be chosen."""
    whole = np.concatenate([prompt, session.embed_tokens(answer[:-1].tolist())])
    rows = session.llm(torch.from_numpy(whole).to(session.dtype))
    return rows[len(prompt) - 1 :].float().numpy()


def _rendered(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> tuple[list, list]:
    """Text chunks and images' pixels of each prompt."""
    tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
    model = ModelInfo.from_config(checkpoint.config, tokenizer)
    texts, pixels = [], []
    for images, question in prompts:
        placed, prepared = place_images(question, images, model)
        text = render(PROMPT_TEMPLATES[model.prompt], [], placed)
        texts.append(text_chunks(tokenizer, text, model.recipe))
        pixels.append(prepared)
    return texts, pixels


def _load(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Otherwise onnxruntime would round activations to int8, which no GPU engine does.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(folder / files.GRAPH, options, providers=providers)
