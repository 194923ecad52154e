"""Questions a second: keepsight's evaluation against a plain loop of transformers' `generate`, and lmms-eval's wrapper.

    python benchmarks/evaluate.py [--shape tiny|135M] [--device cuda]

Random weights, the testbed's questions about pictures on the disk, greedy answers of up to eight tokens. The plain loop
is what one would write: open the picture, chat template, processor, `generate`, decode, one question at a time.
keepsight also checks and scores every answer and writes it to its journal. The tiny shape is the hard one: a question
takes so little time that everything beside the model counts. Bounds, on the lower end of the interval: 0.97 times the
questions a second of the plain loop, and of lmms-eval's wrapper for LLaVA (`llava_hf`) where lmms-eval is installed.
Both sides take turns at every question, so that what else the machine does hits them alike.
What batches gain over one at a time has no bound: a CPU is busy with one question already.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _models import SHAPES, build
from _timing import Turn, Work, alternating, finish, paired, ratio_of, verdict
from PIL import Image

from keepsight.evaluation import Question, evaluate
from keepsight.testbed.folders import name_of, vqa_items, write_folder
from keepsight.testbed.scenes import draw_scenes

SCENES, TURNS, NEW_TOKENS, PAIRS, BATCH = 12, 4, 8, 12, 12
BOUND = 0.97


def asked(folder: Path) -> list[Question]:
    """Questions whose pictures are files."""
    scenes = draw_scenes(91_000, SCENES)
    write_folder(folder, scenes)
    paths = {name_of(scene): folder / "images" / f"{name_of(scene)}.png" for scene in scenes}
    return [
        Question(q.question, q.answer, paths[str(q.picture)], q.kind, picture=q.picture)
        for q in vqa_items(scenes, TURNS)
    ]


def plain_loop(model: Any, processor: Any, questions: list[Question]) -> Work:
    """The loop that one would write."""

    def answer(turn: Turn) -> list[str]:
        said = []
        for question in questions:
            said.append(plain(model, processor, question))
            turn()
        return said

    return answer


def plain(model: Any, processor: Any, question: Question) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(question.image).convert("RGB")
    batch = processor(text=prompt, images=image, add_special_tokens=False, return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def ours(model: Any, processor: Any, questions: list[Question], batch: int, folder: Path) -> Work:
    """keepsight's evaluation with a journal, each time a new one. All that it does beside the questions counts too."""

    def answer(turn: Turn) -> list[str]:
        with tempfile.TemporaryDirectory(dir=folder) as journal:
            options = {"batch_size": batch, "max_new_tokens": NEW_TOKENS, "journal": journal, "done": lambda _: turn()}
            return [record.prediction for record in evaluate(model, processor, questions, **options).records]

    return answer


def theirs(model: Any, processor: Any, questions: list[Question], folder: Path) -> Work | None:
    """lmms-eval's `llava_hf` on the same weights; None where it is not installed."""
    try:
        from lmms_eval.api.instance import Instance
        from lmms_eval.models.simple.llava_hf import LlavaHf
    except ImportError as cause:
        print(f"lmms-eval's wrapper is left out: it cannot be imported ({cause}); pip install lmms-eval")
        return None
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    template = "{{ bos_token }}{% for m in messages %}<|user|> {{ m['content'] }} <|assistant|>{% endfor %}"
    wrapper = LlavaHf(
        str(folder / "model"), device=str(model.device), device_map=str(model.device), chat_template=template
    )
    wrapper.task_dict = {"questions": {"test": questions}}

    def answer(turn: Turn) -> list[str]:
        def opened(asked: Question) -> list[Image.Image]:
            turn()  # the wrapper asks for a question's pictures when it comes to the question
            return [Image.open(asked.image).convert("RGB")]

        requests = [
            Instance(
                request_type="generate_until",
                arguments=(
                    question.question,
                    {"max_new_tokens": NEW_TOKENS},
                    opened,
                    number,
                    "questions",
                    "test",
                ),
                idx=0,
                metadata={"task": "questions", "doc_id": number, "repeats": 1},
            )
            for number, question in enumerate(questions)
        ]
        return [text.strip() for text in wrapper.generate_until(requests)]

    return answer


def no_turn() -> None:
    """Alone."""


def told(title: str, other: list[float], mine: list[float], questions: int) -> list[bool]:
    print(f"{questions * len(mine) / sum(mine):.1f} questions a second, one at a time", flush=True)
    return [verdict(f"against {title}", ratio_of(other, mine), at_least=BOUND, lower_end=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if not name.startswith("7B")], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, processor = build(given.shape)
    model.to(given.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = asked(folder / "world")
        single, batched = (ours(model, processor, questions, batch, folder) for batch in (1, BATCH))
        by_hand, wrapper = plain_loop(model, processor, questions), theirs(model, processor, questions, folder)
        if (said := single(no_turn)) != by_hand(no_turn) or len(set(said)) < 4:
            raise RuntimeError("keepsight and the plain loop do not answer alike, or all answers are the same")
        held = told("a plain loop of generate", *alternating(by_hand, single, given.pairs), len(questions))
        if wrapper is not None:
            wrapper(no_turn)  # its first run warms up what later ones find ready
            held += told("lmms-eval's llava_hf", *alternating(wrapper, single, given.pairs), len(questions))
        one, many = paired(lambda: single(no_turn), lambda: batched(no_turn), max(3, given.pairs // 2))
        print(f"in batches of {BATCH}: {ratio_of(one, many)} the questions a second of one at a time, no bound")
    finish(*held)


if __name__ == "__main__":
    main()
