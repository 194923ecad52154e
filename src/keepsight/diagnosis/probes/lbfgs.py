"""L-BFGS for many problems at once: what their last steps told of the curvature, and where it leads."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

HISTORY = 4  # steps


class History:
    """The last steps s and changes of gradient z of every problem, [p, t, m, N], and H⁻¹∇ from them.

    A ring: the step after next overwrites the oldest one. Steps that are not there yet are zero, and count for nothing,
    as do those without curvature.
    """

    def __init__(self, parameters: Tensor) -> None:
        p, t, c, width = parameters.shape
        self.s = parameters.new_zeros(p, t, HISTORY, c * width)
        self.z = torch.zeros_like(self.s)
        self.oldest = 0

    def add(self, s: Tensor, z: Tensor) -> None:
        self.s[:, :, self.oldest] = s.flatten(2)
        self.z[:, :, self.oldest] = z.flatten(2)
        self.oldest = (self.oldest + 1) % HISTORY

    def penalise(self, more: Tensor) -> None:
        """The penalty of each of the D coordinates has changed by `more` [D]."""
        self.z += (self.s.unflatten(3, (-1, len(more))) * more).flatten(3)

    def select(self, rows: Tensor, columns: Tensor) -> History:
        """That of these problems."""
        chosen = copy.copy(self)
        chosen.s, chosen.z = self.s[rows][:, columns], self.z[rows][:, columns]
        return chosen

    def take(self, at: tuple[Tensor, Tensor], other: History, there: tuple[Tensor, Tensor]) -> None:
        """For the problems `at`, what `other` has of those `there`; this one's oldest steps are the first."""
        self.s[at], self.z[at] = (one[there].roll(-other.oldest, dims=1) for one in (other.s, other.z))

    def direction(self, gradient: Tensor, inverse: Tensor) -> Tensor:
        """−H⁻¹∇ with the diagonal `inverse` as H₀⁻¹, rescaled along the last step.

        The two loops of L-BFGS are two triangular systems in R_ij = s_i · z_j, i ≤ j, in the order of the steps.
        """
        s, z, back = self.s, self.z, -self.oldest
        inner = (s @ z.transpose(2, 3)).roll((back, back), dims=(2, 3))
        curvature = inner.diagonal(dim1=2, dim2=3)
        known = curvature > 0
        both = known[..., None] & known[..., None, :]
        system = torch.where(both, inner, torch.eye(HISTORY, dtype=inner.dtype, device=inner.device)).triu()
        flat = gradient.flatten(2)[..., None]

        def projected(vector: Tensor, on: Tensor) -> Tensor:
            return torch.where(known[..., None], (on @ vector).roll(back, dims=2), 0.0)  # [p, t, m, 1]

        along = projected(flat, s)
        alpha = torch.linalg.solve_triangular(system, along, upper=True)
        q = (flat - z.transpose(2, 3) @ alpha.roll(-back, dims=2)).view_as(gradient) * inverse
        last = z[:, :, self.oldest - 1].view_as(gradient)
        length = (last * last * inverse).sum(dim=(2, 3))
        # how far the model is off along the last step
        scale = torch.where(known[..., -1] & (length > 0), curvature[..., -1] / length, 1.0)
        q = (q * scale[..., None, None]).flatten(2)[..., None]
        right = curvature[..., None] * alpha - projected(q, z)
        step = torch.linalg.solve_triangular(
            system.transpose(2, 3), torch.where(known[..., None], right, 0.0), upper=False
        )
        return -(q + s.transpose(2, 3) @ step.roll(-back, dims=2)).view_as(gradient)
