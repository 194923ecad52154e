"""`handle.peft`: PEFT copies the head and renames parameters, and PRe goes on as if it had been attached afterwards."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import keepsight
from keepsight.pre.handle import Handle
from tests.tiny import llava_clip_llama
from tests.training.test_trainer import make_trainer, samples

peft = pytest.importorskip("peft")
DECODER = {"target_modules": r".*language_model.*(q|v)_proj"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "decoder": DECODER,
    "projector saved": DECODER | {"modules_to_save": ["multi_modal_projector"]},
    "encoder too": {"target_modules": ["q_proj", "v_proj"]},
}


def attached(lora: dict[str, Any], *, first: bool, **config: Any) -> tuple[Any, Handle, dict[str, torch.Tensor]]:
    """A model under PEFT with PRe, attached `first` or after wrapping, and a batch."""
    model, batch = llava_clip_llama()
    model.train()
    batch["labels"] = batch["input_ids"]
    wanted = keepsight.PReConfig(**config)
    torch.manual_seed(0)  # of the adapters' weights
    if first:
        handle = keepsight.attach(model, wanted)
        return peft.get_peft_model(model, handle.peft(peft.LoraConfig(r=2, **lora))), handle, batch
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **lora))
    return wrapped, keepsight.attach(wrapped, wanted), batch


def losses(wrapped: Any, handle: Handle, batch: dict[str, torch.Tensor], steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(steps):
        (wrapped(**batch).loss + handle.loss).backward()
        found.append(float(handle.loss))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lora", ADAPTERS)
@pytest.mark.parametrize("anchor", ["pre_llm", "pre_projector", "encoder", "moving_average"])
def test_attached_before_or_after_it_trains_alike(anchor, lora):
    config: dict[str, Any] = {"anchor": anchor} | ({"anchor_decay": 0.5} if anchor == "moving_average" else {})
    before, after = (losses(*attached(ADAPTERS[lora], first=first, **config)) for first in (True, False))
    assert before == pytest.approx(after, rel=1e-5)
    assert before[0] != pytest.approx(before[-1], rel=1e-4)


def test_the_model_is_not_copied_and_steps_are_counted_once():
    gc.collect()
    before = {
        kind: sum(isinstance(one, kind) for one in gc.get_objects()) for kind in (Handle, LlavaForConditionalGeneration)
    }
    wrapped, handle, batch = attached(ADAPTERS["projector saved"], first=True, anchor="moving_average", warmup_steps=4)
    gc.collect()
    for kind, count in before.items():
        assert sum(isinstance(one, kind) for one in gc.get_objects()) == count + 1, kind
    losses(wrapped, handle, batch)
    assert (handle.steps, int(handle.predictors.steps), handle.weight) == (3, 3, pytest.approx(0.5 * 4 / 5))
    assert handle._forward.source.teacher is handle.predictors.teacher


def test_a_resumed_model_goes_on_with_its_step():
    wrapped, handle, batch = attached(DECODER, first=True, warmup_steps=4)
    losses(wrapped, handle, batch)
    other, again, _ = attached(DECODER, first=True, warmup_steps=4)
    other.load_state_dict(wrapped.state_dict())
    assert (again.steps, again.weight) == (3, handle.weight)


def test_a_model_wrapped_for_ddp_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(llava_clip_llama()[0])
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel.*attach to the model itself"):
            keepsight.attach(wrapped)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("own", [None, ["multi_modal_projector"]])
def test_an_adapter_saved_after_detach_does_not_know_the_head(own, tmp_path):
    wrapped, handle, _ = attached(DECODER | {"modules_to_save": own}, first=True)
    handle.detach()
    wrapped.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).modules_to_save == own
    assert not any("keepsight" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    peft.PeftModel.from_pretrained(llava_clip_llama()[0], tmp_path)


@pytest.mark.parametrize("first", [True, False])
def test_a_head_that_the_checkpoint_lacks_is_told(first, tmp_path):
    """Attached after wrapping, it is not in the adapter's file, from which HF Trainer goes on."""
    config = DECODER | {"task_type": "CAUSAL_LM"}

    def trainer(steps: int) -> tuple[Any, Handle]:
        wrapped, handle, _ = attached(config, first=first)
        settings: dict[str, Any] = {"batch": 8, "max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(wrapped, tmp_path, samples(), **settings), handle

    trainer(1)[0].train()
    again, handle = trainer(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    own = [str(one.message) for one in told if "new prediction head" in str(one.message)]
    assert (len(own), handle.steps) == ((0, 2) if first else (1, 1))
    assert all("goes on at step 1" in one and "handle.peft" in one for one in own)
