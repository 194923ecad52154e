"""What one batch of pictures leaves behind: small enough to be sent to another process, or kept on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import safetensors.torch
from safetensors import safe_open
from torch import Tensor


@dataclass
class Seen:
    """What was met while pictures were opened: {index: name} of those left out, animated ones, values in masks."""

    broken: dict[int, str] = field(default_factory=dict)
    animated: set[int] = field(default_factory=set)
    mask_values: set[int] = field(default_factory=set)

    def update(self, other: Seen) -> None:
        """Add what another has met."""
        self.broken |= other.broken
        self.animated |= other.animated
        self.mask_values |= other.mask_values


@dataclass
class Record:
    """The rows of one batch's pictures; no tensors where none of them could be read.

    indices: of its B pictures. tensors, on the CPU: pooled [L, B, d], values [L, B, V], sampled [L, t, d] unless the
    accumulator is `direct`, sample [3, t] (picture within the batch, jackknife group, place); where there are sink
    tokens, bare [m, d], the mean tokens without them of the pictures that have some, layer after layer; with masks
    object_owner and object_patches [K], and with the breakdown by object object_values [L, K, 8]; encoder [1, t, d_v]
    and encoder_pooled [1, B, d_v] where the encoder's output is wanted. classes: [K], of each object, "" where it is
    not known; counts: objects with pairs, objects without, pictures with objects; no_encoder: why there is no encoder's
    output.
    """

    indices: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    counts: tuple[int, int, int] = (0, 0, 0)
    no_encoder: str = ""
    seen: Seen = field(default_factory=Seen)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        rest = asdict(self) | {"tensors": None, "seen": None}
        rest["broken"] = sorted(self.seen.broken.items())
        rest["animated"], rest["mask_values"] = sorted(self.seen.animated), sorted(self.seen.mask_values)
        return safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()}, {"record": json.dumps(rest)}
        )

    @classmethod
    def from_file(cls, path: str) -> Record:
        """What `to_bytes` gave.

        Raises:
            safetensors.SafetensorError: it is damaged.
        """
        with safe_open(path, "pt") as file:
            rest = json.loads(file.metadata()["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        seen = Seen(dict(map(tuple, rest["broken"])), set(rest["animated"]), set(rest["mask_values"]))
        return cls(rest["indices"], tensors, rest["classes"], tuple(rest["counts"]), rest["no_encoder"], seen)
