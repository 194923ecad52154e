"""TRL's `SFTTrainer`, which makes its loss itself and never looks at the model's: the mixin is exact there, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback

import keepsight
from tests.tiny import llava
from tests.tiny_processors import make_llava

trl = pytest.importorskip("trl")


class PReTrainer(keepsight.PReTrainerMixin, trl.SFTTrainer):
    pass


def train(
    folder: Path, cls: type, *, batch: int, accumulate: int = 1, weight: float = 0.5, callbacks: Any = ()
) -> tuple[Any, Any]:
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green", "white")] * 2
    question = {"role": "user", "content": "what color is it ?"}
    rows = [{"images": [p], "messages": [question, {"role": "assistant", "content": "red"}]} for p in pictures]
    model = llava(patch=8)
    if cls is PReTrainer:
        keepsight.attach(model, keepsight.PReConfig(weight=weight))
    arguments = trl.SFTConfig(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        max_length=None,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = cls(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_llava(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return model, trainer.state.log_history[:-1]


@pytest.mark.slow
def test_accumulated_micro_batches_train_like_one_batch(tmp_path):
    whole, one = train(tmp_path / "one", PReTrainer, batch=4)
    parts, many = train(tmp_path / "many", PReTrainer, batch=1, accumulate=4)
    for expected, got in zip(one, many, strict=True):
        for name in ("loss", "lm_loss", "pre_loss", "pre_images"):
            assert got[name] == pytest.approx(expected[name], abs=2e-5), name
        assert got["loss"] == pytest.approx(got["lm_loss"] + 0.5 * got["pre_loss"], abs=2e-4)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.slow
def test_without_weight_it_trains_as_the_bare_trainer_bit_for_bit(tmp_path):
    bare, _ = train(tmp_path / "bare", trl.SFTTrainer, batch=4)
    baseline, _ = train(tmp_path / "baseline", PReTrainer, batch=4, weight=0.0)
    keepsight.handle_of(baseline).detach()
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), baseline.parameters(), strict=True))


class Input(TrainerCallback):
    """The visual tokens at the decoder's input of the first forward, found without the callback under test."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.tokens: list[torch.Tensor] = []
        ids: list[torch.Tensor] = []
        model.model.register_forward_pre_hook(lambda _, a, k: ids.append(k["input_ids"]), with_kwargs=True)
        model.model.language_model.layers[0].register_forward_pre_hook(
            lambda _, a, k: self.tokens.append((a[0] if a else k["hidden_states"])[ids[-1] == image_token(model)]),
            with_kwargs=True,
        )


def image_token(model: Any) -> int:
    return model.config.image_token_id


@pytest.mark.slow
def test_the_watch_logs_and_changes_nothing(tmp_path):
    bare, _ = train(tmp_path / "bare", trl.SFTTrainer, batch=4)
    watch, seen = keepsight.FidelityCallback(every=1), Input()
    watched, log = train(tmp_path / "watched", trl.SFTTrainer, batch=4, callbacks=[seen, watch])
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), watched.parameters(), strict=True))
    assert len(watch.history) == 2
    assert all("sight_homogeneity" in row and "sight_dimension" in row for row in log)
    unit = torch.nn.functional.normalize(seen.tokens[0].view(4, 4, -1), dim=-1)  # four pictures of four tokens
    cosine = (unit @ unit.mT).flatten(1).sum(dim=1)
    expected = ((cosine - 4) / 12).mean().item()
    assert log[0]["sight_homogeneity_input"] == pytest.approx(expected, abs=1e-5)
