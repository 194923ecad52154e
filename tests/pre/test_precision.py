"""Sums where there is no float64, as on Apple's GPUs; none is at hand, so any use of float64 is made an error."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import keepsight
from keepsight.pre import curves, normalise
from keepsight.pre.curves import Curves
from keepsight.pre.float32 import finest
from keepsight.pre.head import PredictionHead
from tests.tiny import llava_clip_llama
from tests.training.test_trainer import collate, samples


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype is torch.float64:
            raise TypeError(f"{func} made a float64 tensor")
        return out


def test_what_sums_are_kept_in():
    assert finest(torch.device("mps")) is torch.float32
    assert finest(torch.device("cpu")) is finest(torch.device("cuda:1")) is torch.float64


@pytest.mark.parametrize("config", [{}, {"normalise": "whitened"}], ids=["paper", "whitened"])
def test_a_training_step_needs_no_float64(monkeypatch, config):
    read = {}
    for kind in (torch.float64, torch.float32):
        for module in (curves, normalise):
            monkeypatch.setattr(module, "finest", lambda device, kind=kind: kind)
        model, _ = llava_clip_llama()
        handle = keepsight.attach(model.train(), keepsight.PReConfig(**config))
        optimizer, kept = torch.optim.AdamW(keepsight.param_groups(model), lr=1e-3), Curves()
        for _ in range(2):
            loss = model(**collate(samples())).loss + handle.loss
            loss.backward()
            optimizer.step()
        with NoFloat64() if kind is torch.float32 else torch.enable_grad():
            loss = model(**collate(samples())).loss + handle.loss
            loss.backward()
            kept.add(handle, loss.detach())
            handle.stepped()
        kept.steps = 1
        read[kind] = kept.read(lambda sums: sums)[0]
    assert read[torch.float32] == pytest.approx(read[torch.float64], abs=1e-5)


def test_a_head_whose_weights_were_rounded_computes_in_float32():
    """As DeepSpeed's bf16 leaves it, which replaces the data of parameters; their gradients are of their type."""
    head = PredictionHead(8, 6, 16, seed=0)
    for parameter in head.parameters():
        parameter.data = parameter.data.bfloat16()
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    up, up_bias, down, down_bias = (parameter.detach().double() for parameter in head.parameters())
    expected = torch.nn.functional.gelu(states.double() @ up.T + up_bias) @ down.T + down_bias
    found = head(states)
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-6)
    found.sum().backward()
    assert head.up.weight.grad.dtype is torch.bfloat16
