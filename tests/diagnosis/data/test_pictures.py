"""Pictures, labels and masks: what is found, in which order, and what is refused with which words."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from keepsight.diagnosis.data.pictures import find_pictures
from keepsight.images import ImageError


def save(path, size=(6, 4), value=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("dog/b.png", "dog/a.jpg", "cat/x/c.PNG", "cat/.hidden.png"):
        save(tmp_path / "images" / name)
    (tmp_path / "images" / "dog" / "notes.txt").write_text("no picture")
    return tmp_path / "images"


def test_folder_of_classes_in_a_fixed_order(folder):
    found = find_pictures(folder)
    assert [item.name for item in found.items] == ["cat/x/c.PNG", "dog/a.jpg", "dog/b.png"]
    assert found.labels == {"class": ["cat", "dog", "dog"]}
    assert find_pictures(folder, labels={"size": [1, 2, None]}).labels == {"size": ["1", "2", None]}


def test_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    found = find_pictures(str(tmp_path))
    assert [item.name for item in found.items] == ["a.png", "b.png"]
    assert found.labels == {}


def test_masks_mirror_the_folder_by_stem(folder, tmp_path):
    save(tmp_path / "masks" / "dog" / "a.png", mode="L", value=3)
    found = find_pictures(folder, masks=tmp_path / "masks")
    assert [item.mask is not None for item in found.items] == [False, True, False]
    image, mask = found.items[1].open()
    assert image.size == (6, 4)
    assert mask.shape == (4, 6)
    assert (mask == 3).all()
    with pytest.raises(ValueError, match=r"has no mask for any of the 3 pictures; expected '.*empty/cat/x/c.png' for"):
        find_pictures(folder, masks=save(tmp_path / "empty" / "z.png").parent)


def test_hugging_face_dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "seg": datasets.Image()}
    )
    rows = {
        "picture": [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(3)],
        "label": [1, 0, -1],
        "seg": [Image.new("L", (6, 4), i) for i in range(3)],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features).rename_column("picture", "image")
    found = find_pictures(dataset, masks="seg")
    assert found.labels == {"class": ["dog", "cat", None]}
    image, mask = found.items[2].open()
    assert image.getpixel((0, 0)) == (2, 0, 0)
    assert (mask == 2).all()
    with pytest.raises(ValueError, match="the dataset has no image column"):
        find_pictures(dataset.select_columns(["label"]))


def test_exif_orientation_is_applied_before_the_mask_is_compared(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert find_pictures([tmp_path / "a.jpg"], masks=[np.zeros((6, 4), np.uint8)]).items[0].open()[0].size == (4, 6)
    with pytest.raises(ValueError, match=r"6 × 4 pixels, its picture 4 × 6; .* its EXIF orientation applied"):
        find_pictures([tmp_path / "a.jpg"], masks=[np.zeros((4, 6), np.uint8)]).items[0].open()


@pytest.mark.parametrize("kind", ["missing", "truncated", "text"])
def test_unreadable_pictures_are_named(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "truncated":
        generator = np.random.default_rng(0)
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "text":
        path.write_text("no picture")
    with pytest.raises(ImageError, match=r"image '.*a\.png' cannot be read .* skip_broken=True"):
        find_pictures([path]).items[0].open()


def test_paths_stay_inside_the_folder(tmp_path):
    outside = save(tmp_path / "outside" / "secret.png")
    save(tmp_path / "images" / "a.png")
    os.symlink(outside, tmp_path / "images" / "b.png")
    with pytest.raises(ValueError, match=r"image 'b\.png' leaves the image folder .* Move or copy it into the folder"):
        find_pictures(tmp_path / "images")
    (tmp_path / "images" / "b.png").unlink()
    (tmp_path / "masks").mkdir()
    os.symlink(outside, tmp_path / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"mask 'a\.png' leaves the mask folder"):
        find_pictures(tmp_path / "images", masks=tmp_path / "masks")
    (tmp_path / "images" / "inner.png").symlink_to(tmp_path / "images" / "a.png")
    assert len(find_pictures(tmp_path / "images")) == 2


def test_bad_input_is_named(folder, tmp_path):
    save(folder / "root.png")
    with pytest.raises(ValueError, match=r"holds pictures directly \(such as 'root.png'\) and in subfolders"):
        find_pictures(folder)
    (folder / "root.png").unlink()
    (tmp_path / "nothing").mkdir()
    for images, text in (
        ("https://example.org/cat.png", "is a URL; pictures are read from local files only"),
        (["https://example.org/cat.png"], "is a URL; pictures are read from local files only"),
        (tmp_path / "absent", "does not exist or is no folder"),
        (tmp_path / "nothing", "no pictures in .*; expected files ending in .bmp"),
        ([3], "a picture is a path or a PIL image; got int"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            find_pictures(images)
    with pytest.raises(ValueError, match="label set 'class' must be a list with one label for each of the 3 pictures"):
        find_pictures(folder, labels=["cat"])
    with pytest.raises(ValueError, match="2 masks for 3 pictures; give one"):
        find_pictures(folder, masks=[None, None])
    with pytest.raises(ValueError, match="images is one picture; give a folder, a list of paths or PIL images"):
        find_pictures(Image.new("RGB", (2, 2)))
    with pytest.raises(ValueError, match="images is a int; give a folder"):
        find_pictures(3)


def test_linked_class_folders_are_followed_inside_the_folder_only(tmp_path):
    for name in ("images/cat/a.png", "images/.store/b.png", "elsewhere/c.png"):
        save(tmp_path / name)
    images = tmp_path / "images"
    (images / "dog").symlink_to(".store")
    assert [item.name for item in find_pictures(images).items] == ["cat/a.png", "dog/b.png"]
    (images / "fox").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match=r"image 'fox' leaves the image folder"):
        find_pictures(images)
    (images / "fox").unlink()
    (images / "cat" / "round").symlink_to(images)
    with pytest.raises(ValueError, match=r"'cat/round' in .* is a link to a folder that holds it; remove the link"):
        find_pictures(images)


def test_two_pictures_never_share_a_mask(tmp_path):
    paths = [save(tmp_path / name) for name in ("a/1.png", "b/1.png", "b/2.png")]
    save(tmp_path / "masks" / "1.png", mode="L")
    with pytest.raises(ValueError, match=r"the mask '.*masks/1.png' would be that of '.*a/1.png' and of '.*b/1.png'"):
        find_pictures(paths, masks=tmp_path / "masks")
    found = find_pictures([paths[0], paths[2], paths[0]], masks=tmp_path / "masks")
    assert [item.mask is not None for item in found.items] == [True, False, True]
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"expected '.*masks/1.png' for '.*a/1.png'"):
        find_pictures(paths, masks=tmp_path / "masks")


def test_dataset_rows_name_no_urls(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a download"))
    url = "https://example.org/a.png"
    rows = {"image": [url, None], "seg": [url, None], "text": [url, url]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset = dataset.cast_column("seg", datasets.Image())
    found = find_pictures(dataset, masks="seg")
    with pytest.raises(ImageError, match="is a URL; pictures are read from local files only"):
        found.items[0].open()
    with pytest.raises(ImageError, match="row 1 of the dataset has no picture in 'image'"):
        found.items[1].open()
    whole = Image.new("RGB", (6, 4))
    found = find_pictures([whole, whole], masks=[item.mask for item in found.items])
    with pytest.raises(ImageError, match="is a URL"):
        found.items[0].open()
    assert found.items[1].open()[1] is None
    with pytest.raises(ValueError, match=r"the mask column 'text' is a Value; cast it to datasets.Image"):
        find_pictures(dataset, masks="text")


def test_dataset_rows_open_no_files_that_their_author_chose(tmp_path):
    datasets = pytest.importorskip("datasets")
    secret = save(tmp_path / "secret.png")
    mine = datasets.Dataset.from_dict({"image": [str(secret)]}).cast_column("image", datasets.Image())
    assert find_pictures(mine).items[0].open()[0].size == (6, 4)  # the caller's own list of paths

    mine.save_to_disk(tmp_path / "embedded")
    assert find_pictures(datasets.load_from_disk(tmp_path / "embedded")).items[0].open()[0].size == (6, 4)

    inner = save(tmp_path / "theirs" / "a.png")
    rows = {"image": [str(secret), str(inner)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "theirs")  # paths as text: nothing is embedded
    theirs = datasets.load_from_disk(tmp_path / "theirs").cast_column("image", datasets.Image())
    found = find_pictures(theirs)
    with pytest.raises(ImageError, match=r"row 0 of the dataset names the file '.*secret.png' in 'image', which the"):
        found.items[0].open()
    assert found.items[1].open()[0].size == (6, 4)
    # One that claims to be an image folder, and keeps its rows elsewhere.
    for name, key, value in (
        ("dataset_info.json", "builder_name", "imagefolder"),
        ("state.json", "_data_files", [{"filename": "rows/data.arrow"}]),
    ):
        file = tmp_path / "theirs" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    (tmp_path / "theirs" / "rows").mkdir()
    (tmp_path / "theirs" / "data-00000-of-00001.arrow").rename(tmp_path / "theirs" / "rows" / "data.arrow")
    theirs = datasets.load_from_disk(tmp_path / "theirs").cast_column("image", datasets.Image())
    assert theirs.info.builder_name == "imagefolder"
    with pytest.raises(ImageError, match="which the dataset does not hold"):
        find_pictures(theirs).items[0].open()

    save(tmp_path / "folder" / "cat" / "a.png")
    folder = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))
    assert find_pictures(folder["train"]).items[0].open()[0].size == (6, 4)


def test_dataset_labels_may_be_text():
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (6, 4))] * 2
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": ["cat", None]}, features=features)
    assert find_pictures(dataset).labels == {"class": ["cat", None]}
    found = find_pictures(dataset.rename_column("label", "species"))
    assert found.labels == {}
    assert "none of the dataset's columns (image, species) is a ClassLabel" in found.unlabelled
    with pytest.raises(ValueError, match="the dataset is empty: it has no rows"):
        find_pictures(dataset.select([]))
