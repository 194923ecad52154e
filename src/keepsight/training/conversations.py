"""What a training conversation is, and when it can be used: one cheap pass over the data finds every fault.

Both formats (`llava_json`, `hub_dataset`) give the same thing: chat messages whose `content` is a list of
`{"type": "image"}` and `{"type": "text", "text": ...}` parts, and the pictures in the order of their places.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from keepsight.images import ImageError

PLACEHOLDER = "<image>"
SHOWN = 10  # faults written out in one error

Message = dict[str, Any]
ImageSource = Path | bytes | Image.Image


class ConversationError(ValueError):
    """Training data that cannot be used as it is."""


@dataclass(frozen=True)
class Conversation:
    """One training sample.

    Attributes:
        name: what errors call it, such as "entry 17 (id 'coco-42')".
        messages: chat messages with content lists, ending with an assistant's turn.
        images: one source for each image part, in order, with its name.
    """

    name: str
    messages: list[Message]
    images: tuple[tuple[str, ImageSource], ...]


class ConversationSource(Protocol):
    """A checked collection of conversations.

    Attributes:
        pictures: how many the usable entries have in all.
        trimmed: what was shortened, by reason. broken: why entries cannot be used.
    """

    pictures: int
    trimmed: Counter[str]
    broken: dict[int, str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def __getitem__(self, index: int) -> Conversation: ...


def split_placeholders(text: str) -> list[Message]:
    """Text with `<image>` in it → content parts in order.

    Line breaks next to a placeholder are dropped: LLaVA's data writes one there, and so does every chat template
    that wants one. Text parts that end up empty are left out.
    """
    pieces = text.split(PLACEHOLDER)
    parts: list[Message] = []
    for position, piece in enumerate(pieces):
        if position > 0:
            parts.append({"type": "image"})
            piece = piece.lstrip("\n")
        if position < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def count_images(messages: Iterable[Message]) -> int:
    """Number of image parts in chat messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def check_turns(messages: list[Message], trimmed: Counter[str]) -> list[Message]:
    """Messages that alternate user and assistant, after an optional system message, and end with an answer.

    An opening answer or a closing question, which some public sets have, is left out and counted.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    if turns and turns[0]["role"] == "assistant":
        if count_images(turns[:1]):
            raise ConversationError("the first turn is an answer and holds an image")
        turns = turns[1:]
        trimmed["opening answers"] += 1
    if turns and turns[-1]["role"] == "user":
        if count_images(turns[-1:]):
            raise ConversationError("the last turn is a question, which nothing answers, and holds an image")
        turns = turns[:-1]
        trimmed["closing questions"] += 1
    if not turns:
        raise ConversationError("the conversation is empty: no question followed by an answer")
    for position, message in enumerate(turns):
        wanted = "user" if position % 2 == 0 else "assistant"
        if message["role"] != wanted:
            raise ConversationError(
                f"turn {position + 1} is the {message['role']}'s where the {wanted}'s is due; "
                "questions and answers must alternate"
            )
        if wanted == "assistant":
            if count_images([message]):
                raise ConversationError(f"turn {position + 1} is an answer and holds an image; images go in questions")
            if not "".join(part["text"] for part in message["content"]).strip():
                raise ConversationError(f"turn {position + 1} is an empty answer")
    for position, message in enumerate(system + turns):
        for part in message["content"]:
            try:
                part.get("text", "").encode()
            except UnicodeEncodeError as cause:  # "\ud83d" alone, which JSON can write
                raise ConversationError(
                    f"turn {position + 1} holds half a character ({cause.object[cause.start]!r}), which no tokenizer "
                    "takes; write the whole one"
                ) from cause
    return system + turns


def check_image_count(messages: list[Message], images: int) -> None:
    places = count_images(messages)
    if places != images:
        raise ConversationError(
            f"{places} {PLACEHOLDER} placeholder{'s' * (places != 1)} for {images} image{'s' * (images != 1)}; "
            "give one placeholder for each image"
        )


def _report(faults: list[str], total: int, where: str, advice: str) -> str:
    more = f"\n  … and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    shown = "\n  ".join(faults[:SHOWN])
    return f"{len(faults)} of {total} entries in {where} cannot be used:\n  {shown}{more}\n{advice}"


def check_all(
    entries: Iterable[Any], where: str, check: Callable[[Any], None], name: Callable[[int], str], skip_broken: bool
) -> dict[int, str]:
    """Run `check` on every entry; raise one error that lists the faults, or return the broken pictures to skip."""
    faults: list[str] = []
    broken: dict[int, str] = {}
    total = 0
    for index, entry in enumerate(entries):
        total += 1
        try:
            check(entry)
        except ImageError as error:
            broken[index] = f"{name(index)}: {error}"
        except ConversationError as error:
            faults.append(f"{name(index)}: {error}")
    if faults:
        raise ConversationError(_report(faults, total, where, "Correct or remove these entries."))
    if broken and not skip_broken:
        advice = "Correct or remove these entries, or pass --skip-broken to leave them out and count them."
        raise ConversationError(_report(list(broken.values()), total, where, advice))
    if len(broken) == total:
        raise ConversationError(_report(list(broken.values()), total, where, "No entry is left to train on."))
    return broken
