"""The table of docs/data.md: what people have in their folders, and what becomes of it."""

import numpy as np
import pytest
from PIL import Image

from keepsight.diagnosis import diagnose
from keepsight.diagnosis.data.pictures import find_pictures
from keepsight.images import ImageError
from tests.diagnosis.world import SIDE, picture, tiny_llava

FEW = {"layers": [0], "progress": False}


@pytest.fixture(scope="module")
def parts():
    return tiny_llava()


def norms(result):
    (key,) = [key for key in result.per_image.keys if (key.metric, key.tokens) == ("token_norm", "all")]
    return dict(zip(result.per_image.images, result.per_image.of(key), strict=True))


def test_every_kind_of_picture_counts_as_what_it_shows(parts, tmp_path):
    """Grey, palette, CMYK, turned, and animated: the same as what one would save by hand as RGB."""
    colour = Image.new("RGB", (SIDE, SIDE), (200, 40, 40))
    colour.paste((10, 10, 200), (0, 0, SIDE, SIDE // 2))
    colour.convert("L").save(tmp_path / "grey.png")
    colour.convert("L").convert("RGB").save(tmp_path / "grey-rgb.png")
    colour.quantize(2).save(tmp_path / "palette.png")
    colour.save(tmp_path / "palette-rgb.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.tif")
    colour.convert("CMYK").convert("RGB").save(tmp_path / "cmyk-rgb.png")
    clear = colour.convert("RGBA")
    clear.putalpha(40)
    clear.save(tmp_path / "clear.png")
    colour.save(tmp_path / "clear-rgb.png")
    exif = Image.Exif()
    exif[274] = 6
    colour.save(tmp_path / "turned.png", exif=exif)
    colour.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned-rgb.png")
    colour.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "white")])
    Image.open(tmp_path / "animated.gif").convert("RGB").save(tmp_path / "animated-rgb.png")
    result = diagnose(*parts, tmp_path, metrics=(), **FEW)
    found = norms(result)
    for name in ("grey.png", "palette.png", "cmyk.tif", "clear.png", "turned.png", "animated.gif"):
        stem = name.partition(".")[0]
        assert found[name] == pytest.approx(found[f"{stem}-rgb.png"], rel=1e-5), name
    assert len({round(float(value), 4) for value in found.values()}) > 2
    assert result.info["counts"]["animated images, first frame taken"] == 1


def test_one_pixel_and_very_long_pictures(parts, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (1, 4000), "red").save(tmp_path / "line.png")
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "square.png")
    found = norms(diagnose(*parts, tmp_path, metrics=(), **FEW))
    assert found["dot.png"] == pytest.approx(found["square.png"], rel=1e-5)
    assert found["line.png"] == pytest.approx(found["square.png"], rel=1e-5)


def test_what_the_processor_refuses_is_named_or_left_out(parts, monkeypatch):
    model, processor = parts
    given = type(processor).__call__

    def refuse(self, images=None, **more):
        if any(min(image.size) == 2 for (image,) in images):
            raise ValueError("height must be larger than factor")
        return given(self, images=images, **more)

    monkeypatch.setattr(type(processor), "__call__", refuse)
    pictures = [picture("red", i)[0] for i in range(4)]
    pictures[2] = Image.new("RGB", (9, 2))
    with pytest.raises(ImageError, match=r"'picture 2' of 9 × 2 pixels is refused by .*\(ValueError: height must"):
        diagnose(model, processor, pictures, metrics=(), **FEW)
    result = diagnose(model, processor, pictures, metrics=(), skip_broken=True, **FEW)
    assert result.info["skipped"] == ["picture 2"]
    assert list(result.per_image.images) == ["picture 0", "picture 1", "picture 3"]


def test_pictures_too_large_for_pillow_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("L", (11, 10)).save(tmp_path / "huge.png")
    with pytest.raises(
        ImageError, match=r"'huge.png' is too large to be decoded \(.*110 pixels.*allowed are 100 pixels"
    ):
        find_pictures(tmp_path).items[0].open()


def test_masks_without_objects_and_of_one_patch_are_counted(parts):
    pictures = [picture("red", i)[0] for i in range(4)]
    masks = [np.zeros((SIDE, SIDE), np.uint8) for _ in range(3)]
    masks[1][:16] = 1
    masks[2][:4, :4] = 1  # one patch
    masks[2][16:, :] = 2
    result = diagnose(*parts, pictures, masks=[*masks, None], metrics=["structure"], **FEW)
    counts = result.info["counts"]
    assert (counts["images"], counts["images with objects"], counts["objects"], counts["skipped objects"]) == (
        4,
        2,
        2,
        1,
    )
    (gap,) = [r for r in result.rows if (r.metric, r.variant, r.tokens) == ("gap", "raw", "all")]
    assert (gap.n, gap.note) == (2, "2 objects, 1 skipped (fewer than two patches, or none outside)")


def test_a_file_listed_twice_is_counted_under_two_names(parts, tmp_path):
    path = tmp_path / "a.png"
    picture("red", 0)[0].save(path)
    result = diagnose(*parts, [path, path], metrics=(), **FEW)
    assert list(result.per_image.images) == [str(path), f"{path} (2)"]
    assert result.info["counts"]["repeated images"] == 1


def test_files_in_formats_that_are_not_read_are_counted(parts, tmp_path):
    (tmp_path / "b.HEIC").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"no pictures in .* not \.avif, .* \(1 files\)"):
        diagnose(*parts, tmp_path, metrics=(), **FEW)
    picture("red", 0)[0].save(tmp_path / "a.png")
    result = diagnose(*parts, tmp_path, metrics=(), **FEW)
    counts = result.info["counts"]
    assert (counts["images"], counts["files in formats that are not read"]) == (1, 1)


def test_phones_second_pictures_are_no_animation(tmp_path):
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    from keepsight.images import is_animated

    image = find_pictures(tmp_path).items[0].open()[0]
    assert not is_animated(image)
    assert image.getpixel((0, 0))[0] > 200


def test_masks_among_the_pictures_are_no_pictures_whatever_is_measured(parts, tmp_path):
    """Also where nothing that is measured needs masks, which are then not read."""
    for number in range(4):
        image, mask = picture("red", number)
        image.save(tmp_path / f"{number}.jpg")
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    result = diagnose(*parts, tmp_path, masks=tmp_path, metrics=["spectrum"], **FEW)
    assert list(result.per_image.images) == [f"{number}.jpg" for number in range(4)]


@pytest.mark.parametrize("calibrated", [4, 1], ids=["in the calibration", "later"])
def test_states_that_are_no_numbers_are_refused(parts, calibrated):
    """One picture of four, at one layer: it would spoil the means of all in its batch."""

    def overflow(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if len(hidden) == 4:
            hidden[0] = float("inf")
        return output

    pictures = [picture("red", i)[0] for i in range(4)]
    hook = parts[0].model.language_model.layers[1].register_forward_hook(overflow)
    try:
        with pytest.raises(
            ValueError, match=r"64 of 256 visual tokens .* NaN or infinite at layer 2: .*--dtype float32"
        ):
            diagnose(*parts, pictures, calibration_images=calibrated, layers=[0, 2], progress=False)
    finally:
        hook.remove()


def test_too_few_pictures_of_a_class_say_whether_a_limit_is_why_and_what_can_be_measured(parts):
    pictures, labels = [picture("red", i)[0] for i in range(6)], ["red", "blue"] * 3
    asked = r"; or measure what needs no classes \(--metrics structure,spectrum,"
    with pytest.raises(ValueError, match=r"label set 'class': class 'red' has one picture.*" + asked):
        diagnose(*parts, pictures[:4], labels=["red", *["blue"] * 3], **FEW)
    few = r"label set 'class', of the pictures that classes and limit leave: "
    with pytest.raises(ValueError, match=few + r"class 'blue' has one picture \(2 such classes\).*" + asked):
        diagnose(*parts, pictures, labels=labels, limit=2, **FEW)
    with pytest.raises(ValueError, match=few + "a probe needs at least two classes; got .'red'.*" + asked):
        diagnose(*parts, pictures, labels=labels, classes=["red"], **FEW)
    diagnose(*parts, pictures, labels=labels, limit=2, metrics=["spectrum"], **FEW)
