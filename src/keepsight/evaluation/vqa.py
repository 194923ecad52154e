"""Questions about pictures: greedy answers scored by exact match, and how far one gets without looking.

An accuracy says little without its prior: the best score that the questions' wording alone allows. Both come as
`Measurement` rows over all questions and per question type, with 95 % intervals that respect that several questions
share one picture. Definitions are ours.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from keepsight.images import open_image
from keepsight.results import Measurement, PerImage, PerImageBuilder
from keepsight.vlm.chat import special_tokens
from keepsight.vlm.inference import inference

RESAMPLES = 2000
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class VqaItem:
    """One question. `picture` names the picture for clustering; without it each question is its own cluster."""

    question: str
    answer: str
    image: Image.Image | str | Path | None = None
    kind: str = ""
    picture: Hashable = None


@dataclass(frozen=True)
class VqaRecord:
    """What was answered to one item."""

    item: VqaItem
    prediction: str
    correct: bool


@dataclass(frozen=True)
class VqaResult:
    """Records in the order of the items, and rows: all questions first, then each type in alphabetical order.

    per_image: what each picture (a question without one: its number) adds to each row.
    """

    records: list[VqaRecord]
    rows: list[Measurement]
    per_image: PerImage


def normalise(answer: str) -> str:
    """Lower case, no punctuation, no articles, number words as digits, single spaces."""
    words = re.sub(r"[^\w\s]", " ", answer.lower()).split()
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words if word not in _ARTICLES)


def interval(correct: Sequence[bool], clusters: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """95 % interval of an accuracy.

    Wilson's where every question has its own picture; else a percentile bootstrap over pictures (2,000 resamples).
    Where every picture scores the same the bootstrap would claim certainty: then Wilson's with n = pictures.

    Raises:
        ValueError: no questions, or not one cluster a question.
    """
    if not correct or len(correct) != len(clusters):
        raise ValueError(
            f"interval needs one cluster for each of at least one answer; got {len(correct)} answers "
            f"and {len(clusters)} clusters"
        )
    sums: dict[Hashable, list[int]] = defaultdict(lambda: [0, 0])
    for hit, cluster in zip(correct, clusters, strict=True):
        sums[cluster][0] += int(hit)
        sums[cluster][1] += 1
    table = np.array(list(sums.values()))  # [pictures, (right, asked)]
    share = table[:, 0] / table[:, 1]
    if len(table) == len(correct) or np.ptp(share) == 0:
        found = binomtest(round(float(share.mean()) * len(table)), len(table)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    rng = np.random.default_rng(seed)
    drawn = table[rng.integers(len(table), size=(RESAMPLES, len(table)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return float(low), float(high)


def answer_accuracy(
    model: Any, processor: Any, items: Sequence[VqaItem], batch_size: int = 16, max_new_tokens: int = 8
) -> VqaResult:
    """Greedy answers to `items` by exact match after `normalise`, as rows `answer_accuracy`.

    Prompts come from the processor's chat template, the picture first. Batches are padded on the left, so that
    an answer does not depend on what it shares a batch with; items with and without a picture go in batches apart.
    The model is left in the mode (train or eval) it was in.

    Raises:
        ValueError: no items, or a batch size or answer length below one.
    """
    for name, value in (
        ("number of items", len(items)),
        ("batch_size", batch_size),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; answering needs at least 1")
    predictions = [""] * len(items)
    pictured = [i for i, item in enumerate(items) if item.image is not None]
    bare = [i for i, item in enumerate(items) if item.image is None]
    with inference(model):
        for group in (pictured, bare):
            for start in range(0, len(group), batch_size):
                chosen = group[start : start + batch_size]
                answers = _generate(model, processor, [items[i] for i in chosen], max_new_tokens)
                for i, answer in zip(chosen, answers, strict=True):
                    predictions[i] = answer
    return _score("answer_accuracy", items, predictions)


def text_only_prior(train_items: Sequence[VqaItem], test_items: Sequence[VqaItem]) -> VqaResult:
    """The best that can be had without the picture, as rows `answer_prior`.

    Each test question gets the answer most frequent in training for exactly this question; for a question never
    seen, the one most frequent for its type; for a type never seen, the one most frequent of all. Ties go to the
    first in the alphabet.

    Raises:
        ValueError: no training or no test items.
    """
    if not train_items or not test_items:
        raise ValueError(f"the prior needs training and test questions; got {len(train_items)} and {len(test_items)}")
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for item in train_items:
        for key in _backing_off(item):
            counts[key][item.answer] += 1
    predictions = []
    for item in test_items:
        seen = next(counts[key] for key in _backing_off(item) if key in counts)
        predictions.append(min(seen, key=lambda answer: (-seen[answer], answer)))
    return _score("answer_prior", test_items, predictions)


def _backing_off(item: VqaItem) -> tuple[tuple[str, ...], ...]:
    return ("question", " ".join(item.question.lower().split())), ("kind", item.kind), ()


def _score(metric: str, items: Sequence[VqaItem], predictions: Sequence[str]) -> VqaResult:
    records = [
        VqaRecord(item, prediction, normalise(prediction) == normalise(item.answer))
        for item, prediction in zip(items, predictions, strict=True)
    ]
    clusters = [("alone", i) if r.item.picture is None else ("picture", r.item.picture) for i, r in enumerate(records)]
    kinds = sorted({r.item.kind for r in records if r.item.kind})
    names = {cluster: str(cluster[1]) if cluster[0] == "picture" else f"question {cluster[1]}" for cluster in clusters}
    place = {cluster: column for column, cluster in enumerate(names)}
    rows, per_image = [], PerImageBuilder(list(names.values()))
    for kind in ["", *kinds]:
        chosen = [i for i, r in enumerate(records) if kind in ("", r.item.kind)]
        correct = [records[i].correct for i in chosen]
        low, high = interval(correct, [clusters[i] for i in chosen])
        rows.append(
            Measurement(
                metric, float(np.mean(correct)), low=low, high=high, n=len(chosen), unit="questions", target=kind
            )
        )
        where, share = _contributions(correct, [place[clusters[i]] for i in chosen])
        per_image.add(rows[-1].key, share, where)
    return VqaResult(records, rows, per_image.finish())


def _contributions(correct: Sequence[bool], pictures: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The pictures asked about, and what each adds to the accuracy over all questions (a ratio of two sums)."""
    where, position = np.unique(np.asarray(pictures), return_inverse=True)
    accuracy = np.mean(correct)
    excess = np.bincount(position, weights=np.asarray(correct, dtype=np.float64) - accuracy)
    return where, accuracy + excess * len(where) / len(correct)


def _generate(model: Any, processor: Any, items: Sequence[VqaItem], max_new_tokens: int) -> list[str]:
    prompts, images = [], []
    for item in items:
        content: list[dict[str, str]] = [{"type": "text", "text": item.question}]
        if item.image is not None:
            content.insert(0, {"type": "image"})
            images.append(open_image(item.image, _name(item), "Repair it, or leave its questions out."))
        prompts.append(
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        )
    batch = processor(
        text=prompts,
        images=images or None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **special_tokens(processor, prompts[0]),
    )
    batch = batch.to(model.device)
    # Sampling settings of the checkpoint would only raise warnings: greedy decoding has none.
    out = model.generate(
        **batch, do_sample=False, max_new_tokens=max_new_tokens, temperature=None, top_p=None, top_k=None
    )
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _name(item: VqaItem) -> str:
    return str(item.image) if isinstance(item.image, (str, Path)) else f"of the question {item.question!r}"
