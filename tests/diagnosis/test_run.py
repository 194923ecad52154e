"""`diagnose` end to end on a tiny model: against values computed from full captures, image by image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from keepsight.diagnosis import Diagnosis, diagnose
from keepsight.diagnosis.data.pictures import find_pictures
from keepsight.diagnosis.metrics.baselines import split_images
from keepsight.diagnosis.metrics.ridge import TEST, TRAIN
from keepsight.results import RunDirectory
from tests.diagnosis.metrics.test_structure import pairwise
from tests.diagnosis.world import LAYERS, TOKENS, WIDTH, picture, states_alone, tiny_llava, write_world
from tests.tiny import gemma


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def parts():
    return tiny_llava()


@pytest.fixture(scope="module")
def result(world, parts) -> Diagnosis:
    return diagnose(*parts, world[0], masks=world[1], batch_size=5, progress=False, calibration_images=24, exact=True)


@pytest.fixture(scope="module")
def states(world, parts) -> torch.Tensor:
    """[L + 1, n, N, d] of every picture, each alone, with the whole prompt."""
    return torch.stack([states_alone(*parts, item.open()[0]) for item in find_pictures(world[0]).items], dim=1)


def value(result: Diagnosis, metric: str, layer: int | None = None, variant: str = "", tokens: str = "all"):
    (row,) = [
        r
        for r in result.rows
        if (r.metric, r.variant, r.tokens) == (metric, variant, tokens) and layer in (None, r.layer)
    ]
    return row


def test_patch_structure_equals_the_pairwise_definition(result, states):
    column = torch.arange(TOKENS) % 8
    members = torch.stack([column < 4, column >= 6])
    for layer in range(LAYERS + 1):
        for variant, centre in (("raw", 0.0), ("centred", states[layer].flatten(0, 1).mean(dim=0))):
            cohesion, coupling = (
                torch.stack(part) for part in zip(*[pairwise(t - centre, members) for t in states[layer]], strict=True)
            )
            row = value(result, "cohesion", layer, variant)
            assert row.value == pytest.approx(cohesion.mean().item(), abs=1e-5)
            assert value(result, "coupling", layer, variant).value == pytest.approx(coupling.mean().item(), abs=1e-5)
            per_image = (cohesion - coupling).mean(dim=1).numpy()
            gap = value(result, "gap", layer, variant)
            half = 2.0686576 * per_image.std(ddof=1) / np.sqrt(24)
            assert (gap.value, gap.high - gap.value) == pytest.approx((per_image.mean(), half), abs=1e-5)
            assert (gap.n, gap.unit, gap.note) == (24, "images", "48 objects")


def test_spectrum_equals_scikit_learn(result, states):
    for layer in range(LAYERS + 1):
        tokens = states[layer].flatten(0, 1).double().numpy()
        ratio = PCA().fit(tokens).explained_variance_ratio_
        row = value(result, "participation_ratio", layer, "covariance")
        assert row.value == pytest.approx(1 / (ratio**2).sum(), rel=1e-5)
        assert (row.n, row.unit) == (24 * TOKENS, "tokens")
        assert row.low < row.value < row.high
        pearson = np.abs(np.corrcoef(tokens.T))
        expected = (pearson.sum() - WIDTH) / (WIDTH * (WIDTH - 1))
        assert value(result, "feature_correlation", layer).value == pytest.approx(expected, rel=1e-5)


def test_homogeneity_and_norm(result, states):
    everything = torch.ones(1, TOKENS, dtype=torch.bool)
    for layer in range(LAYERS + 1):
        expected = []
        for tokens in states[layer]:
            unit = torch.nn.functional.normalize(tokens.double(), dim=1)
            cosine = unit @ unit.T
            expected.append((cosine.sum() - TOKENS) / (TOKENS * (TOKENS - 1)))
        row = value(result, "token_homogeneity", layer, "raw")
        assert row.value == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)
        norm = states[layer].norm(dim=2).mean().item()
        assert value(result, "token_norm", layer).value == pytest.approx(norm, rel=1e-5)
    assert everything.all()


def test_probes_find_the_colour_and_the_default_sample_agrees(result, world, parts):
    assert value(result, "probe_accuracy", 0).value == 1.0
    assert value(result, "probe_accuracy", 0).target == "class"
    sampled = diagnose(*parts, world[0], masks=world[1], batch_size=8, progress=False, calibration_images=24)
    # 24 × 64 tokens are fewer than the sample asked for: both see every token, whatever the batches; the lens takes 256
    assert len(sampled.rows) == len(result.rows)
    for one, other in zip(result.rows, sampled.rows, strict=True):
        assert (one.metric, one.layer, one.variant, one.tokens) == (
            other.metric,
            other.layer,
            other.variant,
            other.tokens,
        )
        if one.value is not None and one.metric not in ("silencing", "lens_entropy"):
            assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-5), one


def test_sample_of_tokens_is_near_all_of_them(world, parts, result, monkeypatch):
    monkeypatch.setattr("keepsight.diagnosis.collect.passes.SAMPLE", 500)
    sampled = diagnose(*parts, world[0], progress=False, calibration_images=24)
    row, full = (value(r, "entropy_rank", 2, "covariance") for r in (sampled, result))
    assert 400 < row.n < 600
    assert row.value == pytest.approx(full.value, rel=0.25)
    assert "seeded sample of tokens" in row.note


def test_fidelity_equals_scikit_learn(result, world, parts, states):
    """At the strength that the row names, on the split that `split_images` makes, with the projector's input hooked."""
    model, processor = parts
    given = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: given.append(args[0][0]))
    for item in find_pictures(world[0]).items:
        states_alone(model, processor, item.open()[0])
    hook.remove()
    part = np.repeat(split_images(24, 0), TOKENS)
    train, test = part == TRAIN, part == TEST

    def standard(tokens):
        table = tokens.flatten(0, 1).double().numpy()
        return (table - table[train].mean(axis=0)) / table[train].std(axis=0)

    for layer in range(LAYERS + 1):
        for metric, target in (("fidelity", torch.stack(given)), ("fidelity_input", states[0])):
            row = value(result, metric, layer)
            strength = float(row.note.split("ridge ")[1].split(" of")[0])
            x, y = standard(states[layer]), standard(target)
            model = Ridge(alpha=strength * train.sum(), fit_intercept=False).fit(x[train], y[train])
            expected = 1 - ((model.predict(x[test]) - y[test]) ** 2).sum() / (y[test] ** 2).sum()
            assert row.value == pytest.approx(expected, abs=2e-4), (metric, layer)
            assert (row.n, row.low < row.value < row.high or layer == 0) == (5, True)
            shares = result.per_image.of(row.key)
            assert (~np.isnan(shares)).sum() == 5
            assert np.nanmean(shares) == pytest.approx(row.value, abs=1e-6)
    assert value(result, "fidelity_input", 0).value > 0.999
    assert value(result, "fidelity", 0).value > value(result, "fidelity", 0, "another image, same place").value + 0.2


def test_the_initial_encoders_output_is_the_target(parts, world):
    """Whatever training made of the encoder: the target is that of the checkpoint that it began with."""
    model, processor = tiny_llava()
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    few = {"layers": [0], "metrics": ["fidelity"], "progress": False}
    own = diagnose(model, processor, world[0], **few)
    found = diagnose(model, processor, world[0], initial=parts[0], **few)
    plain = diagnose(*parts, world[0], **few)
    place = {
        name: value(r, "fidelity", 0, "position only").value for name, r in zip("ofp", (own, found, plain), strict=True)
    }
    assert place["f"] == pytest.approx(place["p"], abs=1e-6)
    assert place["o"] != pytest.approx(place["p"], abs=1e-3)
    assert value(found, "fidelity", 0).value != pytest.approx(value(plain, "fidelity", 0).value, abs=1e-3)
    with pytest.raises(ValueError, match="initial is of family 'gemma3', the model of 'llava'; they must be the same"):
        diagnose(*parts, world[0], initial=gemma(), progress=False)


def test_no_room_for_all_tokens(parts, world, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"exact=True keeps all tokens in .*, about 0.0 GB, and 0.0 GB are free there"):
        diagnose(*parts, world[0], exact=True, progress=False)


def test_metrics_can_be_switched_off(parts, world):
    few = diagnose(*parts, world[0], masks=world[1], layers=[1], metrics=["structure"], progress=False)
    assert {r.metric for r in few.rows} == {
        *("token_norm", "token_homogeneity", "sink_tokens", "sink_channels"),
        *("cohesion", "coupling", "gap", "contrast"),
    }
    none = diagnose(*parts, world[0], masks=world[1], layers=[1], metrics=(), progress=False)
    assert {r.metric for r in none.rows} == {"token_norm", "token_homogeneity", "sink_tokens", "sink_channels"}
    with pytest.raises(
        ValueError,
        match="metrics holds 'structur'; allowed: default, all, or any of probes, structure",
    ):
        diagnose(*parts, world[0], metrics=["structur"], progress=False)


def test_every_layer_has_every_metric(result):
    for metric in ("probe_accuracy", "cohesion", "coupling", "gap", "contrast", "participation_ratio", "entropy_rank"):
        assert {r.layer for r in result.rows if r.metric == metric} == set(range(LAYERS + 1)), metric
    assert {r.tokens for r in result.rows} == {"all", "without sinks"}
    assert result.info["counts"] == {
        "images": 24,
        "skipped images": 0,
        "images with objects": 24,
        "objects": 48,
        "skipped objects": 0,
    }
    assert result.info["prompt"] == "<bos>USER: <image> Describe the picture.\nASSISTANT:"
    assert len(result.info["prompt_sha256"]) == 64


def test_what_each_picture_adds_averages_to_the_number(result, world):
    kept = result.per_image
    assert kept is not None
    rows = {row.key: row for row in result.rows}
    assert set(kept.images) == {str(path.relative_to(world[0])) for path in world[0].rglob("*.png")}
    metrics = {key.metric for key in kept.keys}
    assert metrics >= {"probe_accuracy", "probe_drop", "cohesion", "coupling", "gap", "contrast", "token_homogeneity"}
    assert metrics >= {"fidelity", "fidelity_cosine", "silencing", "lens_entropy", "neighbour_agreement"}
    for key in kept.keys:
        if rows[key].value is not None:
            assert np.nanmean(kept.of(key)) == pytest.approx(rows[key].value, rel=1e-5, abs=1e-5), key


def test_saved_and_reported(result, tmp_path):
    run = result.save(tmp_path / "run")
    assert RunDirectory.open(run.path).read_rows() == result.rows
    loaded = run.load()
    assert len(loaded.examples) == 6
    assert loaded.examples[0].caption == "blue"
    assert set(np.unique(loaded.examples[0].mask)) == {0, 1, 2}
    assert "exact: true" in loaded.config
    assert result.report(tmp_path / "report.html").is_file()
    assert result.table().row_count > 0
    with pytest.raises(FileExistsError, match="already holds a run"):
        result.save(run.path)


def test_mode_and_weights_are_left_alone(world, parts):
    model, processor = parts
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.model.vision_tower.eval()
    try:
        diagnose(model, processor, world[0], layers=["middle"], progress=False)
        assert model.training
        assert not model.model.vision_tower.training
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    finally:
        model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_same_seed_same_rows(world, parts, result):
    again = diagnose(*parts, world[0], masks=world[1], batch_size=5, progress=False, calibration_images=24, exact=True)
    assert again.rows == result.rows


def test_flat_list_without_labels_or_masks_says_so(parts):
    pictures = [picture("red", i)[0] for i in range(4)]
    result = diagnose(*parts, pictures, layers=[0, "last"], progress=False)
    (probe,) = [r for r in result.rows if r.metric.startswith("probe")]
    assert probe.value is None
    assert probe.note.startswith("no labels")
    (gap,) = [r for r in result.rows if r.metric == "gap"]
    assert gap.note == "no masks were given"
    assert {r.layer for r in result.rows if r.metric == "token_norm"} == {0, LAYERS}


def test_sinks_are_counted_and_left_out(world, parts):
    """One position's token made 300 times longer, one channel 50 times: with and without them."""
    model, processor = parts

    def grow(module, args, output):
        output = output.clone()
        output[:, 5] *= 300.0
        output[:, :, 7] *= 50.0
        return output

    hook = model.model.multi_modal_projector.register_forward_hook(grow)
    try:
        spoiled = diagnose(model, processor, world[0], masks=world[1], layers=[0], progress=False)
    finally:
        hook.remove()
    clean = diagnose(model, processor, world[0], masks=world[1], layers=[0], progress=False)
    assert value(spoiled, "sink_tokens", 0).value == 1.0
    assert value(spoiled, "sink_channels", 0).value == 1.0
    assert value(clean, "sink_tokens", 0).value == 0.0
    bare = value(spoiled, "participation_ratio", 0, "covariance", "without sinks")
    expected = value(clean, "participation_ratio", 0, "covariance")
    assert value(spoiled, "participation_ratio", 0, "covariance").value < 1.1
    assert bare.value == pytest.approx(expected.value, rel=0.1)
    assert value(spoiled, "gap", 0, "centred", "without sinks").value == pytest.approx(
        value(clean, "gap", 0, "centred").value, abs=0.05
    )


def test_broken_pictures_stop_or_are_counted(tmp_path, parts):
    images, masks = write_world(tmp_path, per_class=4)
    whole = (images / "red" / "01.png").read_bytes()
    (images / "red" / "01.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"image 'red/01.png' cannot be read .*skip_broken=True \(--skip-broken\)"):
        diagnose(*parts, images, progress=False)
    result = diagnose(*parts, images, masks=masks, skip_broken=True, progress=False)
    assert result.info["counts"]["images"] == 11
    assert result.info["counts"]["skipped images"] == 1
    assert result.info["skipped"] == ["red/01.png"]
    assert {r.n for r in result.rows if r.metric == "gap"} == {11}


def test_classes_that_broken_pictures_leave_too_small_are_left_out(tmp_path, parts):
    images, _ = write_world(tmp_path, per_class=4)
    for number in range(3):
        (images / "red" / f"0{number}.png").write_text("")
    names = [item.name for item in find_pictures(images).items]
    labels = {
        "colour": [name.split("/")[0] for name in names],
        "red or not": ["red" if name.startswith("red") else "not" for name in names],
    }
    result = diagnose(*parts, images, labels=labels, layers=[0], skip_broken=True, progress=False)
    assert result.info["counts"]["classes left out of probes"] == 2
    (note,) = [r.note for r in result.rows if r.metric == "probe_classes_left_out" and r.target == "colour"]
    assert note == "1 of 3 classes left out ('red'): broken pictures leave fewer than two of each"
    assert {r.value is None for r in result.rows if r.metric == "probe_accuracy" and r.target == "colour"} == {False}
    (lost,) = [r for r in result.rows if r.metric == "probe_accuracy" and r.target == "red or not"]
    assert lost.value is None
    assert lost.note.startswith("broken pictures leave fewer than two classes")
    assert "1 of 3 classes left out" in result.report(tmp_path / "report.html").read_text()
    assert result.table().row_count > 0


def test_broken_pictures_of_the_calibration_are_replaced(tmp_path, parts):
    for number in range(30):
        picture("red", number)[0].save(tmp_path / f"{number:02d}.png")
    first = np.random.default_rng([0, 5]).permutation(30)[:8]  # the calibration's
    for number in first:
        (tmp_path / f"{number:02d}.png").write_text("")
    result = diagnose(*parts, tmp_path, layers=[0], skip_broken=True, progress=False)
    assert (result.info["counts"]["images"], result.info["counts"]["skipped images"]) == (22, 8)
    for file in tmp_path.iterdir():
        file.write_text("")
    with pytest.raises(ValueError, match=r"none of the 30 pictures can be read, such as '00.png'"):
        diagnose(*parts, tmp_path, layers=[0], skip_broken=True, progress=False)


def test_masks_of_0_and_255_say_why_they_hold_no_object(parts):
    pictures = [picture("red", i)[0] for i in range(3)]
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    result = diagnose(*parts, pictures, masks=[mask] * 3, layers=[0], progress=False)
    (gap,) = [r for r in result.rows if r.metric == "gap"]
    assert gap.note.startswith("all non-zero pixels of the masks are 255, which means ignore")


def test_bad_input_is_named(tmp_path, parts, world):
    images, masks = write_world(tmp_path, per_class=2)
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(masks / "blue" / "00.png")
    with pytest.raises(ValueError, match="no class has three pictures"):
        diagnose(*parts, images, progress=False)
    with pytest.raises(ValueError, match=r"the mask of 'blue/00\.png' is 7 × 5 pixels, its picture 32 × 32"):
        diagnose(*parts, images, masks=masks, labels=["a", "b"] * 3, progress=False)
    with pytest.raises(ValueError, match=r"layer 9 does not exist in this 'llava' model: allowed are 0 to 4"):
        diagnose(*parts, world[0], layers=[9], progress=False)
    with pytest.raises(ValueError, match=r"layers is empty; give \"all\" or at least one layer"):
        diagnose(*parts, world[0], layers=[], progress=False)
    with pytest.raises(ValueError, match="label set 'class': class 'dog' has one picture"):
        diagnose(*parts, images, labels=["cat"] * 5 + ["dog"], progress=False)
    with pytest.raises(ValueError, match="seed is -1; allowed: 0 or more"):
        diagnose(*parts, world[0], seed=-1, progress=False)
    with pytest.raises(ValueError, match=r"the prompt '<image> what' holds the image placeholder '<image>'; give the"):
        diagnose(*parts, world[0], prompt="<image> what", progress=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        diagnose(*parts, world[0], batch_size=0, progress=False)
