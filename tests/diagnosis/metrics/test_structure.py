"""Patch structure against hand-computed values, the pairwise definition and planted data."""

import math

import pytest
import torch

from keepsight.diagnosis.metrics.structure import Groups, membership, patch_structure, structure


def pairwise(tokens: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition itself, from the N × N matrix of cosines in float64."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=1)
    cosine = unit @ unit.T
    cohesion, coupling = [], []
    for inside in members:
        block = cosine[inside][:, inside]
        n = block.shape[0]
        cohesion.append((block.sum() - block.diagonal().sum()) / (n * (n - 1)))
        coupling.append(cosine[inside][:, ~inside].mean())
    return torch.stack(cohesion), torch.stack(coupling)


def random_case(seed: int, n: int = 60, d: int = 24, shared: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (n,), generator=generator)
    tokens = torch.randn(n, d, generator=generator) + torch.randn(4, d, generator=generator)[label] + shared
    return tokens, torch.stack([label == k for k in range(3)])


def test_by_hand():
    tokens = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-5.0, 0.0]])
    members = torch.tensor([[True, True, False, False], [False, False, True, True]])
    result = patch_structure(tokens, members)
    root = 1 / math.sqrt(2)
    assert result.cohesion.tolist() == pytest.approx([0.0, -root], abs=1e-6)
    assert result.coupling.tolist() == pytest.approx([(root - 1 + root + 0) / 4] * 2, abs=1e-6)
    assert result.gap.tolist() == pytest.approx([-(2 * root - 1) / 4, -root - (2 * root - 1) / 4], abs=1e-6)
    # the six pairs of the image: 0, root, -1, root, 0, -root
    assert result.homogeneity.tolist() == pytest.approx([(root - 1) / 6], abs=1e-6)


@pytest.mark.parametrize("shared", [0.0, 30.0])
def test_equals_the_pairwise_definition(shared):
    tokens, members = random_case(1, shared=shared)
    for centre in (None, tokens.mean(dim=0)):
        result = patch_structure(tokens, members, centre=centre)
        cohesion, coupling = pairwise(tokens if centre is None else tokens - centre, members)
        torch.testing.assert_close(result.cohesion.double(), cohesion, atol=1e-5, rtol=0)
        torch.testing.assert_close(result.coupling.double(), coupling, atol=1e-5, rtol=0)


def test_paper_size_equals_the_pairwise_definition_across_chunks():
    tokens, members = random_case(2, n=576, d=1024)
    result = patch_structure(tokens, members)
    cohesion, coupling = pairwise(tokens, members)
    torch.testing.assert_close(result.cohesion.double(), cohesion, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.coupling.double(), coupling, atol=1e-5, rtol=0)


@pytest.mark.parametrize("far_fewer", [False, True])
def test_objects_that_overlap_equal_the_pairwise_definition(far_fewer):
    """Tokens of the same objects are one part; past two parts a group, the groups are summed themselves."""
    tokens, members = random_case(9)
    nested = torch.stack([members[0] | members[1], (torch.arange(60) % 2 == 0) & members[0]])
    members = torch.cat([members, nested])
    if far_fewer:
        members = torch.cat([members, torch.rand(4, 60, generator=torch.Generator().manual_seed(0)) > 0.5])
    groups = Groups.build(torch.zeros(60, dtype=torch.long), 1, members, torch.zeros(len(members), dtype=torch.long))
    assert (len(groups.parts), len(groups.weights)) == ((10, 10) if far_fewer else (5, 6))
    assert groups.weights.bool().equal(torch.cat([torch.ones(1, 60, dtype=torch.bool), members]))
    result = structure(tokens, groups)
    cohesion, coupling = pairwise(tokens, members)
    torch.testing.assert_close(result.cohesion.double(), cohesion, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.coupling.double(), coupling, atol=1e-5, rtol=0)


def test_planted_structure():
    """Orthogonal objects: cohesion 1, coupling 0. One shared direction of equal size: coupling 1/2."""
    label = torch.arange(12) % 3
    tokens = torch.eye(8)[label]
    members = torch.stack([label == k for k in range(3)])
    clean = patch_structure(tokens, members)
    assert clean.cohesion.tolist() == pytest.approx([1.0] * 3)
    assert clean.coupling.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    shared = patch_structure(tokens + torch.eye(8)[7], members)
    assert shared.coupling.tolist() == pytest.approx([0.5] * 3, abs=1e-6)
    centred = patch_structure(tokens + 9 * torch.eye(8)[7], members, centre=(tokens + 9 * torch.eye(8)[7]).mean(dim=0))
    assert centred.coupling.tolist() == pytest.approx([-0.5] * 3, abs=1e-5)  # corners of a triangle


def test_batch_equals_its_images_one_by_one():
    cases = [random_case(seed, n=n) for seed, n in ((3, 40), (4, 25), (5, 60))]
    tokens = torch.cat([case[0] for case in cases])
    image = torch.cat([torch.full((case[0].shape[0],), i) for i, case in enumerate(cases)])
    owner = torch.arange(3).repeat_interleave(3)
    objects = torch.block_diag(*[case[1].float() for case in cases]).bool()
    groups = Groups.build(image, 3, objects, owner)
    batch = structure(tokens, groups)
    alone = [patch_structure(*case) for case in cases]
    torch.testing.assert_close(batch.cohesion, torch.cat([a.cohesion for a in alone]), atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.coupling, torch.cat([a.coupling for a in alone]), atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.homogeneity, torch.cat([a.homogeneity for a in alone]), atol=1e-6, rtol=0)
    torch.testing.assert_close(groups.image_mean(batch.gap[:, None])[:, 0], torch.stack([a.gap.mean() for a in alone]))


def test_leaving_tokens_and_channels_out_equals_deleting_them():
    tokens, members = random_case(6)
    keep_token = torch.arange(60) % 7 != 0
    keep_channel = torch.arange(24) % 5 != 0
    groups = Groups.build(torch.zeros(60, dtype=torch.long), 1, members, torch.zeros(3, dtype=torch.long))
    masked = structure(tokens, groups.keep(keep_token), channels=keep_channel.float())
    deleted = patch_structure(tokens[keep_token][:, keep_channel], members[:, keep_token])
    torch.testing.assert_close(masked.gap, deleted.gap, atol=1e-6, rtol=0)
    torch.testing.assert_close(masked.homogeneity, deleted.homogeneity, atol=1e-6, rtol=0)


def test_objects_without_pairs_are_undefined_and_left_out_of_the_image():
    tokens, _ = random_case(7, n=10)
    one = torch.zeros(10, dtype=torch.bool)
    one[0] = True
    everything = torch.ones(10, dtype=torch.bool)
    empty = torch.zeros(10, dtype=torch.bool)
    halves = torch.arange(10) < 5
    objects = torch.stack([one, everything, empty, halves])
    groups = Groups.build(torch.zeros(10, dtype=torch.long), 2, objects, torch.zeros(4, dtype=torch.long))
    result = structure(tokens, groups)
    for values in (result.cohesion, result.coupling, result.gap):
        assert values.isnan().tolist() == [True, True, True, False]
    means = groups.image_mean(result.gap[:, None])[:, 0]
    assert means[0] == pytest.approx(result.gap[3].item())
    assert means[1].isnan()  # the second image has neither tokens nor objects


def test_zero_tokens_have_cosine_zero():
    tokens, members = random_case(8)
    tokens[members[0]] = 0.0
    result = patch_structure(tokens, members)
    assert result.cohesion[0] == 0.0
    assert result.coupling[0] == 0.0


def test_membership_takes_half_and_refuses_other_things():
    coverage = torch.tensor([[0.5, 0.49, 1.0], [0.5, 0.51, 0.0]])
    assert membership(coverage).tolist() == [[True, False, True], [True, True, False]]
    with pytest.raises(ValueError, match=r"area shares in \[0, 1\]; got shape \(1, 1\) with values in \[7, 7\]"):
        membership(torch.tensor([[7.0]]))
    with pytest.raises(ValueError, match=r"members must be \[K, 4\], one column per token; got shape \(2, 3\)"):
        patch_structure(torch.randn(4, 2), torch.ones(2, 3, dtype=torch.bool))


def test_a_batch_without_objects_has_no_structure_but_keeps_its_homogeneity():
    tokens, _ = random_case(9, n=10)
    groups = Groups.build(torch.arange(10) // 5, 2)
    result = structure(tokens, groups)
    assert result.cohesion.shape == (0,)
    assert groups.image_mean(torch.zeros(0, 4)).isnan().all()
    assert result.homogeneity[1].item() == pytest.approx(
        structure(tokens[5:], Groups.build(torch.zeros(5), 1)).homogeneity.item(), abs=1e-6
    )
