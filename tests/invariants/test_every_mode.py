"""The invariants of training, in every anchor, granularity, distance, layer scheme, training mode and kind of loop."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, TrainerCallback

import keepsight
from keepsight.training.checkpoints import Checkpoints
from keepsight.training.config import LoraConfig
from keepsight.training.freeze import train_only
from keepsight.training.lora import adapt
from keepsight.training.stages import KeepsightTrainer
from keepsight.vlm import Vlm
from keepsight.vlm.capture import capture
from tests.invariants.cells import PAPER, VALUES, Cell, all_pairs, covering, pairs_of
from tests.tiny import IMAGE, llava
from tests.tiny_processors import make_llava
from tests.training import test_trainer
from tests.training.test_trainer import Gradients, InOrder, make_trainer, samples

CELLS = covering()
LEARNING = {"stage 1": ["projector"], "full": ["projector", "language_model", "encoder"]}
SIDE = 12


# In every run of the tests: the paper's default in the trainer, and three modes in a loop of one's own.
QUICK = [Cell(), *(next(c for c in CELLS if c.mode == m and c.loop == "loop") for m in ("full", "lora", "bf16"))]


def _marks(cell: Cell) -> tuple[Any, ...]:
    """Beside the quick ones, `make test` tries the paper's cells; `make test-thorough` all."""
    return () if cell in QUICK else (pytest.mark.slow, *(() if cell in PAPER else (pytest.mark.thorough,)))


EVERY = pytest.mark.parametrize("cell", [pytest.param(cell, id=str(cell), marks=_marks(cell)) for cell in CELLS])


def test_every_pair_of_values_is_in_some_cell():
    assert set(PAPER) <= set(CELLS)
    assert all_pairs() == {pair for cell in CELLS for pair in pairs_of(cell)}
    assert (
        len(all_pairs())
        == sum(len(a) * len(b) for i, a in enumerate(VALUES.values()) for b in list(VALUES.values())[i + 1 :]) - 1
    )  # no infonce over one vector a picture


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> str:
    """A tiny DINOv2, saved."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(5)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 3}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    BitImageProcessor(crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return str(folder)


def build(cell: Cell) -> Any:
    """The model as the mode trains it, without PRe."""
    torch.manual_seed(1)
    model = llava()
    if cell.mode == "lora":
        adapt(model, LoraConfig(rank=4, dropout=0.0))
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # as after some steps: at zero nothing reaches the other matrix
                p.data.normal_(std=0.02, generator=generator)
    train_only(model, LEARNING.get(cell.mode, ["projector", "language_model"]))
    if cell.mode == "bf16":
        model.to(torch.bfloat16)
    if cell.mode in ("checkpointing", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": cell.mode == "reentrant"})
        if cell.mode == "reentrant":
            model.enable_input_require_grads()
    return model.train()


def compiled(cell: Cell, model: Any) -> Any:
    """What a loop calls."""
    if cell.mode != "compile":
        return model
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def data(cell: Cell, handle: Any) -> list[dict[str, Any]]:
    """The trainer tests' eight samples, with what an external anchor needs."""
    rows = samples()
    if handle is None or not handle.needs_pictures:
        return rows
    from PIL import Image

    processor = make_llava(side=16, patch=4)
    for number, row in enumerate(rows):
        if row["pixel_values"] is not None:
            noise = torch.rand(len(row["pixel_values"]), 16, 16, 3, generator=torch.Generator().manual_seed(number))
            pictures = [Image.fromarray((picture * 255).byte().numpy()) for picture in noise]
            row |= handle.prepare(pictures, processor)
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = test_trainer.collate(rows)
    for name in ("keepsight_pixels", "keepsight_points"):
        found = [row[name] for row in rows if name in row]
        if found:
            batch[name] = torch.cat(found)
    return batch


def cast(cell: Cell, batch: dict[str, Any]) -> dict[str, Any]:
    if cell.mode == "bf16" and "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    return batch


class Trainer(KeepsightTrainer, InOrder):
    """The recipe's trainer, in the order of the data."""


class Keep(TrainerCallback):
    """A copy of each checkpoint, because a later one replaces it."""

    def on_save(self, args, state, control, **kwargs) -> None:
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(args.output_dir) / name, Path(args.output_dir) / "kept" / name)


def steps(
    cell: Cell,
    model: Any,
    folder: Path,
    *,
    sizes: list[list[int]],
    clip: float = 0.0,
    resume: bool = False,
    save: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Optimizer steps over micro-batches of these sizes, in order; returns the gradients of each step."""
    handle = keepsight.handle_of(model)
    rows = data(cell, handle)
    if cell.loop == "trainer":
        gradients, callbacks = Gradients(), [] if handle is None else [handle, Checkpoints(), Keep()]
        settings: dict[str, Any] = {"max_steps": len(sizes), "max_grad_norm": clip, "learning_rate": 1e-2}
        if cell.mode == "compile":
            torch._dynamo.reset()
            settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
        if cell.mode in ("checkpointing", "reentrant"):
            settings |= {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": cell.mode == "reentrant"},
            }
        if save:
            settings |= {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(
            model,
            folder,
            rows,
            InOrder if handle is None else Trainer,
            batch=sizes[0][0],
            accumulate=len(sizes[0]),
            callbacks=[gradients, *callbacks],
            **settings,
        )
        trainer.data_collator = lambda rows: cast(cell, collate(rows))
        trainer.learned = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        checkpoint = folder / "kept" / "checkpoint-2"
        trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
        return gradients.steps
    return plain_loop(cell, model, handle, rows, folder, sizes=sizes, clip=clip, resume=resume, save=save)


def plain_loop(
    cell: Cell, model: Any, handle: Any, rows: Any, folder: Path, *, sizes: Any, clip: float, resume: bool, save: bool
) -> list[dict[str, torch.Tensor]]:
    called = compiled(cell, model)
    base = [p for name, p in model.named_parameters() if p.requires_grad and "keepsight_head" not in name]
    groups = keepsight.param_groups(model) if handle else [{"params": base}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    found, position, first = [], 0, 0
    if resume:
        kept = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        handle.remember(kept["memory"])
        first = 2
        position = sum(map(sum, sizes[:first])) % len(rows)
    for number, step in enumerate(sizes[first:], start=first):
        micro = []
        for size in step:
            micro.append(cast(cell, collate([rows[(position + i) % len(rows)] for i in range(size)])))
            position += size
        if handle:
            handle.images_in_step = sum(handle.count_images(batch) for batch in micro)
        answers = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro]
        for batch, count in zip(micro, answers, strict=True):
            loss = called(**batch).loss * (count / sum(answers))
            (loss + handle.loss if handle else loss).backward()
        if handle and handle.config.weight and number == first:
            handle.assert_alive(optimizer)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        if clip:
            torch.nn.utils.clip_grad_norm_(base, clip)
        optimizer.step()
        optimizer.zero_grad()
        if save and number == 1:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "memory": handle.memory()}
            folder.mkdir(exist_ok=True)
            torch.save(kept, folder / "state.pt")
    return found


def attached(cell: Cell, dino: str, **config: Any) -> tuple[Any, Any]:
    model = build(cell)
    return model, keepsight.attach(model, cell.config(dino, **config))


@EVERY
def test_1_observing_leaves_training_as_it_is_and_detach_the_model(cell, dino, tmp_path):
    """λ = 0 with the head at work beside it: the base parameters bit for bit after clipped steps."""
    bare = build(cell)
    names = list(bare.state_dict())
    model, handle = attached(cell, dino, weight=0.0, observe=True)
    start = handle.head.up.weight.detach().clone()
    sizes = [[4, 4]] * 3
    steps(cell, bare, tmp_path / "bare", sizes=sizes, clip=0.05)
    steps(cell, model, tmp_path / "observed", sizes=sizes, clip=0.05)
    assert not torch.equal(handle.head.up.weight, start)
    handle.detach()
    assert list(model.state_dict()) == names
    moved = 0
    for (name, p), q, old in zip(bare.named_parameters(), model.parameters(), build(cell).parameters(), strict=True):
        assert torch.equal(p, q), name
        moved += not torch.equal(p, old)
    assert moved


@EVERY
def test_2_gradient_flows_where_it_should_and_not_into_the_anchor(cell, dino):
    model, handle = attached(cell, dino)
    targets: list[torch.Tensor] = []
    for observer in handle._forward.observers.values():

        def watched(prediction, target, *args, look=observer.look, **kwargs):
            targets.append(target)
            return look(prediction, target, *args, **kwargs)

        observer.look = watched
    compiled(cell, model)(**cast(cell, collate(data(cell, handle))))
    assert len(targets) == len(handle.layers)
    assert not any(target.requires_grad for target in targets)
    handle.loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert {f"model.keepsight_head.heads.{layer}.up.weight" for layer in handle.layers} <= reached
    layers = [any(f"language_model.layers.{n}." in name for name in reached) for n in range(4)]
    below = [n < handle.layer and cell.mode != "stage 1" for n in range(4)]
    assert layers == below
    assert any("multi_modal_projector" in name for name in reached)
    assert any("vision_tower" in name for name in reached) is (cell.mode == "full")
    assert reached <= learning
    assert not any("lm_head" in name or "language_model.norm" in name for name in reached)


@EVERY
def test_3_accumulated_micro_batches_are_the_whole_batch(cell, dino, tmp_path):
    """Two pictures in one sample, none in another, answers of unequal length, the gradients of head and model."""
    one, _ = attached(cell, dino)
    two = build(cell)
    keepsight.attach(two, cell.config(dino))
    (whole,) = steps(cell, one, tmp_path / "whole", sizes=[[8]])
    (parts,) = steps(cell, two, tmp_path / "parts", sizes=[[2, 2, 2, 2]])
    assert whole.keys() == parts.keys()
    bound = 0.05 if cell.mode == "bf16" else 1e-4
    for of_head in (True, False):
        names = [name for name in whole if ("keepsight_head" in name) is of_head]
        a, b = (torch.cat([grad[name].flatten().double() for name in names]) for grad in (whole, parts))
        assert a.norm() > 0
        assert (a - b).norm() < bound * a.norm()


@EVERY
def test_4_a_dead_loss_stops_the_run(cell, dino, tmp_path):
    """The other tests train, so alive runs are not stopped."""
    model, handle = attached(cell, dino)
    handle.predictors.heads[str(handle.layer)].requires_grad_(False)
    with pytest.raises(keepsight.DeadLossError, match="the prediction head is frozen"):
        steps(cell, model, tmp_path, sizes=[[4]])


@EVERY
def test_5_text_alone_is_zero_and_connected(cell, dino):
    model, handle = attached(cell, dino)
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])
    out = compiled(cell, model)(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    (out.loss + handle.loss).backward()
    assert handle.loss.item() == 0.0
    assert handle.skipped == 2
    assert all(p.grad is not None and not p.grad.any() for p in handle.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@EVERY
def test_6_stopped_and_resumed_is_uninterrupted(cell, dino, tmp_path):
    sizes = [[4, 4]] * 3
    model, _ = attached(cell, dino, normalise="centred", warmup_steps=4)
    other = build(cell)
    with torch.no_grad():  # whatever it starts from: the checkpoint decides
        for p in other.parameters():
            if p.requires_grad:
                p.add_(1.0)
    keepsight.attach(other, cell.config(dino, normalise="centred", warmup_steps=4))
    if cell.anchor in ("encoder", "moving_average"):
        other = copy.deepcopy(attached(cell, dino, normalise="centred", warmup_steps=4)[0])
    steps(cell, model, tmp_path / "run", sizes=sizes, save=True)
    again = steps(cell, other, tmp_path / "run", sizes=sizes, resume=True)
    assert len(again) == 1
    expected, got = model.state_dict(), other.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert keepsight.handle_of(other).steps == 3


@EVERY
def test_7_capture_is_what_transformers_returns(cell, dino):
    model, handle = attached(cell, dino)
    batch = cast(cell, collate(data(cell, handle)))
    called = compiled(cell, model)
    with capture(Vlm(called), range(5)) as captured:
        out = called(**batch, output_hidden_states=True)
    mask = batch["input_ids"] == IMAGE
    for layer in range(4):
        assert torch.equal(captured.states[layer], out.hidden_states[layer][mask]), layer
    norm = Vlm(called).final_norm
    assert torch.equal(norm(captured.states[4]), out.hidden_states[4][mask])
