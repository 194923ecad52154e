"""The paper's nine benchmarks in small: a handful of rows each, with the fields, image types and layouts of the real
ones, answers to give, and the scores that these have, by hand."""

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as Picture

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")


class Small(NamedTuple):
    """rows: of the data set `path`; said: an answer a row; scores: lmms-eval's metric → its value on these."""

    path: str
    split: str
    rows: list[dict[str, Any]]
    said: list[str]
    scores: dict[str, float]
    name: str | None = None  # of the data set's configuration


def picture(number: int, mode: str = "RGB") -> Picture.Image:
    return Picture.new("RGB", (20 + number, 16), COLOURS[number % len(COLOURS)]).convert(mode)


def _mmmu(number: int, subject: str, question: str, options: list[str], answer: str, pictures: int) -> dict[str, Any]:
    images = {f"image_{i}": picture(number + i, "RGBA") if i <= pictures else None for i in range(1, 8)}
    return {
        "id": f"validation_{subject}_{number}", "question": question, "options": str(options), "explanation": "",
        **images, "img_type": "['Tables']", "answer": answer, "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if options else "open", "subfield": "any",
    }  # fmt: skip


def _mmstar(index: int, answer: str, category: str, l2_category: str) -> dict[str, Any]:
    question = "Which option describes the picture?\nOptions: A: a dog, B: a cat, C: a cow, D: a horse"
    return {
        "index": index, "question": question, "image": picture(index), "answer": answer, "category": category,
        "l2_category": l2_category, "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"},
    }  # fmt: skip


def _textvqa(number: int, question: str, answers: list[str]) -> dict[str, Any]:
    return {
        "image_id": f"id{number}", "question_id": 34602 + number, "question": question,
        "question_tokens": question.split(), "image": picture(number), "image_width": 20, "image_height": 16,
        "flickr_original_url": "", "answers": answers, "image_classes": ["Phone"], "set_name": "val",
        "ocr_name": ["x"], "ocr_tokens": ["NOKIA"],
    }  # fmt: skip


def _ocr(number: int, dataset: str, kind: str, answer: list[str]) -> dict[str, Any]:
    question = "what is written in the image?"
    return {
        "dataset": dataset,
        "question": question,
        "question_type": kind,
        "answer": answer,
        "image": picture(number, "L"),
    }


def _pope(number: int, image: int, answer: str) -> dict[str, Any]:
    return {
        "id": str(number), "question_id": str(number), "question": "Is there a snowboard in the image?",
        "answer": answer, "image_source": f"COCO_val2014_{image}", "image": picture(image), "category": "adversarial",
    }  # fmt: skip


def _mmvp(index: int, options: str, answer: str) -> dict[str, Any]:
    return {
        "Index": index, "Question": "Is the door open or closed?", "Options": options, "Correct Answer": answer,
        "image": picture(index),
    }  # fmt: skip


def _gqa(number: int, image: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "id": str(number), "imageId": image, "question": question, "answer": answer, "fullAnswer": answer,
        "isBalanced": True, "semanticStr": "select: table",
    }  # fmt: skip


REALWORLD = "Please answer directly with only the letter of the correct option and nothing else."
BENCHMARKS = {
    "gqa": Small(
        "lmms-lab-encoder/GQA",
        "testdev",
        [
            _gqa(1, "n1", "Is it overcast?", "yes"),
            _gqa(2, "n1", "On which side is the car?", "left"),
            _gqa(3, "n2", "What is it?", "car"),
            _gqa(4, "n2", "Which furniture is it?", "chair"),
        ],
        ["Yes.", "left", "a red car", "table"],
        {"exact_match": 2 / 4},  # capitals and the full stop are passed over, an article is not
        "testdev_balanced_instructions",
    ),
    "mmmu_val": Small(
        "lmms-lab-encoder/MMMU",
        "validation",
        [
            _mmmu(1, "Accounting", "In <image 1> and <image 2>, which is due?", ["one", "two", "three"], "B", 2),
            _mmmu(2, "Accounting", "<image 1> What is it?", ["cash", "debt", "stock"], "A", 1),
            _mmmu(3, "Math", "How many in <image 1>?", [], "6", 1),
        ],
        ["B", "The answer is (C).", "So the result is 6."],
        {"mmmu_acc": 0.66667},
    ),
    "ai2d": Small(
        "lmms-lab-encoder/ai2d",
        "test",
        [
            {"question": "What is A?", "options": ["leaf", "stem", "root", "seed"], "answer": "1", "image": picture(1)},
            {"question": "What is B?", "options": ["leaf", "stem", "root", "seed"], "answer": "2", "image": picture(2)},
            {"question": "What is C?", "options": ["leaf", "stem", "root", "seed"], "answer": "2", "image": picture(3)},
        ],
        ["B. stem", "B", "c"],
        {"exact_match": 2 / 3},
    ),
    "mmstar": Small(
        "Lin-Chen/MMStar",
        "val",
        [
            _mmstar(0, "A", "coarse perception", "image emotion"),
            _mmstar(1, "B", "coarse perception", "image emotion"),
            _mmstar(2, "D", "math", "geometry"),
        ],
        ["A", "A", "D"],
        {"average": (1 / 2 + 1) / 2, "coarse perception": 0.5, "math": 1.0},  # mean over the finer categories
    ),
    "textvqa_val": Small(
        "lmms-lab-encoder/textvqa",
        "validation",
        [
            _textvqa(0, "what brand is it?", ["nokia"] * 8 + ["samsung"] * 2),
            _textvqa(1, "what number is it?", ["12"] * 2 + ["13"] * 8),
        ],
        ["Nokia", "12"],
        # Leave one out: the two who said 12 leave one other (1/3), the eight others leave both (2/3): 0.6.
        {"exact_match": (1 + (2 / 3 + 8 * 2 / 3) / 10) / 2},
    ),
    "ocrbench": Small(
        "echo840/OCRBench",
        "test",
        [
            _ocr(0, "IIIT5K", "Regular Text Recognition", ["CENTRE"]),
            _ocr(1, "SROIE", "Key Information Extraction", ["12.50", "12.5"]),
            _ocr(2, "HME100k", "Handwritten Mathematical Expression Recognition", ["a ^ 2"]),
            _ocr(3, "docVQA", "Doc-oriented VQA", ["May"]),
        ],
        ["the word is centre", "Total: 12.5", "a^2", "June"],
        {"ocrbench_accuracy": 3 / 1000},  # points out of 1,000, however many questions there are
    ),
    "realworldqa": Small(
        "lmms-lab-encoder/RealWorldQA",
        "test",
        [
            {"image": picture(0), "question": f"Where?\n\nA. left\nB. right\n{REALWORLD}", "answer": "B"},
            {"image": picture(1), "question": "How many cars? Please answer directly with a number.", "answer": "0"},
            {"image": picture(2), "question": "Uphill or downhill?", "answer": "Downhill"},
        ],
        ["B.", "0", "Uphill"],
        {"exact_match": 2 / 3},
    ),
    "mmvp": Small(
        "lmms-lab-eval/MMVP",
        "train",
        [
            _mmvp(1, "(a) Open (b) Closed", "(a)"),
            _mmvp(2, "(a) Open (b) Closed", "(b)"),
            _mmvp(3, "(a) Left (b) Right", "(a)"),
            _mmvp(4, "(a) Left (b) Right", "(b)"),
        ],
        ["A", "B", "(a) Left", "A"],
        {"mmvp_accuracy": 3 / 4, "mmvp_pair_accuracy": 1 / 2},
    ),
    "pope": Small(
        "lmms-lab-encoder/POPE",
        "test",
        [_pope(1, 0, "yes"), _pope(2, 0, "no"), _pope(3, 1, "no"), _pope(4, 1, "no")],
        ["Yes", "no", "yes", "No."],  # the last: lmms-eval takes the bare word only
        {"pope_accuracy": 2 / 4, "pope_precision": 1 / 2, "pope_recall": 1.0, "pope_f1_score": 2 / 3},
    ),
}


def on_disk(folder: Path, monkeypatch: Any, only: tuple[str, ...] = tuple(BENCHMARKS)) -> None:
    """Write them as parquet files, and have `datasets` find these where lmms-eval asks for the real ones; data sets
    that are not among `only` are as unreachable as without a network."""
    import datasets

    real = datasets.load_dataset
    place: dict[tuple[str, str | None], dict[str, str]] = {}

    def write(path: str, name: str | None, split: str, rows: list[dict[str, Any]]) -> None:
        file = folder / f"{path.replace('/', '-')}-{name}.parquet"
        features = datasets.Dataset.from_list(rows[:1]).features
        for field in features:
            if field.startswith("image_") and field[6:].isdigit():
                features[field] = datasets.Image()
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(file))
        place[path, name] = {split: str(file)}

    for task in only:
        small = BENCHMARKS[task]
        write(small.path, small.name, small.split, small.rows)
    if "gqa" in only:
        images = [{"id": "n1", "image": picture(0)}, {"id": "n2", "image": picture(1)}]
        write(BENCHMARKS["gqa"].path, "testdev_balanced_images", "testdev", images)

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **settings: Any) -> Any:
        if (path, name) not in place:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")
        return real("parquet", data_files=place[path, name], split=split, cache_dir=str(folder / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
