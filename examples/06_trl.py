"""Predictive Regularization in TRL's SFTTrainer, exact under accumulation: the trainer's own data format and collator.

python examples/06_trl.py
"""

import tempfile

import trl
from datasets import Dataset

import keepsight
from keepsight.testbed.drawing import picture
from keepsight.testbed.language import questions
from keepsight.testbed.models import build_vlm
from keepsight.testbed.scenes import draw_scenes


class PReTrainer(keepsight.PReTrainerMixin, trl.SFTTrainer):
    """Your SFTTrainer, or a subclass of it."""


def conversations(count: int) -> Dataset:
    """`images` and `messages`, as TRL wants them; the template puts the picture first."""
    rows = []
    for scene in draw_scenes(seed=3, count=count):
        turn = questions(scene, 1)[0]
        messages = [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        rows.append({"images": [picture(scene)], "messages": messages})
    return Dataset.from_list(rows)


def main() -> None:
    model, processor = build_vlm()  # or AutoModelForImageTextToText.from_pretrained(...)
    handle = keepsight.attach(model, keepsight.PReConfig(layer="middle", weight=0.5))
    with tempfile.TemporaryDirectory() as folder:
        trainer = PReTrainer(
            model=model,
            args=trl.SFTConfig(
                folder,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=4,
                logging_steps=1,
                learning_rate=3e-4,
                max_length=None,  # a picture's tokens are never cut
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=conversations(32),
            processing_class=processor,
        )
        trainer.train()
    handle.detach()
    for row in trainer.state.log_history[:-1]:
        print({name: round(row[name], 3) for name in ("loss", "lm_loss", "pre_cosine", "pre_margin", "pre_images")})


if __name__ == "__main__":
    main()
