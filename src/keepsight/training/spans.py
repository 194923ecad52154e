"""Which tokens are the assistant's: found in the chat template's text, carried over to the expanded ids.

Ours; no family is named. The template is rendered up to each answer and again up to its end; both must be prefixes
of the whole text, and what lies between is the answer with its end of turn. A processor then replaces each image
placeholder by a run of tokens with markers around it, so the answers are looked up again segment by segment.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Span = tuple[int, int]


class TemplateError(ValueError):
    """A chat template, tokenizer or processor whose answers cannot be located."""


def assistant_spans(processor: Any, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
    """The rendered text and, for each answer, its characters from after the prompt to its end of turn.

    White space after the end of turn is not part of the span: nothing is generated there.

    Raises:
        TemplateError: if the template refuses the messages, or if what it writes for a turn depends on later turns.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    befores = _render(processor, [messages[:index] for index in answers], True)
    *throughs, text = _render(processor, [*(messages[: index + 1] for index in answers), messages], False)
    spans = []
    for number, (before, through) in enumerate(zip(befores, throughs, strict=True), start=1):
        if not through.startswith(before) or not text.startswith(through):
            raise TemplateError(
                "the chat template is not prefix-stable: what it writes up to answer "
                f"{number} changes with what follows, so the answer's tokens cannot be told apart. Got "
                f"{before[-60:]!r} then {through[-60:]!r}. Pass a template that renders each turn by itself."
            )
        end = len(through.rstrip())
        if end <= len(before):
            raise TemplateError(f"the chat template writes nothing for answer {number}.")
        spans.append((len(before), end))
    return text, spans


def _render(
    processor: Any, conversations: Sequence[Sequence[dict[str, Any]]], add_generation_prompt: bool
) -> list[str]:
    """The template's text of each conversation, in one call: the call costs more than a rendering."""
    try:
        return processor.apply_chat_template(
            [list(messages) for messages in conversations],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except ImportError:
        raise
    except Exception as cause:  # templates raise whatever their author chose
        raise TemplateError(
            f"the chat template of {type(processor).__name__} refuses the messages "
            f"({type(cause).__name__}: {cause}). Roles: {[message['role'] for message in conversations[-1]]}."
        ) from cause


def image_markers(processor: Any) -> dict[int, str]:
    """Added tokens that the chat template writes for a picture, id → token: the placeholder and what frames it.

    Raises:
        TemplateError: if the template writes none.
    """
    tokenizer = processor.tokenizer
    text_part = {"type": "text", "text": "a"}
    contents = ([{"type": "image"}, text_part], [text_part])
    with_image, without = _render(processor, [[{"role": "user", "content": content}] for content in contents], False)
    extra = Counter(tokenizer(with_image).input_ids) - Counter(tokenizer(without).input_ids)
    added = {index: token for token, index in tokenizer.get_added_vocab().items()}
    markers = {index: added[index] for index in extra if index in added}
    if not markers:
        raise TemplateError(
            f"the chat template of {type(processor).__name__} writes no image token for a picture; it wrote "
            f"{with_image!r}. A template that renders content parts of type 'image' is needed."
        )
    return markers


def overlapping(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens share a character with a span; tokens without characters never do."""
    return [any(start < end_ and end > start_ for start_, end_ in spans) for start, end in offsets]


def carry_over(
    plain: Sequence[int], labelled: Sequence[bool], markers: frozenset[int], expanded: Sequence[int]
) -> list[bool]:
    """Which tokens of `expanded` are the labelled ones of `plain`.

    `plain` is the text with one placeholder for a picture, `expanded` the same with placeholders replaced. Between
    two placeholders both hold the same ids, except that the first and the last of a segment may have merged with
    the picture's frame (line breaks do). Each segment with labels is matched from left to right; the last one ends
    where `expanded` ends.

    Raises:
        TemplateError: if a segment with labels is not found.
    """
    result = [False] * len(expanded)
    position = 0
    for start, end in _segments(plain, markers):
        if not any(labelled[start:end]):
            continue
        opens, closes = start == 0, end == len(plain)
        # First the whole segment, then without the tokens that touch a picture.
        for left, right in ((0, 0), (0 if opens else 1, 0 if closes else 1)):
            needle = list(plain[start + left : end - right])
            if opens:
                found = 0 if list(expanded[: len(needle)]) == needle else -1
            elif closes:
                found = len(expanded) - len(needle)
                found = found if found >= position and list(expanded[found:]) == needle else -1
            else:
                found = _find(expanded, needle, position)
            if found >= 0 and any(labelled[start + left : end - right]):
                break
        else:
            raise TemplateError(
                "an answer's tokens were not found after the processor expanded the pictures: "
                f"{list(plain[start:end])[:20]} is not in its ids. Please report the processor's name."
            )
        result[found : found + len(needle)] = labelled[start + left : end - right]
        position = found + len(needle)
    return result


def _segments(ids: Sequence[int], markers: frozenset[int]) -> list[Span]:
    """Stretches of ids without markers, as (start, end)."""
    bounds = [-1, *(index for index, token in enumerate(ids) if token in markers), len(ids)]
    return [(left + 1, right) for left, right in pairwise(bounds) if left + 1 < right]


def _find(haystack: Sequence[int], needle: Sequence[int], start: int) -> int:
    for index in range(start, len(haystack) - len(needle) + 1):
        if haystack[index] == needle[0] and list(haystack[index : index + len(needle)]) == list(needle):
            return index
    return -1
