"""Every family of the support table under `attach`; `python -m tests.pre.test_support --write` writes the table."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import keepsight
from keepsight.vlm import Vlm
from keepsight.vlm.geometry import token_pixels
from tests.families import FAMILIES, REFUSED, UNKNOWN, WORKING, Family
from tests.tiny import IMAGE

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
BEFORE_THE_DECODER = ("pre_projector", "encoder", "moving_average")
TEXT = """# Which model families work

Written by `python -m tests.pre.test_support --write` from tiny random models of every family, and tested to be what
they say. Each trains two steps under `attach` and one under DDP; the loss equals the formula recomputed from
transformers' own hidden states (`tests/pre/test_support.py`). Architectures are tested, not published checkpoints.

transformers 5.6 is the oldest release that is supported (`make test-oldest`). Of those before, 5.0 and 5.4 were
tried: their encoders of CLIP (5.0) and SigLIP (both), taken by themselves, give no hidden states, so that no model
can be put together from them, and processors that also take films do not load without torchvision. Families that a
release does not know yet, such as Kimi K2.5, need a newer one.

- **PRe**: what a prediction is made for, with the anchor `pre_llm`.
- **Other anchors**: with which a training step runs as well. `external` needs what masks need.
- **Masks**: whether it is known which part of the picture each visual token stands for; tested by planting an odd patch
  in the pixels, which must move that token and no other (`tests/vlm/test_places.py`). Without, `diagnose` takes no
  masks; the rest of it works. Tested with the families' own processors: LLaVA, LLaVA-NeXT, Qwen2.5-VL, InternVL,
  SmolVLM, Gemma 3, Idefics2 (`tests/diagnosis/test_families.py`).

| family | `model_type` | PRe | other anchors | masks | remarks |
|---|---|---|---|---|---|
"""


def training_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] >= 90, -100)}


def patches(model: Any, batch: dict[str, Any], inputs: torch.Tensor) -> torch.Tensor:
    """[B, S]: the placeholders, but for those at which the decoder's input is the learned newline."""
    mask = batch["input_ids"] == IMAGE
    newline = getattr(model.model, "image_newline", None) if hasattr(model, "model") else None
    return mask if newline is None else mask & ~(inputs == newline).all(dim=-1)


@pytest.mark.parametrize("name", WORKING)
def test_two_steps_of_training(name):
    family = FAMILIES[name]
    model, batch = family.make()
    model.train()
    keys = list(model.state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = keepsight.attach(model, keepsight.PReConfig(layer="middle"))
    assert handle.vlm.family == family.model_type
    assert handle.layer == 2
    optimizer = torch.optim.AdamW(keepsight.param_groups(model), lr=1e-3)
    for _ in range(2):
        out = model(**training_batch(batch), output_hidden_states=True)
        mask = patches(model, batch, out.hidden_states[0])
        anchor, state = out.hidden_states[0][mask], out.hidden_states[2][mask]
        assert len(anchor) == sum(family.tokens) == handle.tokens
        cosines = torch.nn.functional.cosine_similarity(handle.head(state), anchor, dim=-1)
        expected = -0.5 * torch.stack([part.mean() for part in cosines.split(family.tokens)]).mean()
        assert handle.loss.item() == pytest.approx(expected.item(), abs=1e-6)
        assert handle.sight is not None
        assert (handle.sight.images, handle.skipped) == (3, 0)
        (out.loss + handle.loss).backward()
        assert float(handle.head.up.weight.grad.abs().sum()) > 0
        handle.assert_alive(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    handle.detach()
    assert list(model.state_dict()) == keys
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved
    assert all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point())


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", WORKING)
def test_a_step_under_ddp(name):
    family = FAMILIES[name]
    model, batch = family.make()
    model.train()
    handle = keepsight.attach(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for inputs in (batch, {"input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}):  # and without a picture
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
        (wrapped(**inputs, labels=labels).loss + handle.loss).backward()
        assert handle.tokens == (sum(family.tokens) if inputs is batch else 0)
    assert float(handle.head.up.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_work_say_why(name):
    family = FAMILIES[name]
    model, _ = family.make()
    with pytest.raises(ValueError, match=f"model family '{family.model_type}' is not supported: {family.refused}"):
        keepsight.attach(model)
    assert not any("keepsight" in key for key in model.state_dict())


def refuses(family: Family, action: Callable[[], object]) -> bool:
    """Whether it is an error; the error names the family and what to do."""
    try:
        action()
    except ValueError as error:
        text = str(error)
    else:
        return False
    assert f"model family '{family.model_type}'" in text, text
    assert "the anchor 'pre_llm'" in text or "anchor that does not need it ('pre_llm')" in text, text
    return True


def anchor_works(family: Family, anchor: Any) -> bool:
    """Whether a training step with this anchor runs, with a gradient for the head."""
    model, batch = family.make()
    model.train()

    def step() -> None:
        handle = keepsight.attach(model, keepsight.PReConfig(anchor=anchor))
        model(**batch)
        assert handle.tokens == sum(family.tokens)
        handle.loss.backward()
        assert float(handle.head.up.weight.grad.abs().sum()) > 0

    return not refuses(family, step)


def masks_work(family: Family) -> bool:
    """Whether it is known which pixels every visual token stands for; `tests/vlm/test_places.py` tests it."""
    model, batch = family.make()
    return not refuses(family, lambda: token_pixels(Vlm(model), batch))


def page() -> str:
    """docs/support.md."""
    rows = []
    for name, family in FAMILIES.items():
        cells = ["no", "no", "no", family.refused]
        if not family.refused:
            anchors = [f"`{anchor}`" for anchor in BEFORE_THE_DECODER if anchor_works(family, anchor)]
            pre = "each patch" if family.places else "each query"
            cells = [pre, ", ".join(anchors) or "no", "yes" if masks_work(family) else "no", family.remark]
        rows.append("| " + " | ".join([name, f"`{family.model_type}`", *cells]).rstrip() + " |")
    return TEXT + "\n".join(rows) + "\n"


@pytest.mark.skipif(bool(UNKNOWN), reason=f"this release of transformers does not know {UNKNOWN}")
@pytest.mark.slow
def test_the_page_is_what_the_models_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.pre.test_support --write"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
