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

HISTORY = 6
STAGNATION = 8  # steps without progress beyond float32 noise


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


def _basis(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features in the eigenbasis of the Gram matrix [P, n, r], squared singular values [P, r], map back [P, d, r]."""
    n, d = x.shape[1:]
    if n > d:
        squares, vectors = torch.linalg.eigh((x.transpose(1, 2) @ x).double())
        vectors = vectors.to(x.dtype)
        return x @ vectors, squares.clamp(min=0).to(x.dtype), vectors
    squares, left = torch.linalg.eigh((x @ x.transpose(1, 2)).double())
    kept = squares > 1e-7 * squares[:, -1:]  # directions below float32's resolution of the Gram matrix
    singular = torch.where(kept, squares, 0.0).sqrt()
    features = left * singular[:, None, :]
    back = x.double().transpose(1, 2) @ (left * torch.where(kept, 1 / singular, 0.0)[:, None, :])
    return features.to(x.dtype), singular.square().to(x.dtype), back.to(x.dtype)


def solve(x: Tensor, y: Tensor, l2: Tensor, classes: int, *, tolerance: float = 1e-4, max_steps: int = 500) -> Solution:
    """Solve all P × R problems together; those that have converged drop out.

    Args:
        x: [P, n, d] standardised features of P layers.
        y: [n] class indices; l2: [R] strengths λ > 0; classes: C.
        tolerance: a problem has converged when the decrease that the Hessian model still promises is below this share
            of its objective, or when float32 allows no further progress.

    Returns:
        The solutions in the coordinates of `x`.
    """
    features, squares, back = _basis(x)
    p, n, width = features.shape
    r = l2.shape[0]
    target = torch.nn.functional.one_hot(y, classes).to(x.dtype)  # [n, C]
    ridge = l2.to(x.dtype)[None, :, None].expand(p, r, width)
    # The last row of every parameter block is the intercept: no penalty, mean square 1.
    ridge = torch.cat([ridge, ridge.new_zeros(p, r, 1)], dim=2)[..., None]  # [P, R, r+1, 1]
    spread = (squares / n)[:, None, :].expand(p, r, width)
    spread = torch.cat([spread, spread.new_ones(p, r, 1)], dim=2)[..., None]
    features = torch.cat([features, features.new_ones(p, n, 1)], dim=2)

    def logits_of(parameters: Tensor) -> Tensor:  # [p, r, width+1, C] -> [p, r, n, C]
        a, b = parameters.shape[:2]
        flat = parameters.permute(0, 2, 1, 3).reshape(a, width + 1, b * classes)
        return (features_now @ flat).view(a, n, b, classes).transpose(1, 2)

    def gradient_of(logits: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and the inverse of a diagonal model of the Hessian at the present uncertainty."""
        a, b = parameters.shape[:2]
        share = logits.softmax(dim=-1)
        uncertainty = (share - share.square()).mean(dim=(2, 3))[..., None, None]
        flat = features_now.transpose(1, 2) @ (share - target).transpose(1, 2).reshape(a, n, b * classes)
        gradient = flat.view(a, width + 1, b, classes).transpose(1, 2) / n + ridge_now * parameters
        return gradient, 1 / (uncertainty * spread_now + ridge_now)

    def value_of(logits: Tensor, penalty: Tensor) -> Tensor:
        chosen = (logits * target).sum(dim=-1)
        return (logits.logsumexp(dim=-1) - chosen).double().mean(dim=-1) + penalty

    def penalty_of(a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (ridge_now * a * b).double().sum(dim=(2, 3))

    solution = x.new_zeros(p, r, width + 1, classes)
    best = x.new_zeros(p, r, dtype=torch.float64)
    finished = torch.zeros(p, r, dtype=torch.bool)
    rows, columns = torch.arange(p), torch.arange(r)  # the problems still running
    features_now, ridge_now, spread_now = features, ridge, spread
    parameters = solution.clone()
    logits = logits_of(parameters)
    value = value_of(logits, penalty_of(parameters, parameters))
    gradient, inverse = gradient_of(logits, parameters)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    stalled = torch.zeros_like(value)
    steps = 0
    while steps < max_steps:
        steps += 1
        direction = _direction(gradient, inverse, pairs)
        slope = (gradient * direction).double().sum(dim=(2, 3))
        along = logits_of(direction)
        cross, own = 2 * penalty_of(parameters, direction), penalty_of(direction, direction)
        penalty = penalty_of(parameters, parameters)
        step = torch.ones_like(value)
        for _ in range(20):
            trial = value_of(logits + step[..., None, None].to(x.dtype) * along, penalty + step * cross + step**2 * own)
            bad = trial > value + 1e-4 * step * slope + 1e-7 * value.abs()
            if not bad.any():
                break
            step = torch.where(bad, step / 2, step)
        step = torch.where(bad, torch.zeros_like(step), step)
        trial = torch.where(bad, value, trial)
        moved = step[..., None, None].to(x.dtype) * direction
        parameters = parameters + moved
        logits = logits + step[..., None, None].to(x.dtype) * along
        following, inverse = gradient_of(logits, parameters)
        _remember(pairs, moved, following - gradient)
        stalled = torch.where(value - trial <= 1e-6 * trial.abs(), stalled + 1, 0.0)
        gradient, value = following, trial
        gap = 0.5 * (gradient * gradient * inverse).double().sum(dim=(2, 3))
        done = (gap <= tolerance * value) | (stalled >= STAGNATION)
        # A problem keeps the solution of its own last step, however long its neighbours go on.
        fresh = ~finished[rows[:, None], columns]
        solution[rows[:, None], columns] = torch.where(
            fresh[..., None, None], parameters, solution[rows[:, None], columns]
        )
        best[rows[:, None], columns] = torch.where(fresh, value, best[rows[:, None], columns])
        finished[rows[:, None], columns] |= done
        done = finished[rows[:, None], columns]
        if done.all():
            break
        keep_rows, keep_columns = ~done.all(dim=1), ~done.all(dim=0)
        if keep_rows.all() and keep_columns.all():
            continue
        rows, columns = rows[keep_rows], columns[keep_columns]
        features_now = features_now[keep_rows]

        def shrink(t: Tensor, a: Tensor = keep_rows, b: Tensor = keep_columns) -> Tensor:
            return t[a][:, b]

        ridge_now, spread_now, parameters, logits = map(shrink, (ridge_now, spread_now, parameters, logits))
        value, gradient, inverse, stalled = map(shrink, (value, gradient, inverse, stalled))
        pairs = [(shrink(s), shrink(z), shrink(rho)) for s, z, rho in pairs]
    weights = torch.einsum("pdw,prwc->prdc", back, solution[:, :, :-1])
    return Solution(weights, solution[:, :, -1], best, steps)


def _direction(gradient: Tensor, inverse: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """−H⁻¹∇ by the two-loop recursion around the diagonal `inverse`."""
    q = gradient
    alphas = []
    for s, z, rho in reversed(pairs):
        alpha = rho * (s * q).sum(dim=(2, 3), keepdim=True)
        q = q - alpha * z
        alphas.append(alpha)
    q = q * inverse
    if pairs:
        s, z, rho = pairs[-1]
        seen = rho * (z * z * inverse).sum(dim=(2, 3), keepdim=True)
        q = q * torch.where(seen > 0, 1 / seen, 1.0)
    for (s, z, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - rho * (z * q).sum(dim=(2, 3), keepdim=True))
    return -q


def _remember(pairs: list[tuple[Tensor, Tensor, Tensor]], s: Tensor, z: Tensor) -> None:
    """Keep the step s and change of gradient z; a pair without positive curvature gets weight 0."""
    product = (s * z).sum(dim=(2, 3), keepdim=True)
    rho = torch.where(product > 0, 1 / product, 0.0)
    pairs.append((s, z, rho))
    del pairs[:-HISTORY]
