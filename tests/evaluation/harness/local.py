"""Two small tasks of lmms-eval about pictures, and a group of them, in a folder for its `include_path`."""

from pathlib import Path

import datasets

from tests.evaluation.harness.benchmarks import COLOURS, picture

QUESTIONS = {"tiny_one": 5, "tiny_two": 3}
_TASK = """task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function utils.{score}
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
_UTILS = """
def visuals(doc):
    return [doc["image"].convert("RGB")]


def share(doc, results):
    return {"right": float(results[0].split()[:1] == [doc["answer"]])}


def points(doc, results):
    return {"right": 10.0 * len(results[0])}
"""


def local_tasks(folder: Path) -> Path:
    """`tiny_one`, `tiny_two` (scored in points, not from 0 to 1) and `tiny_group`, which holds both."""
    folder.mkdir()
    (folder / "utils.py").write_text(_UTILS)
    for (name, count), score in zip(QUESTIONS.items(), ("share", "points"), strict=True):
        file = folder / f"{name}.parquet"
        rows = [{"question": f"what color {i} ?", "answer": COLOURS[i], "image": picture(i // 2)} for i in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(str(file))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, file=file, score=score))
    (folder / "group.yaml").write_text("group: tiny_group\ntask:\n  - tiny_one\n  - tiny_two\n")
    return folder
