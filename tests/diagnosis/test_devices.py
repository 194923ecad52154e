"""Every number of a diagnosis from tokens on another device: the same as on the CPU, and no operation mixes the two."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keepsight.diagnosis import diagnose
from keepsight.diagnosis.collect.accumulate import Accumulator
from keepsight.diagnosis.collect.batch import Batch
from keepsight.diagnosis.collect.calibrate import Calibration
from keepsight.diagnosis.metrics.breakdown import object_rows
from keepsight.diagnosis.metrics.fidelity import Fidelity
from keepsight.diagnosis.metrics.lens import top_and_entropy, top_tokens
from keepsight.diagnosis.metrics.similarity import Similarity
from keepsight.diagnosis.summary import image_rows, spectrum_rows, target_rows
from keepsight.results import Measurement, PerImageBuilder
from keepsight.vlm.load import load_model
from keepsight.vlm.pruning import Pruning
from tests.diagnosis.world import tiny_llava, write_world
from tests.elsewhere import DEVICE, Accelerator

IMAGES, TOKENS, WIDTH, BATCH = 48, 16, 8, 12
LAYERS = (0, 2)


def batch(start: int) -> Batch:
    """Two objects in each picture, tiles and a thumbnail, every token sampled."""
    image = torch.arange(BATCH).repeat_interleave(TOKENS)
    place = torch.arange(TOKENS).repeat(BATCH)
    owner = torch.arange(BATCH).repeat_interleave(2)
    half = torch.arange(2).repeat(BATCH)
    objects = (image == owner[:, None]) & (place // 4 == half[:, None])
    return Batch(
        image=image,
        n_images=BATCH,
        thumbnail=place >= 12,
        objects=objects,
        owner=owner,
        sample=torch.arange(len(image)),
        group=(torch.arange(BATCH) + start) % 10,
        place=place,
        counted=torch.arange(BATCH) % 2 == 0,
        classes=["thing", ""] * BATCH,
    )


def rows_of(folder: Path, device: torch.device) -> list[Measurement]:
    generator = torch.Generator().manual_seed(0)
    labels = [f"class {i % 3}" for i in range(IMAGES)]
    centres = torch.randn(3, WIDTH, generator=generator)[torch.arange(IMAGES) % 3]
    noise = torch.randn(len(LAYERS), IMAGES, TOKENS, WIDTH, generator=generator)
    tokens = noise + centres[:, None] + 0.5 * torch.randn(IMAGES, 1, WIDTH, generator=generator)
    tokens[1, ::5, 3] *= 200.0  # sinks, in some pictures of one layer
    encoder = tokens[0] @ torch.randn(WIDTH, 6, generator=generator)
    starts = range(0, IMAGES, BATCH)
    calibration = Calibration()
    for position, layer in enumerate(LAYERS):
        for start in starts:
            calibration.sink(layer, tokens[position, start : start + BATCH].flatten(0, 1).to(device))
    known = {layer: one.to(device) for layer, one in calibration.finish().items()}
    found = Accumulator(LAYERS, WIDTH, known, folder, bleeding=True, by_object=True)
    for start in starts:
        images = range(start, start + BATCH)
        found.begin(batch(start).to(device))
        for position, layer in enumerate(LAYERS):
            found.sink(layer, tokens[position, images].flatten(0, 1).to(device))
        found.take_encoder(encoder[images].flatten(0, 1).to(device))
        found.append(found.end(images))
    builder = PerImageBuilder([str(i) for i in range(IMAGES)])
    rows = target_rows(found, {"class": labels}, list(range(IMAGES)), 2, builder, seed=0)
    rows += image_rows(found, builder, seed=0) + object_rows(found, builder, seed=0)
    fidelity, similarity = Fidelity(found, builder, 0), Similarity(found, builder, 0)
    rows += fidelity.general_rows()
    for position in range(len(LAYERS)):
        rows += spectrum_rows(found, position, seed=0) + fidelity.rows(position) + similarity.rows(position)
    return rows


def test_rows_are_those_of_the_cpu(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "elsewhere").mkdir()
    expected = rows_of(tmp_path / "cpu", torch.device("cpu"))
    with Accelerator():
        found = rows_of(tmp_path / "elsewhere", DEVICE)
    assert len(found) == len(expected)
    assert {"probe_accuracy", "cohesion", "bleeding", "fidelity", "cka", "participation_ratio"} <= {
        row.metric for row in found
    }
    for row, own in zip(found, expected, strict=True):
        assert row == replace(own, value=row.value, low=row.low, high=row.high), own.key
        for name in ("value", "low", "high"):
            value, other = getattr(row, name), getattr(own, name)
            assert value == (other if other is None else pytest.approx(other, rel=1e-5, abs=1e-7)), own.key


def test_lens():
    hidden, table = torch.randn(20, 4), torch.randn(4, 11)
    expected = top_and_entropy(hidden, lambda x: x @ table)
    with Accelerator():
        there, weights = hidden.to(DEVICE), table.to(DEVICE)
        top, entropy, size = top_and_entropy(there, lambda x: x @ weights)
        assert torch.equal(top.cpu(), expected[0])
        torch.testing.assert_close(entropy.cpu(), expected[1])
        assert size == 11
        assert torch.equal(top_tokens(there, lambda x: x @ weights).cpu(), expected[0])


def test_layers_on_another_device_give_the_same_rows(tmp_path):
    """The second and third layer on the accelerator, as `device_map` places them: what they put out lies there."""
    world, (model, processor) = write_world(tmp_path, per_class=4), tiny_llava()
    options = {"masks": world[1], "metrics": "all", "prunings": [Pruning(1, 0.5)], "progress": False}
    expected = diagnose(model, processor, world[0], **options).rows
    layers = model.model.language_model.layers
    layers[1].register_forward_hook(lambda module, args, output: output.to(DEVICE))
    layers[2].register_forward_pre_hook(lambda module, args: (args[0].cpu(), *args[1:]))
    with Accelerator():
        found = diagnose(model, processor, world[0], **options).rows
    assert found == expected


def test_weights_that_wait_on_the_disk_give_the_same_rows(tmp_path):
    pytest.importorskip("accelerate")
    world = write_world(tmp_path / "world", per_class=4)
    for part in tiny_llava():
        part.save_pretrained(tmp_path / "model")
    options = {"masks": world[1], "metrics": "all", "prunings": [Pruning(1, 0.5)], "progress": False}
    whole = diagnose(*load_model(tmp_path / "model"), world[0], **options)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    for away in (["model.language_model"], ["model.language_model", *places]):
        model, processor = load_model(tmp_path / "model", device_map=places | dict.fromkeys(away, "disk"))
        assert any(parameter.is_meta for parameter in model.parameters())
        found = diagnose(model, processor, world[0], **options)
        assert found.rows == whole.rows
        assert found.info["model"]["fingerprint"] == whole.info["model"]["fingerprint"]
