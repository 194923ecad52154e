"""Predictive Regularization in a trainer that stays as it is: the gradient enters at the layer by itself.

python examples/04_trainer_you_cannot_change.py
"""

import tempfile

from transformers import Trainer, TrainingArguments

import keepsight
from keepsight.testbed.folders import write_folder
from keepsight.testbed.models import build_vlm
from keepsight.testbed.scenes import draw_scenes
from keepsight.training import Collator, ConversationDataset, Encoder, LlavaConversations


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write_folder(f"{folder}/data", draw_scenes(seed=3, count=64))
        model, processor = build_vlm()
        handle = keepsight.attach(model, keepsight.PReConfig(layer="middle", weight=0.5), inject=True)
        trainer = Trainer(  # not a subclass, and its loss is its own
            model=model,
            args=TrainingArguments(
                f"{folder}/out",
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=4,
                learning_rate=3e-4,
                remove_unused_columns=False,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=ConversationDataset(
                LlavaConversations(data / "questions.json", data / "images"), Encoder(processor)
            ),
            data_collator=Collator(processor),
            callbacks=[handle],  # tells it the accumulation, and proves that the loss is alive
        )
        before = handle.head.up.weight.detach().clone()
        trainer.train()
        moved = (handle.head.up.weight - before).norm() / before.norm()
        print(f"cosine {handle.cosine:+.3f}, the head moved by {moved:.3f} of its length")
        handle.detach()


if __name__ == "__main__":
    main()
