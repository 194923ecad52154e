"""What the solver minimises: losses and gradients of many problems, in memory or block by block."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Shares = tuple[Tensor, Tensor]
Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Block:
    """Some pictures of p layers: features [p, n, D], the last coordinate 1 for the intercept, and classes y [t, n].

    Pictures are the last dimension of logits: products with so few rows are fast, and so are sums over the classes.
    """

    def __init__(self, features: Tensor, y: Tensor, classes: int) -> None:
        p, n, _ = features.shape
        self.features = torch.cat([features, features.new_ones(p, n, 1)], dim=2)
        self.classes = classes
        self._know(y)

    def _know(self, y: Tensor) -> None:
        self.y = y
        self.right = torch.nn.functional.one_hot(y, self.classes).to(self.features).transpose(1, 2)  # [t, C, n]

    def logits(self, parameters: Tensor) -> Tensor:
        """[p, t, C, n] of parameters [p, t, C, D]."""
        p, t, c, _ = parameters.shape
        return (parameters.flatten(1, 2) @ self.features.transpose(1, 2)).view(p, t, c, -1)

    def loss(self, logits: Tensor) -> tuple[Tensor, Shares]:
        """Summed loss [p, t], and the shares p(class) as numerators [p, t, C, n] and denominators [p, t, 1, n].

        Logits are taken relative to that of the right answer: log(1 + small) keeps small losses exact in float32, and
        a step that would overflow has an infinite loss, which the line search refuses.
        """
        index = self.y[:, None].expand(len(logits), -1, 1, -1)
        odds = (logits - logits.gather(2, index)).exp_()
        total = odds.sum(dim=2, keepdim=True)
        return total.log().double().sum(dim=(2, 3)), (odds, total)

    def gradient(self, shares: Shares) -> tuple[Tensor, Tensor]:
        """Gradient of the summed loss [p, t, C, D], and Σ p(class)² over the pictures [p, t, C]; uses the shares up."""
        odds, total = shares
        share = odds.div_(total)
        squares = share.square().sum(dim=3)
        share.sub_(self.right)
        return (share.flatten(1, 2) @ self.features).view(*share.shape[:3], -1), squares

    def select(self, rows: Tensor, columns: Tensor) -> Block:
        """Of these layers and targets only."""
        chosen = copy.copy(self)
        chosen.features = self.features[rows]
        chosen._know(self.y[columns])
        return chosen


class Problems(ABC):
    """p × t problems, a layer and a target each, in the layers' eigenbases of D coordinates.

    Parameters are [p, t, C, D]. `penalise` sets the strength of all. `start`, then `towards` a direction and `trial`
    after `trial` along it, give losses [p, t]; `gradient` is that where the last of them was.
    """

    def __init__(self, squares: Tensor, n: int, classes: int) -> None:
        """squares: [p, D − 1], the layers' squared singular values."""
        self.spread = torch.cat([squares / n, squares.new_ones(len(squares), 1)], dim=1)[:, None, None]
        self.n, self.classes = n, classes
        self.ridge = torch.zeros_like(self.spread[0, 0, 0])

    def penalise(self, strength: float) -> None:
        """Weigh |W|² by strength / 2; the intercept stays free."""
        self.ridge = torch.full_like(self.ridge, strength)
        self.ridge[-1] = 0.0

    @abstractmethod
    def start(self, parameters: Tensor) -> Tensor:
        """The loss at the parameters."""

    @abstractmethod
    def towards(self, parameters: Tensor, direction: Tensor) -> None:
        """The line that trials are along; the parameters are those of the last trial."""

    @abstractmethod
    def trial(self, step: Tensor) -> Tensor:
        """The loss so many directions [p, t] along."""

    @abstractmethod
    def _sums(self) -> tuple[Tensor, Tensor]:
        """`Block.gradient` over all pictures, where the last trial was."""

    def select(self, rows: Tensor, columns: Tensor) -> Problems:
        """These layers and targets only, where the last trial was and after its gradient was taken."""
        chosen = copy.copy(self)
        chosen.spread = self.spread[rows]
        return chosen

    def penalty(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (self.ridge * a * b).sum(dim=(2, 3)).double()

    def gradient(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and the inverse of the diagonal model of the Hessian at the present uncertainty."""
        gradient, squares = self._sums()
        # mean p(1 − p) over pictures and classes; the shares of a picture sum to one, but for rounding
        uncertain = (1 - squares.sum(dim=2) / self.n).clamp(min=torch.finfo(squares.dtype).eps)
        uncertainty = (uncertain / self.classes)[..., None, None]
        gradient = gradient.div_(self.n).addcmul_(self.ridge, parameters)
        return gradient, (uncertainty * self.spread + self.ridge).reciprocal_()


class InMemory(Problems):
    """All pictures are one block. A straight line in the logits: a trial costs no product with the features."""

    def __init__(self, features: Tensor, squares: Tensor, y: Tensor, classes: int) -> None:
        super().__init__(squares, y.shape[1], classes)
        self.block = Block(features, y, classes)

    def start(self, parameters: Tensor) -> Tensor:
        return self._loss(self.block.logits(parameters))

    def towards(self, parameters: Tensor, direction: Tensor) -> None:
        self.origin, self.along = self.logits, self.block.logits(direction)

    def trial(self, step: Tensor) -> Tensor:
        return self._loss(torch.addcmul(self.origin, step.to(self.along)[..., None, None], self.along))

    def _loss(self, logits: Tensor) -> Tensor:
        self.logits = logits
        loss, self.shares = self.block.loss(logits)
        return loss / self.n

    def _sums(self) -> tuple[Tensor, Tensor]:
        return self.block.gradient(self.shares)

    def select(self, rows: Tensor, columns: Tensor) -> Problems:
        chosen = super().select(rows, columns)
        assert isinstance(chosen, InMemory)
        chosen.block, chosen.logits = self.block.select(rows, columns), self.logits[rows][:, columns]
        return chosen


class Streamed(Problems):
    """One layer whose pictures come a block at a time, in as many passes as there are trials.

    The features need not be turned into the eigenbasis: the parameters are turned back, which is less work.
    """

    def __init__(self, blocks: Blocks, squares: Tensor, vectors: Tensor, n: int, classes: int) -> None:
        super().__init__(squares[None], n, classes)
        self.blocks = blocks
        self.turn = torch.block_diag(vectors, vectors.new_ones(1, 1))
        self.columns: Tensor | None = None

    def start(self, parameters: Tensor) -> Tensor:
        turned = parameters @ self.turn.T
        gradient, squares = torch.zeros_like(turned), turned.new_zeros(turned.shape[:3])
        loss = turned.new_zeros(turned.shape[:2], dtype=torch.float64)
        for x, y in self.blocks():
            block = Block(x[None], y if self.columns is None else y[self.columns], self.classes)
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

    def select(self, rows: Tensor, columns: Tensor) -> Problems:
        chosen = super().select(rows, columns)
        assert isinstance(chosen, Streamed)
        chosen.columns = columns if self.columns is None else self.columns[columns]
        return chosen
