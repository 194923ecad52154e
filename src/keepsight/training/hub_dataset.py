"""HuggingFace data sets with chat `messages` and `images`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from keepsight.images import ImageError, resolve_image
from keepsight.training.conversations import (
    Conversation,
    ConversationError,
    ImageSource,
    Message,
    check_all,
    check_image_count,
    check_turns,
    split_placeholders,
)


class HubConversations:
    """A HuggingFace data set with `messages`, and `images` where there are any.

    `images` holds a list of pictures or paths in each row, or one of them.

    A message has a `role` (system, user or assistant) and a `content`: a string, with `<image>` where a picture
    goes, or a list of image and text parts. Pictures are decoded when an entry is read, not here.

    Args:
        dataset: a `datasets.Dataset`, or any sequence of such dicts.
        image_folder: where pictures given by path lie; pictures held in the data set need none.

    Raises:
        ConversationError: naming the entries that cannot be used, and why.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]] | Any,
        image_folder: str | Path | None = None,
        *,
        skip_broken: bool = False,
        where: str = "the data set",
    ) -> None:
        self.image_folder = Path(image_folder) if image_folder is not None else None
        columns = getattr(dataset, "column_names", None)
        if columns is not None and "messages" not in columns:
            raise ConversationError(f"{where} has the columns {columns}; `messages` is needed (and `images`).")
        self.dataset = _undecoded(dataset)
        if len(self.dataset) == 0:
            raise ConversationError(f"{where} is empty: there is nothing to train on.")
        self.trimmed: Counter[str] = Counter()
        self.pictures = 0
        self.broken = check_all(_light_entries(self.dataset), where, self._check, self.name, skip_broken)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Conversation:
        entry = self.dataset[index]
        images = tuple(self._source(image, number) for number, image in enumerate(_images(entry)))
        return Conversation(self.name(index), self._messages(entry, Counter()), images)

    def name(self, index: int) -> str:
        """What errors call this entry."""
        return f"entry {index}"

    def _check(self, entry: dict[str, Any]) -> None:
        images = _images(entry)
        check_image_count(self._messages(entry, self.trimmed), len(images))
        for number, image in enumerate(images):
            self._source(image, number)
        self.pictures += len(images)

    def _source(self, image: Any, number: int) -> tuple[str, ImageSource]:
        if isinstance(image, dict):
            name = image.get("path") or f"image {number}"
            return (name, image["bytes"]) if image.get("bytes") else (name, resolve_image(name, self.image_folder))
        if isinstance(image, str):
            return image, resolve_image(image, self.image_folder)
        if isinstance(image, Image.Image):
            return f"image {number}", image
        raise ImageError(f"image {number} is {type(image).__name__}; allowed: pictures, their bytes, or paths")

    @staticmethod
    def _messages(entry: dict[str, Any], trimmed: Counter[str]) -> list[Message]:
        given = entry.get("messages")
        if not isinstance(given, list) or not given:
            raise ConversationError(f"`messages` is {given!r:.40}; it must be a list of messages, and not empty")
        messages = []
        for position, message in enumerate(given):
            role = message.get("role") if isinstance(message, dict) else None
            allowed = ("user", "assistant", "system") if position == 0 else ("user", "assistant")
            if role not in allowed:
                raise ConversationError(
                    f"message {position + 1} has role={role!r}; allowed: 'user' and 'assistant' "
                    "(and 'system' in the first message)"
                )
            messages.append({"role": role, "content": content_parts(message.get("content"))})
        return check_turns(messages, trimmed)


def _images(entry: dict[str, Any]) -> Sequence[Any]:
    """The pictures of an entry, which holds a list of them, one, or none."""
    given = entry.get("images")
    if not given:
        return []
    return given if isinstance(given, list | tuple) else [given]


def _undecoded(dataset: Any) -> Any:
    """The data set with its pictures as bytes or paths, so that the check decodes none of them."""
    if "images" not in (getattr(dataset, "column_names", None) or []) or not hasattr(dataset, "cast_column"):
        return dataset
    from datasets import Image as ImageFeature
    from datasets import List

    feature = dataset.features["images"]
    if isinstance(feature, ImageFeature):
        return dataset.cast_column("images", ImageFeature(decode=False))
    if isinstance(getattr(feature, "feature", None), ImageFeature):
        return dataset.cast_column("images", List(ImageFeature(decode=False)))
    return dataset


def _light_entries(dataset: Any, chunk: int = 1000) -> Iterator[dict[str, Any]]:
    """The entries with `True` for a picture's bytes, so that checking a large data set does not read its pictures."""
    if not hasattr(dataset, "with_format"):
        yield from dataset
        return
    for table in dataset.with_format("arrow").iter(batch_size=chunk):
        messages = table.column("messages").to_pylist()
        images: list[Any] = [None] * len(messages)
        if "images" in table.column_names:
            column = table.column("images").combine_chunks()
            if hasattr(column, "value_lengths"):
                flat = _light_pictures(column.flatten())
                lengths = [length or 0 for length in column.value_lengths().to_pylist()]
                ends = list(accumulate(lengths))
                images = [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
            else:
                images = _light_pictures(column)
        yield from ({"messages": m, "images": i} for m, i in zip(messages, images, strict=True))


def _light_pictures(values: Any) -> list[Any]:
    """An arrow array of pictures, their bytes replaced by `True`, or of paths."""
    if not hasattr(values.type, "names") or not {"bytes", "path"} <= set(values.type.names):
        return values.to_pylist()
    held = values.field("bytes").is_valid().to_pylist()
    whole = values.is_valid().to_pylist()
    paths = values.field("path").to_pylist()
    return [{"bytes": b, "path": p} if w else None for w, b, p in zip(whole, held, paths, strict=True)]


def content_parts(content: Any) -> list[Message]:
    """A message's `content`, a string or a list of parts, as a list of image and text parts."""
    if isinstance(content, str):
        return split_placeholders(content)
    if not isinstance(content, list):
        raise ConversationError(f"content is {type(content).__name__}; allowed: a string or a list of parts")
    parts: list[Message] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            if any(part.get(key) is not None for key in ("url", "path", "image", "base64")):
                raise ConversationError(
                    "an image part carries its picture itself; put the picture in the entry's `images` instead"
                )
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ConversationError(
                f'content part {part!r:.80}; allowed: {{"type": "image"}} and {{"type": "text", "text": ...}}'
            )
    return parts
