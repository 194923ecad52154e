"""LLaVA's conversation format: a JSON file and a folder of pictures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from keepsight.images import resolve_image
from keepsight.training.conversations import (
    Conversation,
    ConversationError,
    Message,
    check_all,
    check_image_count,
    check_turns,
    split_placeholders,
)

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class LlavaConversations:
    """LLaVA's format: a JSON list (or JSON lines) of `id`, `image`, `conversations`, and a folder of pictures.

    `image` is a path relative to the folder, a list of them, or absent; `conversations` is a list of
    `{"from": "human" | "gpt", "value": ...}` with one `<image>` placeholder for each picture, anywhere in the
    questions. An id may come more than once (LLaVA's own data repeats them). Every entry is checked here, the
    pictures' paths included; the pictures are decoded later.

    Args:
        skip_broken: leave out entries whose picture cannot be used, and list them in `broken`.

    Raises:
        FileNotFoundError: if the file or the folder is not there.
        ConversationError: naming the entries that cannot be used, and why.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None, *, skip_broken: bool = False) -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder) if image_folder is not None else None
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise FileNotFoundError(f"the image folder '{image_folder}' does not exist or is not a folder.")
        self.entries = _read_entries(self.path)
        named = sum(bool(entry.get("image")) for entry in self.entries if isinstance(entry, dict))
        if named and self.image_folder is None:  # not broken pictures, which skip_broken would leave out
            raise ConversationError(
                f"{named} of {len(self.entries)} entries in '{path}' name pictures, but no image folder was given; set "
                "`data.image_folder` (--data.image-folder DIR)."
            )
        self.trimmed: Counter[str] = Counter()
        self.pictures = 0
        self.broken = check_all(self.entries, f"'{path}'", self._check, self.name, skip_broken)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Conversation:
        entry = self.entries[index]
        references = _references(entry)
        images = tuple((reference, resolve_image(reference, self.image_folder)) for reference in references)
        return Conversation(self.name(index), self._messages(entry, Counter()), images)

    def name(self, index: int) -> str:
        """What errors call this entry."""
        entry = self.entries[index]
        return f"entry {index}" + (f" (id {entry['id']!r})" if isinstance(entry, dict) and "id" in entry else "")

    def _check(self, entry: Any) -> None:
        if not isinstance(entry, dict):
            raise ConversationError(f"it is {type(entry).__name__}; allowed: an object with `conversations`")
        references = _references(entry)
        check_image_count(self._messages(entry, self.trimmed), len(references))
        for reference in references:
            resolve_image(reference, self.image_folder)
        self.pictures += len(references)

    @staticmethod
    def _messages(entry: dict[str, Any], trimmed: Counter[str]) -> list[Message]:
        turns = entry.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise ConversationError(f"`conversations` is {turns!r:.40}; it must be a list of turns, and not empty")
        messages = []
        for position, turn in enumerate(turns):
            speaker = turn.get("from") if isinstance(turn, dict) else None
            allowed = ("human", "gpt", "system") if position == 0 else ("human", "gpt")
            if speaker is None or speaker not in allowed:
                raise ConversationError(
                    f"turn {position + 1} has from={speaker!r}; allowed: 'human' and 'gpt' "
                    "(and 'system' in the first turn)"
                )
            if not isinstance(turn.get("value"), str):
                raise ConversationError(f"turn {position + 1} has value={turn.get('value')!r:.40}; it must be a string")
            messages.append({"role": ROLES[speaker], "content": split_placeholders(turn["value"])})
        return check_turns(messages, trimmed)


def _references(entry: dict[str, Any]) -> list[str]:
    image = entry.get("image")
    references = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise ConversationError(f"`image` is {image!r:.80}; allowed: a path, a list of paths, or nothing")
    return references


def _read_entries(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"the conversation file '{path}' does not exist.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise ConversationError(f"'{path}' is not UTF-8 text ({cause.reason}); save it as UTF-8") from cause
    try:
        if path.suffix.lower() == ".jsonl":
            # Not splitlines: JSON allows other line separators, such as U+2028, inside its strings.
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
    except json.JSONDecodeError as cause:
        raise ConversationError(f"'{path}' is not valid JSON ({cause}); is the file whole?") from cause
    if not isinstance(entries, list) or not entries:
        what = "no entries" if isinstance(entries, list) else f"a {type(entries).__name__}"
        raise ConversationError(f"'{path}' holds {what}, so nothing to train on; a list of entries is needed")
    return entries
