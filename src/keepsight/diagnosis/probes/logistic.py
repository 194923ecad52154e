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

from keepsight.diagnosis.probes.losses import Blocks, InMemory, Problems, Streamed

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
    return _descend(InMemory(features, squares, l2, y, classes), back, tolerance, max_steps)


def solve_streamed(
    blocks: Blocks,
    l2: Tensor,
    classes: int,
    *,
    known: tuple[int, Tensor, Tensor],
    tolerance: float = 1e-4,
    max_steps: int = 500,
) -> Solution:
    """The same for one layer of more pictures than features, which are never in memory together.

    Args:
        blocks: gives, each time anew, the standardised features [b, d] and class indices [b] block by block.
        known: `streamed_basis(blocks)`.
    """
    n, squares, vectors = known
    return _descend(Streamed(blocks, squares, vectors, l2, n, classes), vectors[None], tolerance, max_steps)


def streamed_basis(blocks: Blocks) -> tuple[int, Tensor, Tensor]:
    """Number of pictures, and squared singular values [d] and eigenvectors [d, d] of the features in `blocks`."""
    gram, n = None, 0
    for x, _ in blocks():
        part = (x.T @ x).double()
        gram, n = part if gram is None else gram.add_(part), n + len(x)
    if gram is None:
        raise ValueError("there are no blocks of features; a probe needs at least one picture")
    squares, vectors = torch.linalg.eigh(gram)
    return n, squares.clamp(min=0).float(), vectors.float()


def _descend(problems: Problems, back: Tensor, tolerance: float, max_steps: int) -> Solution:
    """L-BFGS from zero; `back` [P, d, D − 1] leads from the eigenbasis to the features."""
    p, r, _, width = problems.ridge.shape
    classes, device = problems.classes, back.device
    solution = back.new_zeros(p, r, classes, width)
    best = back.new_zeros(p, r, dtype=torch.float64)
    finished = torch.zeros(p, r, dtype=torch.bool, device=device)
    rows, columns = torch.arange(p, device=device), torch.arange(r, device=device)  # the problems still running
    parameters, history = torch.zeros_like(solution), _History()
    value = problems.start(parameters)
    gradient, inverse = problems.gradient(parameters)
    stalled = torch.zeros_like(value)
    steps = 0
    while steps < max_steps:
        steps += 1
        direction = history.direction(gradient, inverse)
        slope = (gradient * direction).sum(dim=(2, 3)).double()
        problems.towards(parameters, direction)
        base = problems.penalty(parameters, parameters)
        cross, own = 2 * problems.penalty(parameters, direction), problems.penalty(direction, direction)
        step = torch.ones_like(value)
        for _ in range(20):
            trial = problems.trial(step) + base + step * cross + step**2 * own
            bad = trial > value + 1e-4 * step * slope + 1e-7 * value.abs()
            if not bad.any():
                break
            step = torch.where(bad, step / 2, step)
        moved = step.to(back)[..., None, None] * direction
        parameters = parameters + moved
        following, inverse = problems.gradient(parameters)
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
        parameters, gradient, inverse, value, stalled = (
            t[keep_rows][:, keep_columns] for t in (parameters, gradient, inverse, value, stalled)
        )
    weights = back[:, None] @ solution[..., :-1].transpose(2, 3)
    return Solution(weights, solution[..., -1], best, steps)
