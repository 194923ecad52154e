"""The data set: order, skipping with a count, the cache, and loader processes."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from keepsight.images import ImageError
from keepsight.training.collator import Collator
from keepsight.training.conversations import ConversationError
from keepsight.training.data import ConversationDataset
from keepsight.training.encode import CutError, Encoder
from keepsight.training.llava_json import LlavaConversations
from tests.training.test_conversations import entry, write


def dataset(tmp_path: Path, pictures: Path, llava, *entries, max_length=None, skip_broken=False, **more):
    source = LlavaConversations(write(tmp_path, *entries), pictures, skip_broken=skip_broken)
    return ConversationDataset(source, Encoder(llava, max_length), skip_broken=skip_broken, **more)


RED = entry("<image>", "red", image="red.png")
BLUE = entry("<image>", "blue", image="blue.png")


@pytest.fixture
def broken(pictures: Path) -> dict:
    whole = (pictures / "wide.png").read_bytes()
    (pictures / "broken.png").write_bytes(whole[: len(whole) // 2])
    return entry("<image>", "circle", image="broken.png", id="b")


def answers(data, llava) -> list[str]:
    rows = [data[index].sequence["labels"] for index in range(len(data))]
    return [llava.tokenizer.decode(row[row != -100][:1]) for row in rows]


def test_order_is_the_sources(tmp_path, pictures, llava) -> None:
    data = dataset(tmp_path, pictures, llava, RED, BLUE, entry("hello", "world"))
    assert answers(data, llava) == ["red", "blue", "world"]
    assert data.skipped() == {}


def test_a_broken_picture_stops_with_its_name(tmp_path, pictures, llava, broken) -> None:
    data = dataset(tmp_path, pictures, llava, RED, broken)
    with pytest.raises(ImageError, match=r"entry 1 \(id 'b'\): image 'broken.png' cannot be read"):
        data[1]


def test_a_broken_picture_is_skipped_and_counted(tmp_path, pictures, llava, broken) -> None:
    gone = entry("<image>", "?", image="gone.png")
    data = dataset(tmp_path, pictures, llava, broken, RED, gone, BLUE, skip_broken=True)
    assert len(data) == 3  # the missing one is known before training
    assert answers(data, llava) == ["red", "red", "blue"]  # the next intact entry takes the broken one's place
    assert data.skipped() == {"unreadable image": 2}
    assert data.skipped_names()[0] == "entry 0 (id 'b')"
    assert "gone.png' is missing" in data.skipped_names()[1]


def test_nothing_intact(tmp_path, pictures, llava, broken) -> None:
    data = dataset(tmp_path, pictures, llava, broken, broken, skip_broken=True)
    with pytest.raises(ConversationError, match=r"none of the 2 entries can be used \(unreadable image: 2\)"):
        data[0]


def test_pictures_cut_by_max_length(tmp_path, pictures, llava) -> None:
    late = entry("what is it ? " * 3 + "<image>", "blue", image="blue.png", id="late")
    with pytest.raises(CutError, match=r"entry 0 \(id 'late'\): it has 2\d tokens and max_length is 16"):
        dataset(tmp_path, pictures, llava, late, max_length=16)[0]
    long = entry("hello", "world " * 20)
    data = dataset(tmp_path, pictures, llava, late, RED, long, max_length=16, skip_broken=True)
    assert answers(data, llava) == ["red", "red", "world"]
    assert data[2].sequence["input_ids"].numel() == 16
    assert data.skipped() == {"image cut off by max_length": 1, "text shortened to max_length": 1}


def test_cache_returns_the_same_and_keeps_its_size(tmp_path, pictures, llava) -> None:
    data = dataset(tmp_path, pictures, llava, RED, BLUE, cache_megabytes=1)
    first = data[0]
    assert data[0] is first
    plain = dataset(tmp_path, pictures, llava, RED, BLUE)
    assert plain[0] is not plain[0]
    assert torch.equal(plain[0].media["pixel_values"], first.media["pixel_values"])
    data._room = 0
    assert data[1] is not data[1]


def test_loader_processes_report_what_they_skip(tmp_path, pictures, llava, broken) -> None:
    data = dataset(tmp_path, pictures, llava, RED, broken, BLUE, RED, skip_broken=True)
    collator = Collator(llava)
    theirs = list(DataLoader(data, batch_size=2, collate_fn=collator, num_workers=2))
    assert data.skipped() == {"unreadable image": 1}  # found by another process
    for batch, ours in zip(theirs, DataLoader(data, batch_size=2, collate_fn=collator), strict=True):
        assert all(torch.equal(batch[name], ours[name]) for name in ours)


def test_the_file_is_read_as_utf8(tmp_path, llava) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(json.dumps([entry("héllo", "wörld")], ensure_ascii=False).encode("utf-8"))
    assert LlavaConversations(path)[0].messages[0]["content"][0]["text"] == "héllo"


def test_a_picture_that_the_processor_refuses_is_broken_too(tmp_path, pictures, llava, monkeypatch) -> None:
    given = type(llava).__call__

    def refuse(self, images=None, **more):
        flat = [image for one in images or [] for image in (one if isinstance(one, list) else [one])]
        if any(image.width > 2 * image.height for image in flat):
            raise ValueError("aspect ratio must be smaller than 2")
        return given(self, images=images, **more)

    monkeypatch.setattr(type(llava), "__call__", refuse)
    wide = entry("<image> and <image>", "circle", image=["red.png", "wide.png"], id="w")
    with pytest.raises(
        ImageError,
        match=r"entry 1 \(id 'w'\): image 'wide.png' of 48 × 16 pixels is refused by the model's processor "
        r"\(ValueError: aspect ratio must be smaller than 2\)",
    ):
        dataset(tmp_path, pictures, llava, RED, wide)[1]
    data = dataset(tmp_path, pictures, llava, RED, wide, BLUE, skip_broken=True)
    assert answers(data, llava) == ["red", "blue", "blue"]
    assert data.skipped() == {"unreadable image": 1}
