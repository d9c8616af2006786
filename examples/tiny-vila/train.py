"""Trains tiny-vila from nothing on two CPU cores: its parts took 57 minutes in all.

Two processes side by side teach the eye (tower and projector) to write the codes of codes.py and
the language model to answer questions from them. Then both learn together from images alone, in
three rounds, towards the end of each every other step with the language model's weights rounded to
4 bits, so that it bears quantization.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from evaluate import rounded
from tokenizers import Tokenizer
from torch import Tensor, nn

from tiny_vila.codes import STD, Codes, prepare_embeddings
from tiny_vila.model import TEMPLATE, TinyVila, load, preprocess, save, train_tokenizer
from tiny_vila.packing import Batch, collate, random_pack
from tiny_vila.questions import TRAINING, vocabulary_text
from tiny_vila.scenes import Scene, draw, random_scene
from vila_deploy.processing.chat_template import render

SEED = 0
CODE_NOISE = 0.15
ROUND_FROM = 0.6
SEE, ANSWER, TOGETHER = 1, 2, 3


@dataclass(frozen=True)
class Round:
    """Steps of learning together: `rate` is the LLM's; for the rest see random_pack."""

    steps: int
    rate: float
    max_shapes: int
    even_answers: bool


# Long descriptions of crowded images teach where to look; then the short answers count for more.
FIRST = Round(1700, 1.5e-3, max_shapes=4, even_answers=False)
ROUNDS = (FIRST, Round(1150, 1.2e-3, 3, even_answers=True), Round(1500, 1e-3, 3, even_answers=True))


def new_model(tokenizer: Tokenizer | None = None) -> tuple[TinyVila, Codes]:
    """The untrained model, the same in every process, and the codes that belong to it."""
    if tokenizer is None:
        texts = [render(TEMPLATE, [], ""), TEMPLATE.user, *vocabulary_text(4000)]
        tokenizer = train_tokenizer(texts)
    torch.manual_seed(SEED)
    model = TinyVila(tokenizer)
    table = model.llm.model.embed_tokens.weight.data
    prepare_embeddings(model.tokenizer, table)
    # Words that come in go out alike, and a query looks for keys like itself, to begin with.
    model.llm.lm_head.weight.data.copy_(table * 0.2)
    for layer in model.llm.model.layers:
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data /= math.sqrt(2 * len(model.llm.model.layers))
    return model, Codes(model.tokenizer, table.clone())


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([preprocess(draw(scene)) for scene in scenes]))


def learn_apart(see_steps: int, answer_steps: int) -> tuple[TinyVila, Codes]:
    """Eye and language model, each in a process of its own."""
    model, codes = new_model()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        seeing = pool.submit(learn_to_see, see_steps)
        answering = pool.submit(learn_to_answer, answer_steps)
        eye = seeing.result()
        model.llm.load_state_dict(answering.result())
    model.vision_tower.load_state_dict(eye["tower"])
    model.mm_projector.load_state_dict(eye["projector"])
    return model, codes


def learn_to_see(steps: int, batch: int = 32) -> dict[str, dict[str, Tensor]]:
    """Tower and projector: the codes, from images."""
    torch.set_num_threads(1)
    model, codes = new_model()
    rng = np.random.default_rng([TRAINING, SEE, SEED])
    training = Training("see", {model.vision_tower: 1e-3, model.mm_projector: 1e-3}, steps)
    for step in range(steps):
        scenes = [random_scene(rng, FIRST.max_shapes) for _ in range(batch)]
        features = model.encode_images(pixels_of(scenes))
        loss = nn.functional.mse_loss(features, codes.features(scenes)) / STD**2
        training.update(step, loss, places=codes.share_read(features.detach(), scenes))
    return {"tower": model.vision_tower.state_dict(), "projector": model.mm_projector.state_dict()}


def learn_to_answer(steps: int, batch: int = 12) -> dict[str, Tensor]:
    """The language model: answers, from codes with a little noise."""
    torch.set_num_threads(1)
    model, codes = new_model()
    rng = np.random.default_rng([TRAINING, ANSWER, SEED])
    training = Training("answer", {model.llm: 2e-3}, steps)
    for step in range(steps):
        packs = random_batch(model, rng, batch, FIRST)
        features = codes.features(packs.scenes)
        features += CODE_NOISE * STD * torch.randn_like(features)
        loss, right = answer_loss(model, packs, features)
        training.update(step, loss, right=right)
    return model.llm.state_dict()


def learn_together(model: TinyVila, codes: Codes, number: int, batch: int = 12) -> None:
    """Everything: answers, from images; the codes still count a little."""
    rng = np.random.default_rng([TRAINING, TOGETHER, SEED, number])
    plan = ROUNDS[number]
    rates = {model.llm: plan.rate, model.vision_tower: 3e-4, model.mm_projector: 3e-4}
    training = Training(f"round {number + 1}", rates, plan.steps)
    for step in range(plan.steps):
        packs = random_batch(model, rng, batch, plan)
        features = model.encode_images(pixels_of(packs.scenes))
        wanted = codes.features(packs.scenes)
        read = codes.share_read(features.detach(), packs.scenes)
        round_now = step > ROUND_FROM * plan.steps and step % 2
        with rounded_linears(model.llm if round_now else None):
            loss, right = answer_loss(model, packs, features)
            loss = loss + 0.1 * nn.functional.mse_loss(features, wanted) / STD**2
            loss.backward()
        training.update(step, loss, right=right, places=read)


def random_batch(model: TinyVila, rng: np.random.Generator, count: int, plan: Round) -> Batch:
    packs = (
        random_pack(model.tokenizer, rng, plan.max_shapes, plan.even_answers) for _ in range(count)
    )
    return collate(list(packs))


def answer_loss(model: TinyVila, batch: Batch, features: Tensor) -> tuple[Tensor, float]:
    """Weighted cross-entropy of the answers' tokens, and the share of tokens that are right."""
    hidden = model.llm.model(
        inputs_embeds=model.embed(batch.tokens, features),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    # A branch's first token never has a target, so that its left neighbour in the row may differ.
    learnt = batch.targets[:, 1:] >= 0
    logits = model.llm.lm_head(hidden[:, :-1][learnt])
    targets = batch.targets[:, 1:][learnt]
    right = (logits.argmax(-1) == targets).float().mean().item()
    weights = batch.weights[:, 1:][learnt]
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), right


@contextmanager
def rounded_linears(llm: nn.Module | None) -> Iterator[None]:
    """Decoder linears act as if in 4 bits; gradients go to the weights that were rounded."""
    layers = llm.model.layers.modules() if llm is not None else ()
    weights = [module.weight for module in layers if isinstance(module, nn.Linear)]
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.data = rounded(weight.data)
    yield
    for weight, data in zip(weights, kept, strict=True):
        weight.data = data


class Training:
    """AdamW with a peak rate for each module, warm-up and half a cosine; says how it goes."""

    def __init__(self, name: str, rates: dict[nn.Module, float], steps: int):
        self.name, self.steps, self.start = name, steps, time.perf_counter()
        self.parameters = [p for module in rates for p in module.parameters()]
        groups = []
        for module, rate in rates.items():
            matrices = [p for p in module.parameters() if p.ndim > 1]
            vectors = [p for p in module.parameters() if p.ndim <= 1]
            groups.append({"params": matrices, "lr": rate, "weight_decay": 0.05})
            groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.optimizer.zero_grad()

    def _factor(self, step: int) -> float:
        warmup = min(100, self.steps // 4)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / (self.steps - warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    def update(self, step: int, loss: Tensor, **values: float) -> None:
        """One step down; `loss` has been propagated already if any parameter has a gradient."""
        if all(p.grad is None for p in self.parameters):
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == self.steps - 1:
            text = "  ".join(
                f"{name} {v:.4f}" for name, v in {"loss": loss.item(), **values}.items()
            )
            elapsed = time.perf_counter() - self.start
            print(f"{self.name:8s} {step:5d}  {elapsed:6.0f} s  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--see-steps", type=int, default=2500)
    parser.add_argument("--answer-steps", type=int, default=2600)
    parser.add_argument("--start", type=Path, help="go on with the last round from this checkpoint")
    options = parser.parse_args()
    if options.start:
        model = load(options.start).train()
        _, codes = new_model(model.tokenizer)
    else:
        model, codes = learn_apart(options.see_steps, options.answer_steps)
        save(model, options.out)
    torch.set_num_threads(2)
    for number in range(len(ROUNDS) - 1 if options.start else 0, len(ROUNDS)):
        learn_together(model, codes, number)
        save(model, options.out)


if __name__ == "__main__":
    main()
