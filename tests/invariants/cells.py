"""Which settings are tried together: every pair of two choices' values in some cell, and the paper's own cells."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from itertools import combinations, product
from typing import Any

from keepsight import PReConfig


@dataclass(frozen=True)
class Cell:
    """One way to train with PRe."""

    anchor: str = "pre_llm"
    granularity: str = "patch"
    distance: str = "cosine"
    layer: Any = "middle"
    mode: str = "stage 2"
    loop: str = "trainer"

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "") for value in astuple(self))

    @property
    def possible(self) -> bool:
        return not (self.granularity == "global" and self.distance == "infonce")

    def config(self, anchor_model: str, **more: Any) -> PReConfig:
        """Its settings of PRe."""
        external = {"anchor_model": anchor_model} if self.anchor == "external" else {}
        chosen: Any = {name: getattr(self, name) for name in ("anchor", "granularity", "distance", "layer")}
        return PReConfig(**chosen, **external, anchor_decay=0.75, **more)


MODES = (
    "stage 1",  # the projector alone
    "stage 2",  # projector and language model, the encoder frozen
    "full",  # the encoder learns too
    "lora",
    "bf16",
    "checkpointing",
    "reentrant",
    "compile",
)
VALUES: dict[str, tuple[Any, ...]] = {
    "anchor": ("pre_llm", "pre_projector", "encoder", "external", "moving_average"),
    "granularity": ("patch", "global", "relational"),
    "distance": ("cosine", "mse", "infonce"),
    "layer": ("middle", "last", (1, 3)),
    "mode": MODES,
    "loop": ("loop", "trainer"),
}
# The paper's tables: configurations with a frozen and a trainable encoder, and the ablation's rows.
PAPER = [
    Cell(),
    Cell(mode="stage 1"),
    Cell(mode="full"),
    Cell(layer="last"),
    Cell(anchor="pre_projector"),
    Cell(anchor="external"),
    Cell(granularity="global"),
]


def pairs_of(cell: Cell) -> set[tuple[tuple[str, Any], ...]]:
    """The pairs of values that a cell has."""
    return set(combinations([(field.name, getattr(cell, field.name)) for field in fields(cell)], 2))


def all_pairs() -> set[tuple[tuple[str, Any], ...]]:
    """The pairs that some possible cell has."""
    found: set[tuple[tuple[str, Any], ...]] = set()
    for one, two in combinations(VALUES, 2):
        for a, b in product(VALUES[one], VALUES[two]):
            if Cell(**{one: a, two: b}).possible:
                found.add(((one, a), (two, b)))
    return found


def covering() -> list[Cell]:
    """The paper's cells, then greedily those that bring most new pairs."""
    cells = list(PAPER)
    missing = all_pairs() - {pair for cell in cells for pair in pairs_of(cell)}
    pool = [cell for values in product(*VALUES.values()) if (cell := Cell(*values)).possible]
    while missing:
        best = max(pool, key=lambda cell: len(pairs_of(cell) & missing))
        cells.append(best)
        missing -= pairs_of(best)
    return cells
