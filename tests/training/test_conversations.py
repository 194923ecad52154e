"""Both formats give the same messages; every fault is named before training starts."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from keepsight.images import open_image
from keepsight.training.conversations import ConversationError, split_placeholders
from keepsight.training.data import load_source
from keepsight.training.hub_dataset import HubConversations
from keepsight.training.llava_json import LlavaConversations
from tests.tiny_processors import text

IMAGE = {"type": "image"}


def write(folder: Path, *entries: object) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def entry(*values: str, image: object = None, **more: object) -> dict:
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]
    return {"id": "a", "conversations": conversations, **({"image": image} if image is not None else {}), **more}


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nwhat ?", [IMAGE, text("what ?")]),
        ("what ?\n<image>", [text("what ?"), IMAGE]),
        ("<image><image>", [IMAGE, IMAGE]),
        ("is <image> like\n<image>?", [text("is "), IMAGE, text(" like"), IMAGE, text("?")]),
        ("\nhello\n", [text("\nhello\n")]),
    ],
)
def test_split_placeholders(value: str, parts: list) -> None:
    assert split_placeholders(value) == parts


def test_llava_json(tmp_path: Path, pictures: Path) -> None:
    path = write(
        tmp_path,
        entry("<image>\nwhat ?", "red", "and shape ?", "circle", image="red.png"),
        entry("<image> and <image>", "blue", image=["red.png", "blue.png"]),
        entry("hello", "world"),
    )
    data = LlavaConversations(path, pictures)
    assert len(data) == 3
    first = data[0]
    assert first.name == "entry 0 (id 'a')"
    assert [message["role"] for message in first.messages] == ["user", "assistant"] * 2
    assert first.messages[0]["content"] == [IMAGE, text("what ?")]
    assert first.images == (("red.png", pictures / "red.png"),)
    assert [name for name, _ in data[1].images] == ["red.png", "blue.png"]
    assert data[2].images == ()
    assert data.trimmed == Counter()


def test_json_lines_and_system_turn(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    system = {"from": "system", "value": "be brief"}
    rows = [entry("hello", "world"), {"conversations": [system, *entry("what ?", "red")["conversations"]]}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    data = LlavaConversations(path)
    assert [message["role"] for message in data[1].messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.JSONL"])
def test_json_lines_with_other_separators_in_strings_and_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    rows = [entry("hello\u2028there", "world"), entry("what\x85 ?", "red")]
    text_ = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_text(text_, encoding="utf-8-sig", newline="")
    data = LlavaConversations(tmp_path / name)
    assert [data[i].messages[0]["content"][0]["text"] for i in range(2)] == ["hello\u2028there", "what\x85 ?"]


def test_loose_ends_are_left_out_and_counted(tmp_path: Path) -> None:
    loose = {"conversations": [{"from": "gpt", "value": "hi"}, *entry("hello", "world", "and ?")["conversations"]]}
    data = LlavaConversations(write(tmp_path, loose))
    assert [message["content"][0]["text"] for message in data[0].messages] == ["hello", "world"]
    assert data.trimmed == {"opening answers": 1, "closing questions": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("<image> <image>", "red", image="red.png"), r"2 <image> placeholders for 1 image;"),
        (entry("what ?", "red", image="red.png"), r"0 <image> placeholders for 1 image;"),
        (entry("<image>", "red"), r"1 <image> placeholder for 0 images;"),
        (entry("what ?", "<image>", image="red.png"), "turn 2 is an answer and holds an image"),
        (entry("what ?", " "), "turn 2 is an empty answer"),
        (
            {"id": 3, "conversations": []},
            r"\(id 3\): `conversations` is \[\]; it must be a list of turns",
        ),
        ({"conversations": [{"from": "user", "value": "a"}]}, "from='user'; allowed: 'human' and 'gpt'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "value=3; it must be a string"),
        (entry("only a question"), "empty: no question followed by an answer"),
        (entry("half \ud83d ?", "b"), r"turn 1 holds half a character \('\\ud83d'\), which no tokenizer takes"),
        (entry("<image>", "red", image="a\0/b.png"), r"image 'a\\x00/b.png' can be no file's path \(embedded null"),
        (entry("<image>", "red", image="\ud83d/b.png"), r"image '\\ud83d/b.png' can be no file's path"),
        (entry("a", "b", image=7), "`image` is 7; allowed: a path, a list of paths, or nothing"),
        ("text", "it is str; allowed: an object"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "human", "value": "b"},
                    {"from": "gpt", "value": "c"},
                ]
            },
            "turn 2 is the user's where the assistant's is due",
        ),
        (entry("<image>", "red", image="gone.png"), r"image 'gone.png' is missing: .*--skip-broken"),
        (entry("<image>", "red", image="../outside.png"), "leaves the image folder"),
        (entry("<image>", "red", image="/etc/passwd"), "leaves the image folder"),
        (
            entry("<image>", "red", image="https://example.org/a.png"),
            "is a URL; pictures are read from local",
        ),
        (entry("<image>", "red", image="link.png"), "leaves the image folder"),
    ],
)
def test_faults_are_named(tmp_path: Path, pictures: Path, bad: object, message: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", pictures / "link.png")
    path = write(tmp_path, entry("<image>", "red", image="red.png"), bad)
    with pytest.raises(ConversationError, match=rf"(?s)1 of 2 entries in .*entry 1.*{message}"):
        LlavaConversations(path, pictures)


def test_only_ten_faults_are_written_out(tmp_path: Path) -> None:
    path = write(tmp_path, *[entry("what ?", "")] * 15)
    with pytest.raises(ConversationError, match=r"(?s)15 of 15 .*entry 9 .*… and 5 more") as error:
        LlavaConversations(path)
    assert "entry 10 " not in str(error.value)


def test_skip_broken_leaves_out_missing_pictures_but_not_faulty_json(tmp_path: Path, pictures: Path) -> None:
    good, gone = entry("<image>", "red", image="red.png"), entry("<image>", "red", image="gone.png")
    data = LlavaConversations(write(tmp_path, good, gone, good), pictures, skip_broken=True)
    assert list(data.broken) == [1]
    assert "image 'gone.png' is missing" in data.broken[1]
    with pytest.raises(ConversationError, match="1 of 2 entries"):
        LlavaConversations(write(tmp_path, good, entry("<image>", "red")), pictures, skip_broken=True)
    with pytest.raises(
        ConversationError, match=r"1 of 2 entries in .* name pictures, but no image folder was given; set"
    ):
        LlavaConversations(write(tmp_path, good, entry("hello", "world")), skip_broken=True)
    with pytest.raises(ConversationError, match="No entry is left to train on"):
        LlavaConversations(write(tmp_path, gone), pictures, skip_broken=True)


def test_files_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"conversation file '.*none.json' does not exist"):
        LlavaConversations(tmp_path / "none.json")
    path = write(tmp_path, entry("hello", "world"))
    with pytest.raises(FileNotFoundError, match=r"image folder .* does not exist"):
        LlavaConversations(path, tmp_path / "nowhere")
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ConversationError, match=r"is not valid JSON .*is the file whole"):
        LlavaConversations(path)
    path.write_text("[]", encoding="utf-16")
    with pytest.raises(ConversationError, match=r"data.json' is not UTF-8 text .* save it as UTF-8"):
        LlavaConversations(path)
    path.write_text("[]")
    with pytest.raises(ConversationError, match="holds no entries, so nothing to train on"):
        LlavaConversations(path)
    path.write_text("{}")
    with pytest.raises(ConversationError, match="holds a dict, so nothing to train on; a list of entries is needed"):
        LlavaConversations(path)


def test_hub_dataset_saved_and_loaded(tmp_path: Path, pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = [{"type": "text", "text": "what ?"}, {"type": "image", "text": None}]
    rows = {
        "messages": [
            [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
            [
                {"role": "user", "content": [{"type": "text", "text": "hello"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "world"}]},
            ],
        ],
        "images": [[str(pictures / "red.png")], []],
    }
    string = datasets.Value("string")
    message = {"role": string, "content": datasets.List({"type": string, "text": string})}
    features = datasets.Features({"messages": datasets.List(message), "images": datasets.List(datasets.Image())})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    source = load_source(dataset=str(tmp_path / "saved"), image_folder=pictures)
    assert source[0].messages == [
        {"role": "user", "content": [text("what ?"), IMAGE]},
        {"role": "assistant", "content": [text("red")]},
    ]
    ((name, picture),) = source[0].images
    assert open_image(picture, name).getpixel((0, 0)) == (255, 0, 0)
    assert source[1].images == ()


@pytest.mark.parametrize("feature", ["picture", "path"])
def test_hub_dataset_with_one_picture_a_row(pictures: Path, feature: str) -> None:
    datasets = pytest.importorskip("datasets")
    asked = [{"role": "user", "content": "<image> what ?"}, {"role": "assistant", "content": "red"}]
    bare = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    path = "red.png" if feature == "path" else str(pictures / "red.png")
    dataset = datasets.Dataset.from_dict({"messages": [asked, bare], "images": [path, None]})
    if feature == "picture":
        dataset = dataset.cast_column("images", datasets.Image())
    data = HubConversations(dataset, pictures)
    ((name, picture),) = data[0].images
    assert open_image(picture, name).getpixel((0, 0)) == (255, 0, 0)
    assert data[1].images == ()


def test_hub_rows_with_string_contents(pictures: Path) -> None:
    red = Image.open(pictures / "red.png")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>\nwhat ?"}, {"role": "assistant", "content": "red"}],
            "images": [red],
        }
    ]
    data = HubConversations(rows)
    assert data[0].messages[0]["content"] == [IMAGE, text("what ?")]
    with pytest.raises(ConversationError, match=r"1 <image> placeholder for 2 images"):
        HubConversations([{**rows[0], "images": [red, red]}])
    with pytest.raises(ConversationError, match="role='tool'; allowed: 'user' and 'assistant'"):
        HubConversations([{"messages": [{"role": "tool", "content": "a"}]}])
    with pytest.raises(ConversationError, match="carries its picture itself"):
        HubConversations([{"messages": [{"role": "user", "content": [{"type": "image", "url": "http://a"}]}]}])


def test_load_source_needs_exactly_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exactly one of `conversations` \(got None\) and `dataset` \(got None\)"):
        load_source()
    with pytest.raises(FileNotFoundError, match="data set '/no/such/folder' does not exist"):
        load_source(dataset="/no/such/folder")


def test_data_sets_that_cannot_be_loaded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    saved, empty, file = tmp_path / "saved", tmp_path / "empty", write(tmp_path, entry("hello", "world"))
    datasets.Dataset.from_dict({"messages": ["a"]}).save_to_disk(saved)
    with pytest.raises(ValueError, match=r"was saved without splits, so it has no 'val'; leave data\.split out"):
        load_source(dataset=str(saved), split="val")
    cut = next(saved.glob("*.arrow"))
    cut.write_bytes(cut.read_bytes()[:100])
    empty.mkdir()
    for path in (str(saved), str(empty), str(file), "nobody/nothing"):
        with pytest.raises(ValueError, match=rf"the data set '{re.escape(path)}' cannot be loaded \(.*a hub id"):
            load_source(dataset=path)
