"""The visual tokens of one batch of pictures, and the groups that means are taken over."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from keepsight.diagnosis.metrics.structure import Groups


@dataclass
class Batch:
    """The visual tokens of a batch: T tokens of B images, K objects.

    image: [T]; thumbnail: bool [T]; objects: bool [K, T]; owner: [K], image of each object;
    sample: [t] token indices of the seeded sample; group: [B], each image's jackknife group; place: [T], a number for
    each tile, row and column, the same in every image; counted: bool [B], the images whose neighbours are counted;
    classes: [K], of each object, "" where it is not known.
    """

    image: Tensor
    n_images: int
    thumbnail: Tensor
    objects: Tensor
    owner: Tensor
    sample: Tensor
    group: Tensor
    place: Tensor
    counted: Tensor
    classes: list[str] = field(default_factory=list)
    scopes: dict[str, Groups] = field(init=False)

    def __post_init__(self) -> None:
        everything = Groups.build(self.image, self.n_images, self.objects, self.owner, self.counted)
        self.scopes = {"all": everything}
        if bool(self.thumbnail.any()):
            # Pictures in one piece are in neither: both numbers are of the same pictures, whatever the batch.
            tiled = torch.bincount(self.image[self.thumbnail], minlength=self.n_images)[self.image] > 0
            self.scopes["tiles"] = everything.keep(~self.thumbnail & tiled)
            self.scopes["thumbnail"] = everything.keep(self.thumbnail)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        image, thumbnail, objects = self.image.to(device), self.thumbnail.to(device), self.objects.to(device)
        owner, sample, group = self.owner.to(device), self.sample.to(device), self.group.to(device)
        place, counted = self.place.to(device), self.counted.to(device)
        return Batch(image, self.n_images, thumbnail, objects, owner, sample, group, place, counted, self.classes)
