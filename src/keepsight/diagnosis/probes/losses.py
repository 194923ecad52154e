"""What the solver minimises: losses and gradients of many problems, in memory or block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Shares = tuple[Tensor, Tensor]
Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Block:
    """Some pictures of p layers: features [p, n, D], the last of the D coordinates 1 for the intercept, and y [n]."""

    def __init__(self, features: Tensor, y: Tensor, classes: int) -> None:
        p, n, _ = features.shape
        self.features = torch.cat([features, features.new_ones(p, n, 1)], dim=2)
        self.y, self.classes = y, classes
        self.right = torch.nn.functional.one_hot(y, classes).to(features)[None, :, None]  # [1, n, 1, C]

    def logits(self, parameters: Tensor) -> Tensor:
        """[p, n, r, C] of parameters [p, r, C, D]."""
        p, r, c, width = parameters.shape
        return (self.features @ parameters.reshape(p, r * c, width).transpose(1, 2)).view(p, -1, r, c)

    def loss(self, logits: Tensor) -> tuple[Tensor, Shares]:
        """Summed loss [p, r], and the shares p(class) as numerators [p, n, r, C] and denominators [p, n, r, 1].

        Logits are taken relative to that of the right answer: log(1 + small) keeps small losses exact in float32, and
        a step that would overflow has an infinite loss, which the line search refuses.
        """
        index = self.y[None, :, None, None].expand(*logits.shape[:3], 1)
        odds = (logits - logits.gather(3, index)).exp_()
        total = odds @ odds.new_ones(self.classes, 1)  # a product is much faster than a sum over a short dimension
        return total[..., 0].log().double().sum(dim=1), (odds, total)

    def gradient(self, shares: Shares) -> tuple[Tensor, Tensor]:
        """Gradient of the summed loss [p, r, C, D], and Σ p(class)² over the pictures [p, r, C]; uses the shares up."""
        odds, total = shares
        p, n, r, c = odds.shape
        share = odds.div_(total)
        squares = share.view(p, n, r * c).square().sum(dim=1).view(p, r, c)
        share.sub_(self.right)
        return (share.view(p, n, r * c).transpose(1, 2) @ self.features).view(p, r, c, -1), squares


class Problems(ABC):
    """p × r problems in the eigenbasis: penalty and mean square of each of the D coordinates, both [p, r, 1, D].

    Parameters are [p, r, C, D]. `start`, then `towards` a direction and `trial` after `trial` along it, give losses
    [p, r]; `gradient` is that where the last of them was.
    """

    def __init__(self, squares: Tensor, l2: Tensor, n: int, classes: int) -> None:
        (p, width), r = squares.shape, l2.shape[0]
        ridge = l2.to(squares)[None, :, None].expand(p, r, width)
        self.ridge = torch.cat([ridge, ridge.new_zeros(p, r, 1)], dim=2)[:, :, None]
        spread = (squares / n)[:, None, :].expand(p, r, width)
        self.spread = torch.cat([spread, spread.new_ones(p, r, 1)], dim=2)[:, :, None]
        self.n, self.classes = n, classes

    @abstractmethod
    def start(self, parameters: Tensor) -> Tensor:
        """The loss at the parameters."""

    @abstractmethod
    def towards(self, parameters: Tensor, direction: Tensor) -> None:
        """The line that trials are along; the parameters are those of the last trial."""

    @abstractmethod
    def trial(self, step: Tensor) -> Tensor:
        """The loss so many directions [p, r] along."""

    @abstractmethod
    def _sums(self) -> tuple[Tensor, Tensor]:
        """`Block.gradient` over all pictures, where the last trial was."""

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        self.ridge, self.spread = self.ridge[rows][:, columns], self.spread[rows][:, columns]

    def penalty(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (self.ridge * a * b).sum(dim=(2, 3)).double()

    def gradient(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and the inverse of the diagonal model of the Hessian at the present uncertainty."""
        gradient, squares = self._sums()
        # mean p(1 − p) over pictures and classes; the shares of a picture sum to one
        uncertainty = ((1 - squares.sum(dim=2) / self.n) / self.classes)[..., None, None]
        gradient = gradient.div_(self.n).addcmul_(self.ridge, parameters)
        return gradient, (uncertainty * self.spread + self.ridge).reciprocal_()


class InMemory(Problems):
    """All pictures are one block. A straight line in the logits: a trial costs no product with the features."""

    def __init__(self, features: Tensor, squares: Tensor, l2: Tensor, y: Tensor, classes: int) -> None:
        super().__init__(squares, l2, len(y), classes)
        self.block = Block(features, y, classes)

    def start(self, parameters: Tensor) -> Tensor:
        return self._loss(self.block.logits(parameters))

    def towards(self, parameters: Tensor, direction: Tensor) -> None:
        self.origin, self.along = self.logits, self.block.logits(direction)

    def trial(self, step: Tensor) -> Tensor:
        return self._loss(torch.addcmul(self.origin, step.to(self.along)[:, None, :, None], self.along))

    def _loss(self, logits: Tensor) -> Tensor:
        self.logits = logits
        loss, self.shares = self.block.loss(logits)
        return loss / self.n

    def _sums(self) -> tuple[Tensor, Tensor]:
        return self.block.gradient(self.shares)

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        super().keep(rows, columns)
        self.block.features, self.logits = self.block.features[rows], self.logits[rows][:, :, columns]


class Streamed(Problems):
    """One layer whose pictures come a block at a time, in as many passes as there are trials.

    The features need not be turned into the eigenbasis: the parameters are turned back, which is less work.
    """

    def __init__(self, blocks: Blocks, squares: Tensor, vectors: Tensor, l2: Tensor, n: int, classes: int) -> None:
        super().__init__(squares[None], l2, n, classes)
        self.blocks = blocks
        self.turn = torch.block_diag(vectors, vectors.new_ones(1, 1))

    def start(self, parameters: Tensor) -> Tensor:
        turned = parameters @ self.turn.T
        gradient, squares = torch.zeros_like(turned), turned.new_zeros(turned.shape[:3])
        loss = turned.new_zeros(turned.shape[:2], dtype=torch.float64)
        for x, y in self.blocks():
            block = Block(x[None], y, self.classes)
            part, shares = block.loss(block.logits(turned))
            loss += part
            for total, more in zip((gradient, squares), block.gradient(shares), strict=True):
                total += more
        self.sums = gradient @ self.turn, squares
        return loss / self.n

    def towards(self, parameters: Tensor, direction: Tensor) -> None:
        self.origin, self.along = parameters, direction

    def trial(self, step: Tensor) -> Tensor:
        return self.start(self.origin + step.to(self.along)[..., None, None] * self.along)

    def _sums(self) -> tuple[Tensor, Tensor]:
        return self.sums
