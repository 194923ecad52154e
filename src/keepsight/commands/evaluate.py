"""`keepsight evaluate MODEL --tasks questions.jsonl`, and `--tasks paper` through lmms-eval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keepsight.settings import read_command

_FREE = {"batch_size", "device", "out", "resume", "label"}  # may differ when an evaluation goes on


@dataclass(frozen=True)
class EvaluateConfig:
    """What is asked, of what.

    Attributes:
        model: directory in transformers format, folder of a `keepsight train` run, or hub id (the first argument).
        tasks: files of questions, one JSON object a line with `question`, `answer` and, as needed, `image`, `choices`,
            `type`, `id`, `picture`, `pair`, `score`; HuggingFace data sets on disk with these columns; "testbed" and
            "testbed-pope", the drawn world's own (./testbed is a folder); names of lmms-eval's tasks (`gqa,pope`), or
            `paper` for the paper's benchmarks.
        out: the run's folder.
        image_folder: where the pictures' paths start; null = the folder of each file.
        include_path: folder with YAML files of more tasks for lmms-eval.
        label: the run's name in the report; null = the model's.
        limit: ask only so many questions of each file, the first ones.
        batch_size: questions at once.
        max_new_tokens: length limit of an answer; lmms-eval's tasks set their own.
        prune_keep: keep this share of the visual tokens, and drop the others after layer prune_layer; null = all.
        prune_layer: the layer after which they are dropped.
        prune_by: which are kept: those with most "attention" of the prompt's last token in that layer (FastV), a
            "random" draw, or "uniform"ly spaced ones.
        choices: multiple choice by "generation" (options listed with letters) or "likelihood" (of each option).
        device: "auto" (a GPU if there is one), "cpu", "cuda", …
        dtype: of the weights: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code that comes with the checkpoint. Off unless you know its author.
        resume: go on with the evaluation that the folder holds; what was answered is not asked again.
    """

    model: str
    tasks: list[str]
    out: str
    image_folder: str | None = None
    include_path: str | None = None
    label: str | None = None
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 32
    prune_keep: float | None = None
    prune_layer: int = 2
    prune_by: Literal["attention", "random", "uniform"] = "attention"
    choices: Literal["generation", "likelihood"] = "generation"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name, how in (
            ("model", "as the first argument"),
            ("tasks", "with --tasks FILE"),
            ("out", "with --out DIR"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given; give it {how}.")
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more.")
        from keepsight.commands.harness import split_tasks

        own, named = split_tasks(self.tasks)
        stems = [*(Path(task).stem for task in own), *named]
        if len(set(stems)) < len(stems):
            raise ValueError(f"tasks holds two of one name ({', '.join(stems)}); rename a file.")
        _ = self.pruning  # says what means nothing

    @property
    def pruning(self) -> Any:
        """What is pruned, or None."""
        if self.prune_keep is None:
            return None
        from keepsight.vlm.pruning import Pruning

        return Pruning(self.prune_layer, self.prune_keep, self.prune_by)


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """The command's settings."""
    return read_command(
        EvaluateConfig,
        arguments,
        command="evaluate",
        usage="MODEL --tasks FILE|TASK [FILE|TASK …] --out DIR [options]",
        description="Ask a model questions about pictures, and score its answers.",
        first="model",
        lists="tasks",
    )


@dataclass
class _Asked:
    """What was asked, what came of it, and why a task could not be asked; each by the task's name."""

    questions: dict[str, list[Any]]
    found: dict[str, Any] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> int:
    """Evaluate, write the run's folder, print the accuracies; 1 where a task could not be reached."""
    config = parse(arguments)
    from keepsight.commands import harness
    from keepsight.commands.console import device_named, quiet
    from keepsight.evaluation import keep
    from keepsight.processes import barrier, rank
    from keepsight.results import fingerprint
    from keepsight.vlm import Vlm
    from keepsight.vlm.load import load_model
    from keepsight.vlm.pruning import pruned

    own, names = harness.split_tasks(config.tasks)
    asked = _Asked(_own_questions(own, config))
    manager, why = harness.check(names, config.include_path) if names else (None, "")
    if why and not own:
        raise ImportError(f"{', '.join(names)} cannot be run: {why}; and there is no file so called")
    found = _found(config) if rank() == 0 else None
    quiet()
    device = device_named(config.device)
    model, processor = load_model(config.model, trust_remote_code=config.trust_remote_code, dtype=config.dtype)
    model.to(device)
    if config.pruning is not None:
        with pruned(Vlm(model), config.pruning):  # where it cannot be, nothing is left behind
            pass
    run = (found or _created(config)) if rank() == 0 else None
    barrier()
    _ask_own(asked, model, processor, config, alone=len(own) + len(names) == 1)
    if why:
        asked.unreached |= dict.fromkeys(names, why)
    elif names:
        _ask_harness(asked, model, processor, config, names, manager)
    if run is not None:
        _finish(run, config, asked, fingerprint(model), names)
        keep(run, {name: asked.questions[name] for name in asked.found}, asked.found)
        run.update(finished=not asked.unreached)
        _tell(run, asked)
    return 1 if asked.unreached else 0


def _own_questions(own: Sequence[str], config: EvaluateConfig) -> dict[str, list[Any]]:
    from keepsight.commands.diagnose import images_of
    from keepsight.evaluation import load_questions
    from keepsight.testbed.tasks import TASKS

    tasks = {
        Path(task).stem: (TASKS[task]() if task in TASKS else load_questions(images_of(task), config.image_folder))
        for task in own
    }
    return {name: questions[: config.limit] for name, questions in tasks.items()}


def _ask_own(asked: _Asked, model: Any, processor: Any, config: EvaluateConfig, *, alone: bool) -> None:
    """The questions of files and drawn worlds; a task none of which can be asked stops the command only if `alone`."""
    from keepsight.evaluation import evaluate
    from keepsight.evaluation.run import NothingAskedError
    from keepsight.processes import rank

    for name, questions in asked.questions.items():
        try:
            asked.found[name] = evaluate(
                model,
                processor,
                questions,
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
                choices=config.choices,
                pruning=config.pruning,
                journal=Path(config.out) / "answers" / name,
                progress=rank() == 0,
            )
        except NothingAskedError as error:
            if alone:
                raise
            asked.unreached[name] = str(error)


def _ask_harness(
    asked: _Asked, model: Any, processor: Any, config: EvaluateConfig, names: Sequence[str], manager: Any
) -> None:
    from keepsight.commands import harness
    from keepsight.commands.console import console
    from keepsight.processes import rank

    say = console.print if rank() == 0 else lambda text: None
    given, failed = harness.run_tasks(names, manager, model, processor, config, say)
    found = harness.as_evaluations(given, config)
    asked.unreached |= failed
    asked.found |= found
    asked.questions |= {name: [record.question for record in one.records] for name, one in found.items()}


def _finish(run: Any, config: EvaluateConfig, asked: _Asked, weights: str, names: Sequence[str]) -> None:
    """Rows, what each picture adds, and counts; with several tasks, or one of lmms-eval's, a row's target begins with
    the task."""
    from keepsight.commands.console import training_run
    from keepsight.commands.harness import paper_facts
    from keepsight.results import merged
    from keepsight.results.answers import target_of
    from keepsight.vlm.load import model_folder

    def target(task: str, kind: str) -> str:
        return target_of(task, kind, 2 if names else len(asked.questions))  # also where one was not reached

    counts: Counter[str] = Counter()
    rows, parts = [], []
    for name, evaluation in asked.found.items():
        counts.update(evaluation.counts)
        rows += [replace(row, target=target(name, row.target)) for row in evaluation.rows]
        parts.append(evaluation.per_image.renamed(partial(target, name)))
    trained = training_run(Path(model_folder(config.model)))
    seed = {} if trained.get("training_seed") is None else {"training_seed": trained["training_seed"]}
    run.write_rows(rows)
    run.write_per_image(merged(parts))
    run.update(
        label=config.label or trained.get("label") or Path(config.model).resolve().name,
        model={"name": config.model, "fingerprint": weights},
        counts=dict(counts),
        unreached=dict(asked.unreached),
        paper=paper_facts(rows, config.model, names),
        **seed,
        **({} if config.pruning is None else {"pruning": str(config.pruning)}),
    )


def _tell(run: Any, asked: _Asked) -> None:
    from keepsight.commands.console import console
    from keepsight.commands.harness import paper_table
    from keepsight.report import table

    console.print(table([run]))
    if run.info.get("paper"):
        console.print(paper_table(run.info["paper"]))
    for name, count in run.info["counts"].items():
        console.print(f"{name}: {count}", markup=False)
    for name, evaluation in asked.found.items():
        for position, reason in list(evaluation.left_out.items())[:20]:
            console.print(f"left out of {name}: question {position + 1}: {reason}", style="yellow", markup=False)
    for name, reason in asked.unreached.items():
        console.print(f"not reached: {name}: {reason}", style="yellow", markup=False)
    if asked.unreached:
        console.print("The same command with --resume tries these again; the others are kept.", style="yellow")


def _found(config: EvaluateConfig) -> Any:
    """The run to go on with, or None where one can be started; nothing is made yet, for the model may not load.

    Raises:
        FileExistsError: the folder holds a run or other files.
        ValueError: `resume` with other settings than it was started with.
    """
    from keepsight.results import RUN_FILE, RunDirectory

    if not (config.resume and (Path(config.out) / RUN_FILE).is_file()):
        RunDirectory.check(config.out, kind="evaluation")
        return None
    run = RunDirectory.open(config.out)
    changes = run.changes(config, _FREE)
    if run.kind != "evaluation" or changes:
        raise ValueError(
            f"'{config.out}' cannot be gone on with: it "
            + (f"was started with other settings ({changes})" if changes else f"is a {run.kind} run")
            + ". Use the command it was started with, or choose another folder."
        )
    if not (run.path / "config.yaml").is_file():  # stopped before it was written
        run.write_config(config)
    return run


def _created(config: EvaluateConfig) -> Any:
    from keepsight.results import RunDirectory

    run = RunDirectory.create(config.out, label=config.label or Path(config.model).resolve().name, kind="evaluation")
    run.write_config(config)
    return run
