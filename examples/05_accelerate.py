"""Predictive Regularization in a plain accelerate loop, exact under accumulation and over processes.

python examples/05_accelerate.py
torchrun --nproc_per_node 2 examples/05_accelerate.py
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader

import keepsight
from keepsight.testbed.drawing import picture
from keepsight.testbed.language import questions
from keepsight.testbed.models import build_vlm
from keepsight.testbed.scenes import draw_scenes

STEPS, PICTURES, MICRO_BATCH = 4, 8, 2  # pictures: of a whole optimizer step

set_seed(0)
accelerator = Accelerator(
    cpu=not torch.cuda.is_available(),  # without it, torchrun's processes on CPUs would not know of each other
    kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
)
processes = accelerator.num_processes
model, processor = build_vlm()  # or AutoModelForImageTextToText.from_pretrained(...)
model.train()
handle = keepsight.attach(model, keepsight.PReConfig(layer="middle", weight=0.5))  # before the optimizer and prepare
optimizer = torch.optim.AdamW(keepsight.param_groups(model), lr=3e-4)
base = [p for name, p in model.named_parameters() if "keepsight_head" not in name]


def collate(scenes):
    """Pictures with a question and its answer each; the loss is on everything after the picture, for brevity."""
    texts = []
    for scene in scenes:
        turn = questions(scene, 1)[0]
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.question}]}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True) + f" {turn.answer}")
    batch = processor(text=texts, images=[picture(scene) for scene in scenes], padding=True, return_tensors="pt")
    hidden = (batch["input_ids"] == model.config.image_token_id) | (batch["attention_mask"] == 0)
    return {**batch, "labels": batch["input_ids"].masked_fill(hidden, -100)}


loader = DataLoader(draw_scenes(seed=3, count=STEPS * PICTURES), batch_size=MICRO_BATCH, collate_fn=collate)
wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
stream = iter(loader)
for step in range(STEPS):
    micro_batches = [next(stream) for _ in range(PICTURES // MICRO_BATCH // processes)]
    # What both losses are means over: pictures, and answer tokens, of the whole step and of all processes.
    counts = torch.tensor(
        [[handle.count_images(batch), (batch["labels"][:, 1:] != -100).sum()] for batch in micro_batches],
        device=accelerator.device,
    )
    images, tokens = accelerator.reduce(counts.sum(dim=0), reduction="sum").tolist()
    handle.images_in_step = images
    losses = torch.zeros(2, device=accelerator.device)
    for batch in micro_batches:
        with accelerator.no_sync(wrapped) if batch is not micro_batches[-1] else nullcontext():
            out = wrapped(**batch, num_items_in_batch=tokens)  # transformers divides the summed loss by it
            loss = out.loss + handle.loss  # of this micro-batch, its share of both means
            accelerator.backward(loss * processes)  # gradients are averaged over processes
        losses += torch.stack([out.loss.detach(), handle.loss.detach()])
    if step == 0:
        handle.assert_alive(optimizer)
    accelerator.clip_grad_norm_(base, 1.0)  # the model's parameters alone: the head must not change its steps
    optimizer.step()
    optimizer.zero_grad()
    lm_loss, predictive = accelerator.reduce(losses, reduction="sum").tolist()
    accelerator.print(f"step {step}: lm loss {lm_loss:.4f}  λ · L_PRe {predictive:+.4f}  cosine {handle.cosine:+.3f}")

handle.detach()
if accelerator.is_main_process:
    model.save_pretrained("runs/example-accelerate")  # a plain transformers checkpoint
accelerator.end_training()
