"""Opening pictures: upright, in RGB, whole or named as broken; and only inside their folder."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keepsight.images import ImageError, decode, inside, open_image, refuse_url, resolve_image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    return folder


def test_symbolic_links_inside_the_folder_are_followed(tmp_path: Path, pictures: Path) -> None:
    os.symlink(pictures / "red.png", pictures / "alias.png")
    os.symlink(tmp_path, pictures / "away", target_is_directory=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    assert resolve_image("alias.png", pictures) == pictures / "red.png"
    for reference in ("away/outside.png", "../outside.png", "/etc/passwd"):
        with pytest.raises(ImageError, match=r"leaves the image folder .*allowed are files inside.*Move or copy it"):
            resolve_image(reference, pictures)
    with pytest.raises(ImageError, match=r"mask '../x.png' leaves the mask folder"):
        inside("../x.png", pictures, "mask")
    assert inside("not/there.png", pictures) == pictures / "not" / "there.png"


def test_what_is_not_there_or_not_local(pictures: Path) -> None:
    with pytest.raises(ImageError, match=r"image 'blue.png' is missing: there is no file '.*blue.png'"):
        resolve_image("blue.png", pictures)
    with pytest.raises(ImageError, match="no image folder was given; set `image_folder`"):
        resolve_image("red.png", None)
    for url in ("https://example.org/a.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ImageError, match=r"is a URL; pictures are read from local files only\. Download it"):
            refuse_url(url)


def test_turned_upright_in_rgb(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (8, 4))
    exif = sideways.getexif()
    exif[0x0112] = 6  # rotate a quarter turn
    sideways.save(tmp_path / "sideways.jpg", exif=exif)
    assert open_image(tmp_path / "sideways.jpg", "sideways.jpg").size == (4, 8)
    Image.new("LA", (3, 3)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png", "grey.png").mode == "RGB"
    assert decode(tmp_path / "grey.png", "a mask").mode == "LA"
    assert open_image(lambda: (tmp_path / "grey.png").read_bytes(), "grey.png").size == (3, 3)


@pytest.mark.parametrize("told", [False, True])
def test_what_is_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """Also where another package, such as lmms-eval, has told Pillow to fill half a picture with grey."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", told)
    noise = np.random.default_rng(0).integers(0, 255, (16, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    whole = (tmp_path / "wide.png").read_bytes()
    with pytest.raises(ImageError, match=r"image 'wide.png' cannot be read .*may be truncated.* skip_broken=True"):
        open_image(whole[: len(whole) // 2], "wide.png")
    with pytest.raises(ImageError, match=r"image 'x' cannot be read \(UnidentifiedImageError.*no picture\. Look\."):
        open_image(b"no picture", "x", advice="Look.")
    with pytest.raises(ImageError, match=r"image 'y' cannot be read \(FileNotFoundError"):
        open_image(tmp_path / "gone.png", "y")

    def unreadable() -> Image.Image:
        raise OSError("disk")

    with pytest.raises(ImageError, match=r"the mask of 'z' cannot be read \(OSError: disk\)"):
        decode(unreadable, "the mask of 'z'")


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    red = np.asarray(open_image(tmp_path / "ramp.png", "ramp"))[..., 0]
    assert red.flatten().tolist() == list(range(256))
    wide = Image.fromarray(ramp.astype(np.int32))  # mode I, as other programs store the same
    assert np.array_equal(np.asarray(open_image(wide, "wide"))[..., 0], red)
    narrow = Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16))
    assert np.array_equal(np.asarray(open_image(narrow, "narrow"))[..., 0], red)


def test_grey_values_of_an_unknown_range_are_refused():
    with pytest.raises(ImageError, match="floating-point numbers, whose range is not known"):
        open_image(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "float")
    with pytest.raises(ImageError, match="grey values from 0 to 70000"):
        open_image(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "large")
    with pytest.raises(ImageError, match="the entry is null"):
        open_image(None, "nothing")
