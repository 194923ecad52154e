"""Text-only pretraining of the language models: a scene in words, then questions about it in the chat format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from keepsight.testbed.language import CAPTION_REQUEST, caption, questions
from keepsight.testbed.scenes import Scene, draw_scenes
from keepsight.testbed.tokenizer import vocabulary

SEED = 12
CONTEXT_WEIGHT = 0.1  # weight of a token of description or question against one of an answer


def encode(text: str) -> list[int]:
    """Token ids of a text whose tokens are apart by spaces; a tenth of the tokenizer's time."""
    table = vocabulary()
    return [table[word] for word in text.split()]


def dialogue(context: str, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation in the chat format and which of them the assistant says."""
    ids, said = encode("<s>"), [False]
    for number, (question, answer) in enumerate(turns):
        asked = encode(f"<|user|> {context + ' ' if number == 0 else ''}{question} <|assistant|>")
        given = encode(f"{answer} </s>")
        ids += asked + given
        said += [False] * len(asked) + [True] * len(given)
    return ids, said


def text_turns(scene: Scene, count: int) -> tuple[str, list[tuple[str, str]]]:
    """A scene in words, and what is said about it: `count` questions, one time in eight the caption again first."""
    turns = [(t.question, t.answer) for t in questions(scene, count)]
    if scene.index % 8 == 0:
        turns = [(CAPTION_REQUEST, caption(scene)), *turns[2:]]
    return caption(scene), turns


def pad(rows: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, S] and the assistant's mask bool [B, S]."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), vocabulary()["<pad>"])
    said = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, (row, mine) in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        said[b, : len(row)] = torch.tensor(mine)
    return ids, said


def text_loss(
    model: LlamaForCausalLM | Qwen2ForCausalLM, step: int, batch: int, *, turns: int = 8, seed: int = SEED
) -> tuple[Tensor, str]:
    """Cross-entropy of a fresh batch: what the assistant says in full, the rest at a tenth. Causal, so right padding
    needs no mask."""
    scenes = draw_scenes(seed, batch, start=step * batch)
    ids, said = pad([dialogue(*text_turns(scene, turns)) for scene in scenes])
    logits = model(input_ids=ids).logits[:, :-1]
    target, answer = ids[:, 1:], said[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    rest = (target != vocabulary()["<pad>"]) & ~answer
    right = (logits.argmax(dim=-1) == target)[answer].float().mean()
    return each[answer].mean() + CONTEXT_WEIGHT * each[rest].mean(), f"answer tokens {right:.3f}"


@torch.no_grad()
def text_accuracy(model: LlamaForCausalLM | Qwen2ForCausalLM, scenes: Sequence[Scene], turns: int = 6) -> float:
    """Share of questions about a described scene whose answer's every token is the model's first choice.

    Each question stands alone after its description, so no earlier answer helps.
    """
    rows = [
        dialogue(caption(scene), [(turn.question, turn.answer)]) for scene in scenes for turn in questions(scene, turns)
    ]
    right = 0
    for start in range(0, len(rows), 256):
        ids, said = pad(rows[start : start + 256])
        hit = model(input_ids=ids).logits[:, :-1].argmax(dim=-1) == ids[:, 1:]
        right += int((hit | ~said[:, 1:]).all(dim=1).sum())
    return right / len(rows)
