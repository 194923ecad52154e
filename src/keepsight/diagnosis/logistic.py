"""Multinomial logistic regression for many layers and many L2 strengths at once.

Each problem minimises  mean_i −log softmax(x_i W + b)[y_i] + λ/2 |W|²  (the intercept b is free): scikit-learn's
objective with C = 1 / (nλ), divided by nC. All problems advance together by L-BFGS in the eigenbasis of each layer's
Gram matrix. There a diagonal model of the Hessian is good: u·s_j²/n + λ, where s_j² is the eigenvalue and u the mean
uncertainty p(1 − p) of the present predictions; a few dozen steps then serve badly conditioned and separable
data alike. Where there are fewer pictures than features, the basis has only as many coordinates as pictures; the
solution is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 4
Basis = tuple[Tensor, Tensor, Tensor]
STAGNATION = 8  # steps without progress beyond float32 noise
SHRINK = 0.85  # finished problems are dropped once the others are at most this share


@dataclass(frozen=True)
class Solution:
    """weights [P, R, d, C], intercept [P, R, C], objective [P, R] for P layers and R strengths; steps taken."""

    weights: Tensor
    intercept: Tensor
    objective: Tensor
    steps: int


def objective(x: Tensor, y: Tensor, l2: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
    """[P, R], the objective in float64: x [P, n, d], y [n], l2 [R]."""
    loss = torch.stack(
        [
            torch.nn.functional.cross_entropy(
                (x.double() @ weights[:, r].double() + intercept[:, r, None].double()).transpose(1, 2),
                y.expand(x.shape[0], -1),
                reduction="none",
            ).mean(dim=1)
            for r in range(l2.shape[0])
        ],
        dim=1,
    )
    return loss + 0.5 * l2.double() * weights.double().square().sum(dim=(2, 3))


def basis(x: Tensor) -> Basis:
    """Features in the eigenbasis of the Gram matrix [P, n, r], squared singular values [P, r], map back [P, d, r]."""
    n, d = x.shape[1:]
    if n > d:
        squares, vectors = torch.linalg.eigh(x.transpose(1, 2) @ x)
        return x @ vectors, squares.clamp(min=0), vectors
    squares, left = torch.linalg.eigh((x @ x.transpose(1, 2)).double())
    kept = squares > 1e-7 * squares[:, -1:]  # directions below float32's resolution of the Gram matrix
    singular = torch.where(kept, squares, 0.0).sqrt()
    features = left * singular[:, None, :]
    back = x.double().transpose(1, 2) @ (left * torch.where(kept, 1 / singular, 0.0)[:, None, :])
    return features.to(x.dtype), singular.square().to(x.dtype), back.to(x.dtype)


class _Problems:
    """p × r problems in the eigenbasis: features [p, n, D], penalty and mean square of each coordinate [p, r, 1, D].

    Parameters are [p, r, C, D], logits [p, n, r, C]; the last of the D coordinates is the intercept.
    """

    def __init__(self, features: Tensor, squares: Tensor, l2: Tensor, y: Tensor, classes: int) -> None:
        p, n, width = features.shape
        r = l2.shape[0]
        ridge = l2.to(features)[None, :, None].expand(p, r, width)
        self.ridge = torch.cat([ridge, ridge.new_zeros(p, r, 1)], dim=2)[:, :, None]
        spread = (squares / n)[:, None, :].expand(p, r, width)
        self.spread = torch.cat([spread, spread.new_ones(p, r, 1)], dim=2)[:, :, None]
        self.features = torch.cat([features, features.new_ones(p, n, 1)], dim=2)
        self.y, self.classes = y, classes
        self.right = torch.nn.functional.one_hot(y, classes).to(features)[None, :, None]  # [1, n, 1, C]

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        self.features = self.features[rows]
        self.ridge, self.spread = self.ridge[rows][:, columns], self.spread[rows][:, columns]

    def logits(self, parameters: Tensor) -> Tensor:
        p, r, c, width = parameters.shape
        return (self.features @ parameters.reshape(p, r * c, width).transpose(1, 2)).view(p, -1, r, c)

    def loss(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Mean loss [p, r], and the shares p(class) as numerators [p, n, r, C] and denominators [p, n, r, 1].

        Logits are taken relative to that of the right answer: log(1 + small) keeps small losses exact in float32, and
        a step that would overflow has an infinite loss, which the line search refuses.
        """
        index = self.y[None, :, None, None].expand(*logits.shape[:3], 1)
        odds = (logits - logits.gather(3, index)).exp_()
        total = odds @ odds.new_ones(self.classes, 1)  # a product is much faster than a sum over a short dimension
        return total[..., 0].log().double().mean(dim=1), (odds, total)

    def penalty(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (self.ridge * a * b).sum(dim=(2, 3)).double()

    def gradient(self, shares: tuple[Tensor, Tensor], parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and the inverse of the diagonal model of the Hessian at the present uncertainty."""
        odds, total = shares
        p, n, r, c = odds.shape
        share = odds.div_(total)
        # mean p(1 − p) over pictures and classes; the shares of a picture sum to one
        squares = share.view(p, n, r * c).square().sum(dim=1).view(p, r, c).sum(dim=2)
        uncertainty = ((1 - squares / n) / c)[..., None, None]
        share.sub_(self.right)
        gradient = (share.view(p, n, r * c).transpose(1, 2) @ self.features).div_(n).view(p, r, c, -1)
        return gradient.addcmul_(self.ridge, parameters), (uncertainty * self.spread + self.ridge).reciprocal_()


class _History:
    """The last steps s and changes of gradient z of every problem, [p, r, m, N], and H⁻¹∇ from them."""

    def __init__(self) -> None:
        self.s: Tensor | None = None
        self.z: Tensor | None = None

    def add(self, s: Tensor, z: Tensor) -> None:
        s, z = s.flatten(2)[:, :, None], z.flatten(2)[:, :, None]
        if self.s is None or self.z is None:
            self.s, self.z = s, z
        elif self.s.shape[2] < HISTORY:
            self.s, self.z = torch.cat([self.s, s], dim=2), torch.cat([self.z, z], dim=2)
        else:
            self.s, self.z = self.s.roll(-1, dims=2), self.z.roll(-1, dims=2)
            self.s[:, :, -1:], self.z[:, :, -1:] = s, z

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        if self.s is not None and self.z is not None:
            self.s, self.z = self.s[rows][:, columns], self.z[rows][:, columns]

    def direction(self, gradient: Tensor, inverse: Tensor) -> Tensor:
        """−H⁻¹∇: the two-loop recursion around the diagonal `inverse`, on the m × m inner products."""
        if self.s is None or self.z is None:
            return -gradient * inverse
        s, z, m = self.s, self.z, self.s.shape[2]
        inner = s @ z.transpose(2, 3)  # [p, r, m, m], s_i · z_j
        curvature = inner.diagonal(dim1=2, dim2=3)
        rho = torch.where(curvature > 0, 1 / curvature, 0.0)
        flat = gradient.flatten(2)[..., None]
        projected = (s @ flat)[..., 0]
        alpha = torch.zeros_like(projected)
        for i in reversed(range(m)):
            alpha[..., i] = rho[..., i] * (projected[..., i] - (inner[..., i, :] * alpha).sum(dim=2))
        q = (flat - z.transpose(2, 3) @ alpha[..., None]).view_as(gradient) * inverse
        last = z[:, :, -1].view_as(gradient)
        seen = rho[..., -1] * (last * last * inverse).sum(dim=(2, 3))  # how far the model is off along the last step
        q = (q * torch.where(seen > 0, 1 / seen, 1.0)[..., None, None]).flatten(2)[..., None]
        projected = (z @ q)[..., 0]
        step = torch.zeros_like(projected)
        for i in range(m):
            step[..., i] = alpha[..., i] - rho[..., i] * (projected[..., i] + (inner[..., :, i] * step).sum(dim=2))
        return -(q + s.transpose(2, 3) @ step[..., None]).view_as(gradient)


def solve(
    x: Tensor,
    y: Tensor,
    l2: Tensor,
    classes: int,
    *,
    known: Basis | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 500,
) -> Solution:
    """Solve all P × R problems together; those that have converged drop out.

    Args:
        x: [P, n, d] standardised features of P layers.
        y: [n] class indices; l2: [R] strengths λ > 0; classes: C.
        known: `basis(x)`, where it was computed before.
        tolerance: a problem has converged when the decrease that the Hessian model still promises is below this share
            of its objective, or when float32 allows no further progress.

    Returns:
        The solutions in the coordinates of `x`.
    """
    features, squares, back = basis(x) if known is None else known
    problems, history = _Problems(features, squares, l2, y, classes), _History()
    p, r, width = features.shape[0], l2.shape[0], features.shape[2]
    solution = x.new_zeros(p, r, classes, width + 1)
    best = x.new_zeros(p, r, dtype=torch.float64)
    finished = torch.zeros(p, r, dtype=torch.bool)
    rows, columns = torch.arange(p), torch.arange(r)  # the problems still running
    parameters = torch.zeros_like(solution)
    logits = problems.logits(parameters)
    value, shares = problems.loss(logits)
    gradient, inverse = problems.gradient(shares, parameters)
    stalled = torch.zeros_like(value)
    steps = 0
    while steps < max_steps:
        steps += 1
        direction = history.direction(gradient, inverse)
        slope = (gradient * direction).sum(dim=(2, 3)).double()
        along = problems.logits(direction)
        base = problems.penalty(parameters, parameters)
        cross, own = 2 * problems.penalty(parameters, direction), problems.penalty(direction, direction)
        step = torch.ones_like(value)
        for _ in range(20):  # a straight line in the logits: a trial costs no product with the features
            trial_logits = torch.addcmul(logits, step.to(x.dtype)[:, None, :, None], along)
            loss, shares = problems.loss(trial_logits)
            trial = loss + base + step * cross + step**2 * own
            bad = trial > value + 1e-4 * step * slope + 1e-7 * value.abs()
            if not bad.any():
                break
            step = torch.where(bad, step / 2, step)
        logits = trial_logits
        moved = step.to(x.dtype)[..., None, None] * direction
        parameters = parameters + moved
        following, inverse = problems.gradient(shares, parameters)
        history.add(moved, following - gradient)
        stalled = torch.where(value - trial <= 1e-6 * trial.abs(), stalled + 1, 0.0)
        gradient, value = following, trial
        gap = 0.5 * (gradient * gradient * inverse).sum(dim=(2, 3)).double()
        done = (gap <= tolerance * value) | (stalled >= STAGNATION)
        # A problem keeps the solution of its own last step, however long its neighbours go on.
        fresh = ~finished[rows[:, None], columns]
        row, column = (fresh & (done if steps < max_steps else torch.ones_like(done))).nonzero(as_tuple=True)
        solution[rows[row], columns[column]] = parameters[row, column]
        best[rows[row], columns[column]] = value[row, column]
        finished[rows[row], columns[column]] = True
        going = ~finished[rows[:, None], columns]
        if not going.any():
            break
        keep_rows, keep_columns = going.any(dim=1), going.any(dim=0)
        if int(keep_rows.sum()) * int(keep_columns.sum()) > SHRINK * going.numel():
            continue  # copying what is left would cost more than carrying a few finished problems along
        rows, columns = rows[keep_rows], columns[keep_columns]
        problems.keep(keep_rows, keep_columns)
        history.keep(keep_rows, keep_columns)
        logits = logits[keep_rows][:, :, keep_columns]
        parameters, gradient, inverse, value, stalled = (
            t[keep_rows][:, keep_columns] for t in (parameters, gradient, inverse, value, stalled)
        )
    weights = back[:, None] @ solution[..., :-1].transpose(2, 3)
    return Solution(weights, solution[..., -1], best, steps)
