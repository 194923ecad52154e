"""Predictive Regularization in HF Trainer, or any subclass of it, with gradient accumulation done exactly.

python examples/03_hf_trainer.py
"""

from transformers import Trainer, TrainingArguments

import keepsight
from keepsight.testbed.folders import write_folder
from keepsight.testbed.models import build_vlm
from keepsight.testbed.scenes import draw_scenes
from keepsight.training import Collator, ConversationDataset, Encoder, LlavaConversations


class PReTrainer(keepsight.PReTrainerMixin, Trainer):
    """Your trainer here."""


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        data = write_folder(f"{folder}/data", draw_scenes(seed=3, count=64))
        model, processor = build_vlm()
        source = LlavaConversations(data / "questions.json", data / "images")
        handle = keepsight.attach(model, keepsight.PReConfig(layer="middle", weight=0.5))
        trainer = PReTrainer(
            model=model,
            args=TrainingArguments(
                f"{folder}/out",
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=4,
                logging_steps=1,
                learning_rate=3e-4,
                remove_unused_columns=False,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=ConversationDataset(source, Encoder(processor)),
            data_collator=Collator(processor),
        )
        trainer.train()
        handle.detach()
        for row in trainer.state.log_history[:-1]:
            print({name: round(row[name], 3) for name in ("loss", "lm_loss", "pre_cosine", "pre_margin", "pre_images")})


if __name__ == "__main__":
    main()
