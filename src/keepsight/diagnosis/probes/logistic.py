"""Multinomial logistic regression for many layers and targets at once, along a path of L2 strengths.

Each problem minimises  mean_i −log softmax(x_i W + b)[y_i] + λ/2 |W|²  (the intercept b is free): scikit-learn's
objective with C = 1 / (nλ), divided by nC; of two classes, which it gives one vector of weights, with C = 2 / (nλ).
The strengths are taken from the strongest on, and each starts where the last solutions lead to over log λ: that is so
near that all strengths of a path together take about as many steps as the weakest alone from zero. All problems of a
strength advance together by L-BFGS in the eigenbasis of each layer's Gram matrix. There a diagonal model of the Hessian
is good: u·s_j²/n + λ, where s_j² is the eigenvalue and u the mean uncertainty p(1 − p) of the present predictions;
badly conditioned and separable data are then served alike. What was seen of the curvature goes on from strength to
strength, less the penalty's share, which is known. Where there are fewer pictures than features, the basis has only as
many coordinates as pictures; the solution is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from keepsight.diagnosis.probes.lbfgs import History
from keepsight.diagnosis.probes.losses import Blocks, InMemory, Problems, Streamed

Basis = tuple[Tensor, Tensor, Tensor]
STAGNATION = 8  # steps without progress beyond float32 noise
SHRINK = 0.85  # finished problems are dropped once the others are at most this share
TOLERANCE = 3e-5  # a problem has converged when its Hessian model promises less than this share of its objective
MAX_STEPS = 500  # of a strength


@dataclass(frozen=True)
class Solution:
    """At one strength: weights [P, T, C, d], intercept [P, T, C], objective [P, T] of P layers and T targets; steps."""

    strength: float
    weights: Tensor
    intercept: Tensor
    objective: Tensor
    steps: int


def objective(x: Tensor, y: Tensor, strength: float, weights: Tensor, intercept: Tensor) -> Tensor:
    """[P, T], the objective in float64: x [P, n, d], y [T, n]."""
    logits = weights.double() @ x.double().transpose(1, 2)[:, None] + intercept.double()[..., None]  # [P, T, C, n]
    every = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y.expand(len(x), *y.shape), reduction="none")
    loss = every.mean(dim=2)
    return loss + 0.5 * strength * weights.double().square().sum(dim=(2, 3))


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


def solve(x: Tensor, y: Tensor, l2: Tensor, classes: int, *, tolerance: float = TOLERANCE) -> Iterator[Solution]:
    """Solve all P × T problems at each strength, strongest first.

    Args:
        x: [P, n, d] standardised features of P layers.
        y: [T, n] class indices of T targets; l2: [R] strengths λ > 0; classes: C.
        tolerance: a problem has converged when the decrease that the Hessian model still promises is below this share
            of its objective, or when float32 allows no further progress.

    Yields:
        The solutions in the coordinates of `x`.
    """
    features, squares, back = basis(x)
    return _path(InMemory(features, squares, y, classes), l2, len(y), back, tolerance)


def solve_streamed(
    blocks: Blocks, targets: int, l2: Tensor, classes: int, *, tolerance: float = TOLERANCE
) -> Iterator[Solution]:
    """The same for one layer of more pictures than features, which are never in memory together.

    Args:
        blocks: gives, each time anew, the standardised features [b, d] and class indices [T, b] block by block.
        targets: T.
    """
    n, squares, vectors = streamed_basis(blocks)
    return _path(Streamed(blocks, squares, vectors, n, classes), l2, targets, vectors[None], tolerance)


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


def _path(problems: Problems, l2: Tensor, targets: int, back: Tensor, tolerance: float) -> Iterator[Solution]:
    """The solutions from the strongest penalty to the weakest; `back` [P, d, D − 1] leads from the eigenbasis."""
    parameters = back.new_zeros(len(back), targets, problems.classes, back.shape[2] + 1)
    history, loss, ridge = History(parameters), None, problems.ridge
    known: list[tuple[float, Tensor]] = []
    for strength in sorted(set(l2.tolist()), reverse=True):
        problems.penalise(strength)
        history.penalise(problems.ridge - ridge)
        guess = _extrapolated(known, math.log(strength)) if known else parameters
        guess, loss = _guess(problems, guess, parameters, loss)
        parameters, loss, steps = _descend(problems, guess, loss, history, tolerance)
        known, ridge = [*known[-2:], (math.log(strength), parameters)], problems.ridge
        weights = (parameters[..., :-1].flatten(1, 2) @ back.transpose(1, 2)).view(*parameters.shape[:3], -1)
        value = loss + problems.penalty(parameters, parameters)
        yield Solution(strength, weights, parameters[..., -1], value, steps)


def _extrapolated(known: list[tuple[float, Tensor]], at: float) -> Tensor:
    """Where the last solutions, each at its log λ, lead to: half way between the line and the parabola through them.

    The parabola alone leads astray where data begin to be told apart. After the first, as if zero lay before it.
    """
    t1, last = known[-1]
    if len(known) == 1:
        return 2 * last
    t2, second = known[-2]
    slope = (last - second) / (t1 - t2)
    line = last + slope * (at - t1)
    if len(known) == 2:
        return line
    t3, third = known[-3]
    bend = (slope - (second - third) / (t2 - t3)) / (t1 - t3)
    return line + 0.5 * bend * ((at - t1) * (at - t2))


def _guess(problems: Problems, guess: Tensor, last: Tensor, loss: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where to start from and the loss there: the guess, or the last solution where that is better; `loss`: of it."""
    there = problems.start(guess)
    if loss is None:
        return guess, there
    better = there + problems.penalty(guess, guess) <= loss + problems.penalty(last, last)
    if better.all():
        return guess, there
    guess = torch.where(better[..., None, None], guess, last)
    return guess, problems.start(guess)


def _descend(
    problems: Problems, parameters: Tensor, loss: Tensor, known: History, tolerance: float
) -> tuple[Tensor, Tensor, int]:
    """L-BFGS from the parameters, where `problems` stands: parameters and loss of each problem at its own last step.

    known: what is known of the curvature; it takes what each problem learns until then.
    """
    device, shape = parameters.device, loss.shape
    solution, best = torch.empty_like(parameters), torch.empty_like(loss)
    finished = torch.zeros(shape, dtype=torch.bool, device=device)
    rows, columns = (torch.arange(size, device=device) for size in shape)  # the problems still running
    history = known.select(rows, columns)
    value = loss + problems.penalty(parameters, parameters)
    gradient, inverse = problems.gradient(parameters)
    stalled, steps = torch.zeros_like(value), 0
    while True:
        gap = 0.5 * (gradient * gradient * inverse).sum(dim=(2, 3)).double()
        done = (gap <= tolerance * value) | (stalled >= STAGNATION) | (steps >= MAX_STEPS)
        # A problem keeps the solution of its own last step, however long its neighbours go on.
        row, column = (done & ~finished[rows[:, None], columns]).nonzero(as_tuple=True)
        at = rows[row], columns[column]
        solution[at], best[at], finished[at] = parameters[row, column], loss[row, column], True
        known.take(at, history, (row, column))
        going = ~finished[rows[:, None], columns]
        if not going.any():
            return solution, best, steps
        some_rows, some_columns = going.any(dim=1), going.any(dim=0)
        # Copying what is left must cost less than carrying a few finished problems along.
        if int(some_rows.sum()) * int(some_columns.sum()) <= SHRINK * going.numel():
            rows, columns = rows[some_rows], columns[some_columns]
            problems = problems.select(some_rows, some_columns)
            history = history.select(some_rows, some_columns)
            parameters, gradient, inverse, value, stalled = (
                one[some_rows][:, some_columns] for one in (parameters, gradient, inverse, value, stalled)
            )
        steps += 1
        direction = history.direction(gradient, inverse)
        slope = (gradient * direction).sum(dim=(2, 3)).double()
        problems.towards(parameters, direction)
        base = problems.penalty(parameters, parameters)
        cross, own = 2 * problems.penalty(parameters, direction), problems.penalty(direction, direction)
        step = torch.ones_like(value)
        for _ in range(20):
            loss = problems.trial(step)
            trial = loss + base + step * cross + step**2 * own
            bad = trial > value + 1e-4 * step * slope + 1e-7 * value.abs()
            if not bad.any():
                break
            step = torch.where(bad, step / 2, step)
        else:  # float32 allows no step that way
            step = torch.where(bad, 0.0, step)
            loss = problems.trial(step)
            trial = loss + base + step * cross + step**2 * own
        moved = step.to(parameters)[..., None, None] * direction
        parameters = parameters + moved
        following, inverse = problems.gradient(parameters)
        history.add(moved, following - gradient)
        stalled = torch.where(value - trial <= 1e-6 * trial.abs(), stalled + 1, 0.0)
        gradient, value = following, trial
