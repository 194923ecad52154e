"""The model that lmms-eval asks: its requests become our questions, answered by `Answerer`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from loguru import logger

from keepsight.diagnosis.progress import tracked
from keepsight.evaluation.generate import Answerer
from keepsight.evaluation.harness.likelihood import IMPOSSIBLE
from keepsight.evaluation.questions import PLACEHOLDER, Question
from keepsight.evaluation.run import Journal, batches_of
from keepsight.vlm import Vlm
from keepsight.vlm.inference import inference
from keepsight.vlm.load import load_model, with_adapter
from keepsight.vlm.pruning import Pruning, Ranking, pruned

UNSAID = 1024  # new tokens where a task names no number, as in lmms-eval's own wrappers
_WINDOW = 8  # batches whose pictures are in memory at once


class UnsupportedError(ValueError):
    """A request that keepsight does not answer; the text says what it was."""


class Simple(lmms):
    """Any image-text-to-text model of transformers, batched and padded on the left, greedy.

    Args:
        pretrained: directory in transformers format, folder of a `keepsight train` run, a PEFT adapter or a hub id.
        adapter: a folder with a PEFT adapter for it, merged into the weights.
        prune_keep, prune_layer, prune_by: drop visual tokens after a layer, see `keepsight.vlm.pruning`; without
            `prune_keep` all stay.
        max_new_tokens: length limit of answers to tasks that name none. No answer gets more than half the context.

    Raises:
        LoadError: see `load_model`.
        ValueError: for a pruning that means nothing.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        adapter: str | None = None,
        prune_keep: float | None = None,
        prune_layer: int = 2,
        prune_by: Ranking = "attention",
        max_new_tokens: int = UNSAID,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        pruning = None if prune_keep is None else Pruning(int(prune_layer), float(prune_keep), prune_by)
        model, processor = load_model(str(pretrained), dtype=dtype, trust_remote_code=trust_remote_code)
        if adapter is not None:
            model = with_adapter(model, adapter)
        gpus = torch.cuda.device_count()
        mine = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"
        model.to(mine if device in (None, "auto", "cuda") else device)
        self._start(model, processor, batch_size, pruning, max_new_tokens)

    @classmethod
    def around(
        cls, model: Any, processor: Any, *, batch_size: int, pruning: Pruning | None = None, progress: bool = False
    ) -> Simple:
        """One for a model that is loaded already."""
        made = cls.__new__(cls)
        made._start(model, processor, batch_size, pruning, UNSAID, progress)
        made.lenient = True
        return made

    def _start(
        self,
        model: Any,
        processor: Any,
        batch_size: int | str,
        pruning: Pruning | None,
        max_new_tokens: int,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; allowed: a number of questions, 1 or more.")
        self.vlm, self.processor, self.pruning = Vlm(model), processor, pruning
        self.batch_size, self.max_new_tokens, self.progress = int(batch_size), int(max_new_tokens), progress
        self.config = model.config  # lmms-eval names the model by it
        self.journal: Path | None = None
        self.lenient = False  # choices of a question that cannot be asked: `IMPOSSIBLE`, which `run_task` counts
        self.refused: dict[str, str] = {}  # question → why it was not asked; it is scored as an empty answer

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what its processes tell each other."""
        import torch.distributed as dist

        gloo = dist.is_initialized() and dist.get_backend() == "gloo"
        return torch.device("cpu") if gloo else next(self.vlm.model.parameters()).device

    def clean(self) -> None:
        """Keep the model: it is asked again for the next task."""

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; an empty one where the question cannot be asked."""
        said = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            groups[self._settings(self._parts(request)[1])].append(position)
        with self._inference():
            for (length, stops), positions in groups.items():
                answers = self._answers([requests[position] for position in positions], length)
                for position, text in zip(positions, answers, strict=True):
                    said[position] = _before(text, stops)
        return said

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Of each continuation (mean cross-entropy a token, whether greedy decoding would say it).

        A loss, the lower the better, and not what the method's name says: lmms-eval takes the choice whose number is
        lowest (`argmin` in its `process_results`). In a `GenerationResult`: 0.7.3 makes a string of a bare pair.
        """
        found: list[tuple[float, bool]] = []
        with self._inference():
            answerer = Answerer(self.vlm.model, self.processor, 1)
            for _, group in groupby(requests, key=lambda request: (_name(request), request.args[0])):
                same = list(group)  # the choices of one question
                if len(same[0].args) < 6:
                    raise UnsupportedError("a likelihood without its question (acc_mutual_info) is not measured")
                context, _, to_visual, number, task, split = same[0].args
                doc = self.task_dict[task][split][number]
                texts = [said if isinstance(said := request.args[1], str) else said(doc) for request in same]
                question = _simple(context, _shown(to_visual, doc), task)
                starts = range(0, len(texts), self.batch_size)
                try:
                    found += [
                        one for at in starts for one in answerer.losses(question, texts[at : at + self.batch_size])
                    ]
                except ValueError as error:
                    if not self.lenient or len(texts) == 1:
                        raise
                    found += [IMPOSSIBLE] * len(texts)
                    self.refused[_name(same[0])] = str(error)
        kept: Any = found
        return [GenerationResult(pair) for pair in kept]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not answered.

        Raises:
            UnsupportedError: always.
        """
        names = sorted({str(request.args[-2]) for request in requests})
        raise UnsupportedError(
            f"{', '.join(names)}: tasks of several rounds are not asked by keepsight; leave them out, or use one of "
            "lmms-eval's own models that takes them."
        )

    def _inference(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(inference(self.vlm.model))
        if self.pruning is not None:
            stack.enter_context(pruned(self.vlm, self.pruning))
        return stack

    def _settings(self, given: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
        """Length limit and stop strings."""
        if given.get("num_beams", 1) not in (1, None) or (given.get("do_sample") and given.get("temperature", 1)):
            logger.warning("The task asks for sampling or beams; keepsight answers greedily.")
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        length = int(given.get("max_new_tokens") or self.max_new_tokens)
        stops = given.get("until") or ()
        return min(length, longest // 2 if longest else length), (stops,) if isinstance(stops, str) else tuple(stops)

    def _answers(self, requests: Sequence[Any], length: int) -> list[str]:
        named = [Question(str(request.args[0]), "", id=_name(request)) for request in requests]
        journal = Journal(self.journal, named, shared=True)
        answerer = Answerer(self.vlm.model, self.processor, length)
        waiting = [position for position in range(len(requests)) if position not in journal.known]
        windows = [
            waiting[at : at + _WINDOW * self.batch_size] for at in range(0, len(waiting), _WINDOW * self.batch_size)
        ]
        for window in tracked(windows, "questions", self.progress and self.rank == 0, len(windows)):
            questions = [self._question(requests[position]) for position in window]
            for batch in batches_of(questions, range(len(window)), self.batch_size):
                journal.add([window[i] for i in batch], answerer.answer([questions[i] for i in batch]))
        self.refused |= {named[i].id: answer.refused for i, answer in journal.known.items() if answer.refused}
        return [journal.known[position].text for position in range(len(requests))]

    def _parts(self, request: Any) -> tuple[Any, Mapping[str, Any]]:
        """What makes pictures of a document, and the settings of the answer."""
        _, settings, to_visual, *_ = request.args
        return to_visual, settings

    def _question(self, request: Any) -> Question:
        doc = self.task_dict[request.args[4]][request.args[5]][request.args[3]]
        to_visual, _ = self._parts(request)
        return _simple(str(request.args[0]), _shown(to_visual, doc), request.args[4])


class Chat(Simple):
    """The same, asked by chat messages, in which pictures stand where the task puts them."""

    is_simple = False

    def _parts(self, request: Any) -> tuple[Any, Mapping[str, Any]]:
        _, to_messages, settings, *_ = request.args
        return to_messages, settings

    def _question(self, request: Any) -> Question:
        to_messages, _ = self._parts(request)
        task = request.args[4]
        turns, pictures = [], []
        for message in to_messages(self.task_dict[task][request.args[5]][request.args[3]]):
            content = message["content"]
            parts: list[dict[str, str]] = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"].replace(PLACEHOLDER, "")})
                else:
                    pictures.append(_picture(part.get("url"), part["type"], task))
                    parts.append({"type": "image"})
            turns.append({"role": message["role"], "content": parts})
        return Question(str(request.args[0]), "", pictures or None, turns=turns)


def _name(request: Any) -> str:
    return f"{request.args[-2]}-{request.args[-3]}"


def _shown(to_visual: Any, doc: Any) -> Sequence[Any]:
    return (to_visual(doc) if to_visual is not None else None) or ()


def _simple(text: str, visuals: Sequence[Any], task: str) -> Question:
    """A text and its pictures: where its marks are, if there are as many, else in front."""
    pictures = [_picture(visual, "", task) for visual in visuals]
    if text.count(PLACEHOLDER) != len(pictures):
        text = text.replace(PLACEHOLDER, "")
    return Question(text, "", pictures or None)


def _picture(visual: Any, kind: str, task: str) -> Any:
    from PIL import Image

    pictures = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    if isinstance(visual, Image.Image) and kind in ("", "image"):
        return visual
    if isinstance(visual, str) and kind in ("", "image") and Path(visual).suffix.lower() in pictures:
        return visual
    named = kind if kind not in ("", "image") else f"'{visual}'" if isinstance(visual, str) else type(visual).__name__
    raise UnsupportedError(
        f"{task}: it shows the model {named}; keepsight asks about pictures only (no video, no audio)"
    )


def _before(text: str, stops: Sequence[str]) -> str:
    """What comes before the first of the stop strings."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
