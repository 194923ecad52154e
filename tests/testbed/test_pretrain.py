import logging

import pytest
import torch
from torch import nn

from keepsight.testbed import _text, models, pretrain
from keepsight.testbed._deepen import deepened
from keepsight.testbed._loop import Schedule, train
from keepsight.testbed._text import dialogue, encode, text_loss
from keepsight.testbed._vision import patch_objects
from keepsight.testbed.drawing import render
from keepsight.testbed.scenes import draw_scenes

TINY = Schedule(steps=6, batch=2, lr=1e-3, horizon=6, rundown=2, warmup=2, save_every=2, matrix_lr=0.01)


def test_schedule_by_hand():
    s = Schedule(steps=10, batch=1, lr=1.0, horizon=22, rundown=4, warmup=2)
    assert [s.rate(0), s.rate(1)] == [0.5, 1.0]
    assert s.rate(2) == pytest.approx(1.0)
    assert s.rate(12) == pytest.approx(0.505 * (10 - 12) / 4)  # half-way of the cosine, times the run-down
    assert s.rate(6) == pytest.approx(Schedule(20, 1, 1.0, horizon=22, rundown=4, warmup=2).rate(6))
    assert s.rate(9) == pytest.approx(Schedule(20, 1, 1.0, horizon=22, rundown=4, warmup=2).rate(9) / 4)


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    def fresh():
        return models.new_language_model("qwen2", 0)

    whole = fresh()
    train(whole, lambda step: text_loss(whole, step, 2), TINY, tmp_path / "whole.pt")

    class KilledError(Exception):
        pass

    def until(model, last):
        def loss_of(step):
            if step == last:
                raise KilledError
            return text_loss(model, step, 2)

        return loss_of

    stopped = fresh()
    with pytest.raises(KilledError):
        train(stopped, until(stopped, 5), TINY, tmp_path / "parts.pt")
    resumed = fresh()
    train(resumed, lambda step: text_loss(resumed, step, 2), TINY, tmp_path / "parts.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.lm_head.weight, fresh().lm_head.weight)
    # A finished stage does nothing more.
    train(resumed, until(resumed, 0), TINY, tmp_path / "parts.pt")


def test_new_parts_leave_the_global_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.new_encoder(1)
    models.new_language_model("llama", 1)
    assert torch.equal(torch.rand(3), expected)


def test_fast_encoding_is_the_tokenizers_and_the_templates():
    _, processor = models.join(models.new_encoder(0), models.new_language_model("llama", 0))
    for scene in draw_scenes(31, 20):
        context, turns = _text.text_turns(scene, 4)
        messages = []
        for number, (question, answer) in enumerate(turns):
            asked = f"{context} {question}" if number == 0 else question
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        out = processor.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids, said = dialogue(context, turns)
        assert ids == out["input_ids"]
        assert said == [bool(flag) for flag in out["assistant_masks"]]
    assert encode("<image>") == [processor.image_token_id]


def test_patch_objects_by_hand():
    import numpy as np

    mask = np.zeros((1, 64, 64), dtype=np.uint8)
    mask[0, :8, :4] = 1  # exactly half of patch 0
    mask[0, :8, 8:11] = 1  # three eighths of patch 1: background has the rest
    mask[0, :8, 16:19] = 1  # patch 2: three eighths one object, three eighths another, a quarter background
    mask[0, :8, 19:22] = 2
    mask[0, 8:16, :8] = 2  # patch 8 whole
    owner = patch_objects(mask)[0]
    assert owner.shape == (64,)
    assert owner[1] == 0
    assert owner[2] == -1
    assert owner[8] == 2
    assert owner[0] in (0, 1)  # a tie
    _, masks = render(draw_scenes(3, 2))
    for m, owners in zip(masks, patch_objects(masks), strict=True):
        for index in range(64):
            tile = m[8 * (index // 8) : 8 * (index // 8) + 8, 8 * (index % 8) : 8 * (index % 8) + 8]
            counts = np.bincount(tile.ravel(), minlength=5)
            assert owners[index] == (counts.argmax() if counts.max() >= 32 else -1)


def test_stages_need_the_ones_before(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights .*llama.safetensors are missing; reinstall keepsight, or"):
        pretrain.run_stage("qwen2", tmp_path, tmp_path)


@pytest.mark.slow
def test_every_stage_runs_and_its_weights_load(tmp_path, monkeypatch, caplog):
    short = {name: Schedule(1, 2, 1e-3, horizon=1, rundown=1, warmup=1) for name in pretrain.STAGES}
    monkeypatch.setattr(pretrain, "STAGES", short)
    monkeypatch.setattr(pretrain, "SHORT", Schedule(1, 2, 1e-3, horizon=1, rundown=1, warmup=1, matrix_lr=0.01))
    with caplog.at_level(logging.INFO):
        for stage in short:
            pretrain.run_stage(stage, tmp_path / "work", tmp_path / "out")
    for language in models.LANGUAGES:
        model, _ = models.build_vlm(language, folder=tmp_path / "out")
        fresh, _ = models.build_vlm(language, aligned=False, folder=tmp_path / "out")
        same = {name: torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items()}
        assert {name for name, equal in same.items() if not equal} == {
            name for name in same if "multi_modal_projector" in name
        }
    assert "encoder 1/1" in caplog.text


def test_unknown_names_are_refused(capsys):
    with pytest.raises(ValueError, match="unknown language model 'gpt'; the testbed has llama, qwen2"):
        models.new_language_model("gpt", 0)
    with pytest.raises(SystemExit):
        pretrain.main(["decoder"])
    assert "unknown stages decoder; allowed are encoder, llama" in capsys.readouterr().err


def test_projector_stage_moves_the_projector_alone():
    model, _ = models.join(models.new_encoder(0), models.new_language_model("llama", 0))
    task = pretrain.ProjectorTask(model)
    loss, _ = task.loss(0, 2)
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}
    assert isinstance(task, nn.Module)


@pytest.mark.parametrize("language", models.LANGUAGES)
def test_first_layer_starts_by_looking_back_by_fixed_distances(language):
    model = models.new_language_model(language, 0)
    model.set_attn_implementation("eager")
    ids = torch.randint(7, len(models.vocabulary()), (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[0][0]  # [heads, S, S]
    for head in range(4):
        looked = attention[head, 10:].argmax(dim=1)
        assert (torch.arange(10, 40) - looked).tolist() == [head + 1] * 30


def test_later_layers_start_by_looking_at_their_own_kind():
    layers = models.new_language_model("llama", 0).model.layers
    for layer in layers[1:]:
        assert torch.equal(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    assert not torch.equal(layers[0].self_attn.q_proj.weight, layers[0].self_attn.k_proj.weight)


def test_a_deepened_model_computes_what_the_short_one_does():
    short = models.new_language_model("llama", 3, layers=3)
    deep = deepened(short, 4)
    assert deep.config.num_hidden_layers == 8
    ids = torch.randint(7, len(models.vocabulary()), (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(deep(input_ids=ids).logits, short(input_ids=ids).logits, atol=1e-5)
    deep(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.mlp.down_proj.weight.grad.abs().sum() > 0 for layer in deep.model.layers)  # and all can learn
