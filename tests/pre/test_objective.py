import math

import pytest
import torch

from keepsight.pre.controls import ControlAnchor
from keepsight.pre.head import PredictionHead
from keepsight.pre.normalise import AnchorStatistics
from keepsight.pre.objective import image_means, other_image_index, predictive_loss_sum, token_cosines
from keepsight.pre.sight import _FIELDS, _joined
from keepsight.vlm.grids import ImageTokens


def tokens(image: list[int], column: list[int] | None = None) -> ImageTokens:
    picture = torch.tensor(image)
    zero = torch.zeros_like(picture)
    columns = torch.tensor(column) if column is not None else zero
    n = int(picture.max()) + 1 if image else 0
    return ImageTokens(zero, zero, picture, zero, zero.bool(), zero, columns, grids=(((1, 1),),) * n)


def test_cosine_is_taken_along_features_by_hand():
    prediction = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    anchor = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
    assert token_cosines(prediction, anchor).tolist() == pytest.approx([1.0, 0.0, -1 / math.sqrt(2)])


def test_loss_is_a_mean_over_patches_then_a_sum_over_pictures():
    # Picture 0: cosines 1 and 0 → mean 0.5. Picture 1: one token of cosine -1. A mean over all tokens would give 0.
    prediction = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    anchor = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    assert predictive_loss_sum(prediction, anchor, tokens([0, 0, 1])).item() == pytest.approx(-(0.5 - 1.0))


def test_loss_equals_the_definition_written_as_a_loop():
    generator = torch.Generator().manual_seed(3)
    prediction, anchor = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator)
    image = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    expected = 0.0
    for picture in range(3):
        own = [i for i in range(9) if image[i] == picture]
        cosines = [
            float(prediction[i] @ anchor[i])
            / math.sqrt(float(prediction[i] @ prediction[i]) * float(anchor[i] @ anchor[i]))
            for i in own
        ]
        expected -= sum(cosines) / len(own)
    assert predictive_loss_sum(prediction, anchor, tokens(image)).item() == pytest.approx(expected, abs=1e-6)


def test_no_gradient_enters_the_anchor():
    prediction = torch.randn(4, 3, requires_grad=True)
    anchor = torch.randn(4, 3, requires_grad=True)
    predictive_loss_sum(prediction, anchor, tokens([0, 0, 1, 1])).backward()
    assert anchor.grad is None
    assert prediction.grad.abs().sum() > 0


def test_a_picture_without_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"pictures \[1\] of 3 have no visual token"):
        image_means(torch.ones(2), torch.tensor([0, 2]), 3)


def test_other_image_index_pairs_equal_places_and_leaves_the_rest():
    # Picture 0 has columns 0, 1, 2; picture 1 has columns 0, 2. Cyclic: 0 → 1 → 0.
    place = tokens([0, 0, 0, 1, 1], column=[0, 1, 2, 0, 2])
    assert other_image_index(place).tolist() == [3, -1, 4, 0, 2]
    assert other_image_index(tokens([0, 0], column=[0, 1])).tolist() == [-1, -1]


def test_head_is_two_layers_drawn_from_its_own_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    head = PredictionHead(6, 6, 10, seed=4)
    assert torch.equal(torch.rand(3), expected)  # the global generator did not move
    assert [tuple(p.shape) for p in head.parameters()] == [(10, 6), (10,), (6, 10), (6,)]
    assert all(
        torch.equal(a, b) for a, b in zip(head.parameters(), PredictionHead(6, 6, 10, seed=4).parameters(), strict=True)
    )
    assert not torch.equal(head.up.weight, PredictionHead(6, 6, 10, seed=5).up.weight)
    assert head.up.weight.abs().max() <= 1 / math.sqrt(6)
    x = torch.randn(2, 6)
    by_hand = torch.nn.functional.gelu(x @ head.up.weight.T + head.up.bias) @ head.down.weight.T + head.down.bias
    assert torch.allclose(head(x), by_hand, atol=1e-6)


def test_head_stays_float32_under_casts_and_autocast():
    head = PredictionHead(6, 6, 6, seed=0)
    before = head.up.weight.clone()
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(6, 6), "head": head}).to(torch.bfloat16)
    assert model["body"].weight.dtype == torch.bfloat16
    assert head.up.weight.dtype == torch.float32
    assert torch.equal(head.up.weight, before)  # not rounded on the way
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("choice", [{"granularity": "relational", "distance": "mse"}, {"distance": "infonce"}], ids=str)
def test_loss_and_gradient_under_autocast_are_those_in_float32(choice):
    """Patches that are nearly alike, as visual tokens are: bfloat16 would call all their cosines 1."""
    generator = torch.Generator().manual_seed(0)
    anchor = 1 + 0.02 * torch.randn(6, 8, generator=generator)
    found = []
    for half in (False, True):
        prediction = (1 + 0.02 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1))).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = predictive_loss_sum(prediction, anchor, tokens([0] * 6), **choice)
        loss.backward()
        found.append((loss.item(), prediction.grad))
    (plain, gradient), (mixed, gradient_mixed) = found
    assert mixed == pytest.approx(plain, rel=1e-5)
    assert gradient.norm() > 0
    assert torch.allclose(gradient_mixed, gradient, rtol=1e-4, atol=1e-9)


def test_whitening_under_autocast_is_in_float32():
    statistics = AnchorStatistics(8, whiten=True)
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) + 10
    statistics.collect(x)
    statistics.commit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = statistics(x)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, statistics(x))


def test_what_a_checkpoint_gave_back_goes_to_where_the_batch_lies():
    """It comes on the CPU, whatever the device of the training; "meta" stands for one that we may not have."""
    here = tokens([0] * 4, [0, 1, 2, 3])
    there = ImageTokens(**{name: getattr(here, name).to("meta") for name in _FIELDS}, grids=here.grids)
    anchor, both = _joined(torch.zeros(4, 3, device="meta"), there, torch.zeros(4, 3), here)
    assert (anchor.shape, both.n_images) == ((8, 3), 2)
    assert {anchor.device.type, *(getattr(both, name).device.type for name in _FIELDS)} == {"meta"}
    control = ControlAnchor("other_image", seed=0)
    control.last = torch.zeros(4, 3), (((2, 2),),)
    zero = torch.zeros(4, dtype=torch.long)
    row, column = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    one = ImageTokens(zero, zero, zero, zero, zero.bool(), row, column, grids=(((2, 2),),))
    assert control(torch.zeros(4, 3, device="meta"), one, 0, 0).device.type == "meta"
