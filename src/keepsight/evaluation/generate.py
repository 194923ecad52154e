"""A model's answers to a batch of questions: written out greedily, or chosen by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keepsight.evaluation.questions import LETTERS, PLACEHOLDER, Question
from keepsight.images import open_image
from keepsight.training.spans import image_markers
from keepsight.vlm.chat import special_tokens

Choices = Literal["generation", "likelihood"]
INSTRUCTION = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's, which models know


@dataclass(frozen=True)
class Answer:
    """What was said. cut: still writing at the length limit; refused: why the question could not be asked, or ""."""

    text: str = ""
    cut: bool = False
    refused: str = ""


class ImpossibleError(ValueError):
    """A question that the processor does not take, or that is longer than the model's context."""


class Answerer:
    """Asks a model.

    Args:
        model, processor: an image-text-to-text model in eval mode; the processor has a chat template.
        max_new_tokens: length limit of an answer.
        choices: multiple choice "generation": the options are listed with letters, and the answer is read;
            "likelihood": every option is tried as the answer to the bare question, and the one with the highest mean
            log-probability a token is taken.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int, choices: Choices = "generation") -> None:
        self.model, self.processor = model, processor
        self.max_new_tokens, self.choices = max_new_tokens, choices
        self.markers = {token for token in image_markers(processor).values() if token != PLACEHOLDER}
        text = model.config.get_text_config()
        self.longest: int | None = getattr(text, "max_position_embeddings", None)
        end = model.generation_config.eos_token_id
        self.ends = set(end if isinstance(end, list) else [] if end is None else [end])

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions. All of them have pictures, or none has."""
        answers: list[Answer | None] = [None] * len(questions)
        pictures: list[list[Any]] = []
        for position, question in enumerate(questions):
            try:
                pictures.append(self._pictures(question))
            except Exception as error:  # of a picture, anything: it may come from a function
                pictures.append([])
                other = f"its picture cannot be read ({type(error).__name__}: {error})"
                # A path may be a whole picture in base64.
                answers[position] = Answer(refused=_cut(str(error) if isinstance(error, ValueError) else other))
        while True:
            asked = [i for i, answer in enumerate(answers) if answer is None]
            listed = [i for i in asked if not self._by_likelihood(questions[i])]
            if not listed:
                break
            try:
                prompts = [self._prompt(questions[i], True) for i in listed]
                batch = self._batch(prompts, [pictures[i] for i in listed])
            except ImpossibleError as error:
                for i in listed:  # each by itself, so that only those are lost which are to blame
                    alone = len(listed) == 1
                    answers[i] = Answer(refused=str(error)) if alone else self.answer([questions[i]])[0]
                continue
            long = self._too_long(batch, self.max_new_tokens)
            for row, length in long.items():
                answers[listed[row]] = Answer(refused=self._longer(length, self.max_new_tokens))
            if not long:
                for i, found in zip(listed, self._generate(batch), strict=True):
                    answers[i] = found
        for i in (i for i, answer in enumerate(answers) if answer is None):
            answers[i] = self._likeliest(questions[i], pictures[i])
        return [answer for answer in answers if answer is not None]

    def _by_likelihood(self, question: Question) -> bool:
        return self.choices == "likelihood" and bool(question.choices)

    def _pictures(self, question: Question) -> list[Any]:
        if len(question.choices) > LETTERS and not self._by_likelihood(question):
            raise ValueError(
                f"it has {len(question.choices)} choices, and letters for {LETTERS}; ask by likelihood (choices)"
            )
        for marker in self.markers:
            if any(marker in text for text in (question.question, *question.choices)):
                raise ValueError(f"its text holds the model's image token {marker!r}; write {PLACEHOLDER}")
        if self._by_likelihood(question) and any(PLACEHOLDER in choice for choice in question.choices):
            raise ValueError(f"a choice holds {PLACEHOLDER}; pictures as choices are asked by generation only")
        sources = [(source() if callable(source) else source, source) for source in question.images]
        return [open_image(found, str(name), "Repair it, or leave its questions out.") for found, name in sources]

    def _prompt(self, question: Question, listed: bool) -> str:
        if question.turns:
            return self.processor.apply_chat_template(list(question.turns), add_generation_prompt=True)
        text = question.question
        if question.choices and listed:
            options = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(question.choices)]
            text = "\n".join([text, *options, INSTRUCTION])
        if PLACEHOLDER in text:
            content: list[dict[str, str]] = []
            for number, part in enumerate(text.split(PLACEHOLDER)):
                content += [{"type": "image"}] if number else []
                content += [{"type": "text", "text": part}] if part else []
        else:
            content = [*({"type": "image"} for _ in question.images), {"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _batch(self, prompts: Sequence[str], pictures: Sequence[list[Any]]) -> Any:
        """Padded on the left, so that an answer does not depend on what it shares a batch with.

        Raises:
            ImpossibleError: the processor does not take one of them, such as a picture that is far too narrow.
        """
        flat = [picture for one in pictures for picture in one]
        nested = flat if all(len(one) == 1 for one in pictures) else [one for one in pictures if one]
        try:
            return self.processor(
                text=list(prompts),
                images=nested or None,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                **special_tokens(self.processor, prompts[0]),
            )
        except Exception as cause:  # families refuse in as many ways
            why = f"the model's processor does not take it ({type(cause).__name__}: {cause})"
            raise ImpossibleError(_cut(why)) from cause

    def _too_long(self, batch: Any, more: int) -> dict[int, int]:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return {row: n for row, n in enumerate(lengths) if self.longest is not None and n + more > self.longest}

    def _longer(self, length: int, more: int) -> str:
        fits = self.longest is not None and length <= self.longest
        room = f", with {more} more for the answer (max_new_tokens)" if fits else ""
        return f"it has {length} tokens with its pictures{room}; the model's context is {self.longest}"

    def _generate(self, batch: Any) -> list[Answer]:
        batch = batch.to(self.model.device, dtype=self.model.dtype)
        # Sampling settings of the checkpoint would only raise warnings: greedy decoding has none.
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, **settings)
        new = out[:, batch["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        cut = [not self.ends.intersection(row) for row in new.tolist()]
        return [Answer(text.strip(), ending) for text, ending in zip(texts, cut, strict=True)]

    def _likeliest(self, question: Question, pictures: list[Any]) -> Answer:
        try:
            found = self._losses(self._prompt(question, False), question.choices, pictures)
        except ImpossibleError as error:
            return Answer(refused=str(error))
        return Answer(question.choices[min(range(len(found)), key=lambda i: found[i][0])])

    def losses(self, question: Question, continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """Of each continuation as the answer: mean cross-entropy a token, and whether greedy decoding would say it.

        Raises:
            ImageError, ValueError: the question cannot be asked.
        """
        return self._losses(self._prompt(question, False), continuations, self._pictures(question))

    def _losses(self, prompt: str, continuations: Sequence[str], pictures: list[Any]) -> list[tuple[float, bool]]:
        """All continuations as a batch."""
        texts = [prompt + text.strip() for text in continuations]
        own = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        start = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        # A continuation's tokens are those after what it shares with the prompt: a token may span the boundary.
        counts = [len(ids) - _shared(ids, start) for ids in own]
        batch = self._batch(texts, [pictures] * len(texts))
        if long := self._too_long(batch, 0):
            raise ImpossibleError(self._longer(max(long.values()), 0))
        batch = batch.to(self.model.device, dtype=self.model.dtype)
        logits = self.model(**batch, logits_to_keep=max(counts) + 1, use_cache=False).logits
        found = []
        for row, count in enumerate(counts):
            said = logits[row, -count - 1 : -1].float().log_softmax(dim=-1)
            tokens = batch["input_ids"][row, -count:, None]
            greedy = bool((said.argmax(dim=-1) == tokens[:, 0]).all())
            found.append((-float(said.gather(1, tokens).mean()), greedy))
        return found


def _cut(reason: str, most: int = 500) -> str:
    return reason if len(reason) <= most else reason[:most] + "…"


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
