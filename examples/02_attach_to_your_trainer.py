"""Predictive Regularization in a training loop of your own: two lines more than without.

python examples/02_attach_to_your_trainer.py
"""

import torch

import keepsight
from keepsight.testbed.drawing import picture
from keepsight.testbed.language import questions
from keepsight.testbed.models import build_vlm
from keepsight.testbed.scenes import draw_scenes

STEPS, MICRO_BATCHES, PICTURES = 4, 2, 4

model, processor = build_vlm()  # or AutoModelForImageTextToText.from_pretrained(...)
model.train()
handle = keepsight.attach(model, keepsight.PReConfig(layer="middle", weight=0.5))  # 1
optimizer = torch.optim.AdamW(keepsight.param_groups(model), lr=3e-4)
base = [p for name, p in model.named_parameters() if "keepsight_head" not in name]


def batches():
    """Pictures with a question and its answer each; the loss is on everything after the picture, for brevity."""
    scenes = draw_scenes(seed=3, count=STEPS * MICRO_BATCHES * PICTURES)
    for start in range(0, len(scenes), PICTURES):
        chosen = scenes[start : start + PICTURES]
        texts = []
        for scene in chosen:
            turn = questions(scene, 1)[0]
            content = [{"type": "image"}, {"type": "text", "text": turn.question}]
            chat = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True) + f" {turn.answer}")
        batch = processor(text=texts, images=[picture(s) for s in chosen], padding=True, return_tensors="pt")
        hidden = (batch["input_ids"] == model.config.image_token_id) | (batch["attention_mask"] == 0)
        yield {**batch, "labels": batch["input_ids"].masked_fill(hidden, -100)}


stream = batches()
for step in range(STEPS):
    micro_batches = [next(stream) for _ in range(MICRO_BATCHES)]
    # The exact mean over the pictures of the whole step, however they fall into micro-batches.
    handle.images_in_step = sum(handle.count_images(batch) for batch in micro_batches)
    for batch in micro_batches:
        loss = model(**batch).loss / MICRO_BATCHES + handle.loss  # 2
        loss.backward()
    if step == 0:
        handle.assert_alive(optimizer)  # stops here if the head were frozen, or no picture were seen
    torch.nn.utils.clip_grad_norm_(base, 1.0)  # the model's parameters alone: the head must not change its steps
    optimizer.step()
    optimizer.zero_grad()
    seen = handle.sight
    print(f"step {step}: loss {loss.item():.3f}  cosine {seen.cosine:+.3f}  above another picture's {seen.margin:+.3f}")

handle.detach()
model.save_pretrained("runs/example-attached")  # a plain transformers checkpoint
