"""Tasks of lmms-eval that take the likeliest choice: what was said, and questions that could not be asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

IMPOSSIBLE = (math.inf, False)  # loss and greedy decoding of a choice whose question could not be asked


def by_likelihood(task: Any) -> bool:
    """Whether a task takes the likeliest of its choices."""
    return task.OUTPUT_TYPE == "multiple_choice"


def count_impossible(task: Any) -> None:
    """From now on the task counts a question as wrong that could not be asked; lmms-eval would take its first choice.

    Raises (when the task judges such a question):
        ValueError: one of its numbers is no mean over questions, such as F1, and has no place for it.
    """
    judge = task.process_results

    def judged(doc: Any, results: Sequence[Any], **given: Any) -> dict[str, Any]:
        found = judge(doc, results, **given)
        if not _impossible(results):
            return found
        if other := [name for name, value in found.items() if not isinstance(value, (bool, int, float))]:
            raise ValueError(f"a question could not be asked, and {other[0]!r} cannot count it as wrong")
        return dict.fromkeys(found, 0.0)

    task.process_results = judged


def said_and_right(task: Any, doc: Any, sample: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The text of the choice that was likeliest ("" where it could not be asked), and of the right ones."""
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    losses = [float(pair[0]) for pair in sample["filtered_resps"]][: len(choices)]
    gold = task.doc_to_target(doc)
    right = [
        choices[one] if isinstance(one, int) and 0 <= one < len(choices) else str(one)
        for one in (gold if isinstance(gold, (list, tuple)) else [gold])
    ]
    impossible = _impossible(sample["filtered_resps"])
    return "" if impossible else choices[min(range(len(losses)), key=losses.__getitem__)], right


def _impossible(results: Sequence[Any]) -> bool:
    return all(float(pair[0]) == math.inf for pair in results)
