"""What of the benchmarks needs a GPU is built here without one, so that it does not rot."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def overhead(monkeypatch) -> Any:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield pytest.importorskip("train_overhead")
    torch.set_num_threads(threads)
    for name in ("train_overhead", "_models", "_timing"):
        sys.modules.pop(name, None)


def test_the_7b_shape_is_llavas(overhead):
    model = overhead.build_on("7B", "meta")
    assert model.config.text_config.num_hidden_layers == 32
    # Vicuna-7B with 64 rows more in embedding and output layer, CLIP-L/14-336, the projector.
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616 + 2 * 64 * 4096 + 303_507_456 + 20_979_712
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert overhead.build_on("7B", "meta", layers=4).config.text_config.num_hidden_layers == 4


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["baseline", "pre", "usual"])
def test_a_step_on_the_path_of_7b(overhead, kind, lora):
    step = overhead.Step(kind, "7B-narrow", lora=lora)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step()
    moved = {name for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("language_model" in name for name in moved)
    assert any("lora" in name for name in moved) is lora
    assert not any("vision_tower" in name for name in moved)
    if kind == "pre":
        assert any("keepsight_head" in name for name in moved)
        assert step.handle.tokens == overhead.BATCH * 16
    assert overhead.floor(step) > 0


def test_each_shape_has_its_own_bounds_and_the_baseline_no_head(overhead):
    assert overhead.bounds("135M", lora=False) == (1.05, 1.03)
    assert overhead.bounds("7B", lora=False) == (1.01, 1.01)
    assert overhead.bounds("7B", lora=True) == (1.02, 1.02)
    bare = overhead.Step("baseline", "7B-narrow").model
    assert not any("keepsight_head" in name for name, _ in bare.named_parameters())
    step = overhead.Step("pre", "7B-narrow")
    assert overhead.head_memory(step) == 16 * sum(p.numel() for p in step.handle.parameters()) / 2**20
