"""`inject=True` in a trainer that is not changed: the gradients are those of the mixin."""

import keepsight
from tests.tiny import llava_clip_llama
from tests.training.test_trainer import Gradients, InOrder, PReTrainer, make_trainer, samples

HEAD = "model.keepsight_head.heads.2.down.weight"


def test_the_last_partial_accumulation_counts_its_own_micro_batches(tmp_path):
    """Five samples of one picture each, two at a time: over two epochs steps of 2, 2, 1, 2, 2, 1 micro-batches."""
    found = {}
    for kind in ("mixin", "injected"):
        model, _ = llava_clip_llama()
        handle = keepsight.attach(model, keepsight.PReConfig(), inject=kind == "injected")
        gradients = Gradients()
        trainer = make_trainer(
            model,
            tmp_path / kind,
            samples()[2:7],
            InOrder if kind == "injected" else PReTrainer,
            batch=1,
            accumulate=2,
            callbacks=[gradients, handle] if kind == "injected" else [gradients],
            max_steps=6,
            learning_rate=0.0,
        )
        trainer.train()
        found[kind] = [step[HEAD].norm().item() for step in gradients.steps]
    ratios = [own / exact for own, exact in zip(found["injected"], found["mixin"], strict=True)]
    assert [round(ratio, 4) for ratio in ratios] == [1.0] * 6
