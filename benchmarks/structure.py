"""Cohesion and coupling from sums of unit vectors against the pairwise definition, at the paper's size.

    python benchmarks/structure.py

576 visual tokens × 33 layers × d = 4096, five objects, normalisation on both sides; one image, whose groups are built
once for all layers, as in a diagnosis; both sides in inference mode. Bound: 15 times.
"""

import torch
from _timing import finish, paired, ratio_of, verdict

from keepsight.diagnosis.metrics.structure import Groups, Structure, structure

TOKENS, LAYERS, WIDTH, OBJECTS = 576, 33, 4096, 5


def pairwise(tokens: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """The definition as one would first write it: all cosines, then the means of whole, blocks and off-blocks."""
    unit = torch.nn.functional.normalize(tokens, dim=1)
    cosine = unit @ unit.T
    n = cosine.shape[0]
    homogeneity = (cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1))
    cohesion, coupling = [], []
    for inside in members:
        rows = cosine[inside]
        block = rows[:, inside]
        n = block.shape[0]
        cohesion.append((block.sum() - block.diagonal().sum()) / (n * (n - 1)))
        coupling.append(rows[:, ~inside].mean())
    return torch.stack([homogeneity, *cohesion, *coupling])


def sums(layers: torch.Tensor, members: torch.Tensor) -> list[Structure]:
    image, owner = torch.zeros(TOKENS, dtype=torch.long), torch.zeros(OBJECTS, dtype=torch.long)
    groups = Groups.build(image, 1, members, owner)
    return [structure(tokens, groups) for tokens in layers]


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    layers = torch.randn(LAYERS, TOKENS, WIDTH) + 0.5
    members = torch.arange(TOKENS) // 90 == torch.arange(OBJECTS)[:, None]

    error = 0.0
    for tokens, fast in zip(layers, sums(layers, members), strict=True):
        values = torch.cat([fast.homogeneity, fast.cohesion, fast.coupling])
        error = max(error, float((values - pairwise(tokens, members)).abs().max()))
    print(f"largest difference from the pairwise definition: {error:.1e}")

    slow, fast_times = paired(
        lambda: [pairwise(tokens, members) for tokens in layers],
        lambda: sums(layers, members),
        pairs=31,
    )
    print(f"pairwise {1e3 * min(slow):.0f} ms, sums {1e3 * min(fast_times):.0f} ms, all {LAYERS} layers of one image")
    finish(error < 1e-5, verdict("structure", ratio_of(slow, fast_times), at_least=15))


if __name__ == "__main__":
    main()
