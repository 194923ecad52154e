"""The part of `keepsight evaluate` that goes through lmms-eval: `--tasks paper`, `--tasks gqa,pope`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PAPER = "paper"
FOLDER = "harness"  # of a run: what each finished task gave, and small copies of its pictures
PICTURES = "pictures"
_FILES = (".jsonl", ".json", ".ndjson")


def split_tasks(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files, data sets and drawn worlds of questions, and names of lmms-eval's tasks; `paper` is its nine."""
    from keepsight.testbed.tasks import TASKS

    own: list[str] = []
    named: list[str] = []
    for task in tasks:
        if task in TASKS or Path(task).exists() or "/" in task or "\\" in task or Path(task).suffix.lower() in _FILES:
            own.append(task)
            continue
        for name in filter(None, task.split(",")):
            named += _benchmarks() if name == PAPER else [name]
    return own, list(dict.fromkeys(named))


def _benchmarks() -> list[str]:
    from keepsight.evaluation.harness.paper import benchmarks

    return [one.task for one in benchmarks()]


def check(names: Sequence[str], include_path: str | None = None) -> tuple[Any, str]:
    """lmms-eval's task manager, and why there is none, or "".

    Raises:
        FileNotFoundError: for a folder of more tasks that is not there.
        ValueError: for a task that lmms-eval does not have.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path '{include_path}' is no folder; give the one with the tasks' YAML files.")
    from keepsight.evaluation.harness import missing

    why = missing()
    if why:
        return None, why
    from keepsight.evaluation.harness.tasks import known_tasks

    manager = known_tasks(include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks, 3)) or "see `lmms-eval tasks`"
            raise ValueError(
                f"tasks has {name!r}, which is neither a file here nor a task of lmms-eval (similar: {near}); allowed: "
                f"files of questions, names of its tasks, or {PAPER!r} for the paper's benchmarks."
            )
    return manager, ""


def run_tasks(
    names: Sequence[str], manager: Any, model: Any, processor: Any, config: Any, say: Any
) -> tuple[list[Any], dict[str, str]]:
    """Run the tasks that the run's folder does not hold yet; one that cannot be run does not keep the others.

    Returns:
        what the tasks, and the parts of groups, gave (of several processes in the first), and why a task was not
        reached.
    """
    from keepsight.evaluation.harness.model import Chat, Simple
    from keepsight.evaluation.harness.result import load_results, save_results
    from keepsight.evaluation.harness.tasks import UnreachedError, run_task
    from keepsight.processes import barrier, team

    logging.getLogger("lmms-eval").setLevel(logging.ERROR)  # its own log would drown the results
    processes, folder = team(), Path(config.out) / FOLDER
    found: list[Any] = []
    unreached: dict[str, str] = {}
    for name in names:
        file = folder / f"{name}.json"
        if processes.from_first(file.is_file()):
            found += load_results(file) if processes.first else []
            continue
        say(f"{name} …")
        made = Simple if _by_likelihood(manager, name) else Chat
        lm = made.around(
            model, processor, batch_size=config.batch_size, pruning=config.pruning, progress=processes.first
        )
        lm.journal = Path(config.out) / "answers" / name
        try:
            results = run_task(lm, name, manager, folder / "files", config.limit, folder / PICTURES)
        except UnreachedError as error:
            unreached[name] = str(error)
            continue
        refused = {question: why for one in processes.to_first(lm.refused) for question, why in one.items()}
        for result in results:
            if own := [why for question, why in refused.items() if question.rpartition("-")[0] == result.task]:
                result.notes.append(f"{len(own)} questions could not be asked and count as wrong, such as: {own[0]}")
        if processes.first:
            save_results(results, file)
        found += results
        barrier()
    return found, unreached


def _by_likelihood(manager: Any, name: str) -> bool:
    """Whether a task takes likelihoods, which lmms-eval asks of models without chat messages only."""
    with contextlib.suppress(Exception):
        return manager._get_config(name).get("output_type") in ("loglikelihood", "multiple_choice")
    return False


def as_evaluations(found: Sequence[Any], config: Any) -> dict[str, Any]:
    """What the tasks gave, as the evaluations of the run, each under the name that its results go by."""
    pictures = Path(config.out) / FOLDER / PICTURES
    return {result.name: result.evaluation(pictures) for result in found}


def paper_facts(rows: Sequence[Any], model: str, names: Sequence[str]) -> dict[str, Any] | None:
    """For run.json: the benchmarks among the tasks beside the paper's figures, if the model is one of its
    configurations; None where no benchmark was asked for."""
    from keepsight.evaluation.harness.paper import about, benchmark, compare, configuration_of

    if not any(benchmark(name) for name in names):
        return None
    configuration = configuration_of(model)
    return {
        "configuration": None if configuration is None else configuration.name,
        "lines": [asdict(line) for line in compare(rows, configuration)],
        "about": [] if configuration is None else about(),
    }


def paper_table(facts: Mapping[str, Any]) -> Any:
    """The same for the terminal."""
    from rich.table import Table

    from keepsight.report.benchmarks import paper_lines

    known = facts["configuration"]
    title = "The paper's benchmarks" + (f"; its figures: {known}" if known else "")
    table = Table(title=title, caption="\n".join(facts["about"]) or None, caption_justify="left")
    for heading in ("benchmark", "here [95 %]", *(["paper"] if known else []), "note"):
        table.add_column(heading, overflow="fold")
    for name, here, interval, quoted, note in paper_lines(facts):
        table.add_row(name, f"{here} {interval}".strip(), *([quoted] if known else []), note)
    return table
