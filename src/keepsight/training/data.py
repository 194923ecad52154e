"""The training data set: checked conversations, encoded when they are asked for."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from keepsight.errors import reason
from keepsight.images import ImageError
from keepsight.training.conversations import ConversationError, ConversationSource
from keepsight.training.encode import CutError, Encoded, Encoder, Prepare
from keepsight.training.hub_dataset import HubConversations
from keepsight.training.llava_json import LlavaConversations

INTACT, BROKEN_IMAGE, CUT_IMAGE, SHORTENED = 0, 1, 2, 3


class ConversationDataset(Dataset[Encoded]):
    """Conversations as encoded samples, in the order of the source.

    Args:
        source: checked conversations, see `LlavaConversations` and `HubConversations`.
        encoder: turns one into model inputs.
        skip_broken: where a picture cannot be read, or `max_length` would cut through it, give the next intact
            entry in its place and count it; otherwise such an entry stops the run with its name.
        cache_megabytes: keep encoded samples in memory up to this size (per loader process); worth it for small
            sets that are read several times.

    Raises:
        ConversationError: if no entry can be used.
    """

    def __init__(
        self,
        source: ConversationSource,
        encoder: Encoder,
        *,
        skip_broken: bool = False,
        cache_megabytes: int = 0,
    ) -> None:
        self.source = source
        self.encoder = encoder
        self.skip_broken = skip_broken
        self._room = cache_megabytes * 2**20
        self._cache: dict[int, Encoded] = {}
        # In shared memory, so that what loader processes find is known to the process that reports it.
        self.states = torch.zeros(len(source), dtype=torch.uint8).share_memory_()
        self._known = [index for index in range(len(source)) if index not in source.broken]

    def prepare_with(self, prepare: Prepare | None) -> None:
        """Make further picture tensors from now on, or no longer; what was encoded without is encoded again."""
        if prepare != self.encoder.prepare:
            self.encoder.prepare = prepare
            self._room += sum(encoded.nbytes for encoded in self._cache.values())
            self._cache.clear()

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, position: int) -> Encoded:
        for step in range(len(self._known)):
            index = self._known[(position + step) % len(self._known)]
            if self.states[index] in (BROKEN_IMAGE, CUT_IMAGE):
                continue
            try:
                return self._encode(index)
            except (ImageError, CutError) as error:
                if not self.skip_broken:
                    raise type(error)(f"{self.source.name(index)}: {error}") from error
                self.states[index] = BROKEN_IMAGE if isinstance(error, ImageError) else CUT_IMAGE
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped().items())
        raise ConversationError(f"none of the {len(self.source)} entries can be used ({reasons}).")

    def _encode(self, index: int) -> Encoded:
        if (known := self._cache.get(index)) is not None:
            return known
        encoded = self.encoder(self.source[index])
        if encoded.cut:
            self.states[index] = SHORTENED
        if encoded.nbytes <= self._room:
            self._cache[index] = encoded
            self._room -= encoded.nbytes
        return encoded

    def recall(self, states: torch.Tensor) -> None:
        """Take over what another process, or the run before a stop, found out about the entries.

        Raises:
            ConversationError: if it is about another number of entries.
        """
        if states.shape != self.states.shape:
            raise ConversationError(
                f"the checkpoint is of a run on {len(states)} entries, and there are {len(self.states)} now: the data "
                "has changed. Restore it, or train into another folder."
            )
        torch.maximum(self.states, states.to(self.states), out=self.states)

    def skipped(self) -> Counter[str]:
        """What was left out or shortened so far, by reason; empty when nothing was."""
        counts = Counter(
            {
                "unreadable image": len(self.source.broken) + int((self.states == BROKEN_IMAGE).sum()),
                "image cut off by max_length": int((self.states == CUT_IMAGE).sum()),
                "text shortened to max_length": int((self.states == SHORTENED).sum()),
            }
        )
        counts.update(self.source.trimmed)
        return +counts

    def skipped_names(self, limit: int = 10) -> list[str]:
        """Names of the first entries that were left out."""
        late = [int(index) for index in torch.nonzero((self.states == BROKEN_IMAGE) | (self.states == CUT_IMAGE))]
        indices = sorted([*self.source.broken, *late])[:limit]
        return [self.source.broken.get(index, self.source.name(index)) for index in indices]


def load_source(
    *,
    conversations: str | Path | None = None,
    image_folder: str | Path | None = None,
    dataset: str | None = None,
    split: str = "train",
    skip_broken: bool = False,
) -> ConversationSource:
    """Conversations from LLaVA's JSON, or from a HuggingFace data set (a saved one, a folder, or a hub id).

    Raises:
        ValueError: unless exactly one of `conversations` and `dataset` is given.
        FileNotFoundError: if the file or the folder does not exist.
        ConversationError: if entries cannot be used.
    """
    if (conversations is None) == (dataset is None):
        raise ValueError(
            f"data needs exactly one of `conversations` (got {conversations!r}) and `dataset` (got {dataset!r}): "
            "a LLaVA JSON file, or a HuggingFace data set."
        )
    if conversations is not None:
        return LlavaConversations(conversations, image_folder, skip_broken=skip_broken)
    assert dataset is not None
    return HubConversations(_load_dataset(dataset, split), image_folder, skip_broken=skip_broken, where=f"'{dataset}'")


def _load_dataset(path: str, split: str) -> Any:
    """A data set saved with `save_to_disk`, else whatever `datasets.load_dataset` finds under this name."""
    try:
        import datasets
    except ImportError as cause:
        raise ImportError('HuggingFace data sets need extra packages: pip install "keepsight[train]"') from cause
    folder = Path(path)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if path.startswith((".", "/")) and not folder.exists():
        raise FileNotFoundError(f"the data set '{path}' does not exist.")
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split)
    except Exception as cause:  # which kind, depends on what is wrong and where
        raise ValueError(
            f"the data set '{path}' cannot be loaded ({reason(cause)}); give a folder that `save_to_disk` wrote, a "
            "folder of data files, or a hub id. LLaVA's JSON goes to `data.conversations`."
        ) from cause
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"'{path}' has no split {split!r}; it has {sorted(loaded)}.")
        return loaded[split]
    if saved and split != "train":
        raise ValueError(f"'{path}' was saved without splits, so it has no {split!r}; leave data.split out.")
    return loaded
