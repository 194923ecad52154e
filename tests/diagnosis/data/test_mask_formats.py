"""Masks as COCO-Stuff, ADE20K and VOC keep them: hand-made files in their layouts, read by the documented rules."""

import numpy as np
import pytest
from PIL import Image

from keepsight.diagnosis.data.mask_formats import read_objects
from keepsight.diagnosis.data.pictures import find_pictures


def write(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8), mode)
    if mode == "P":
        image.putpalette([step for colour in range(256) for step in (colour, 0, 255 - colour)])
    image.save(path)
    return path


def picture(path, size=(3, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def test_coco_stuff_counts_class_0_and_leaves_255_out():
    ids = np.array([[0, 0, 181], [255, 11, 11]], np.uint8)
    objects, classes = read_objects(ids, "a", "coco-stuff")
    assert objects.tolist() == [[1, 1, 182], [255, 12, 12]]
    assert classes == {1: "class 0", 12: "class 11", 182: "class 181"}
    assert read_objects(ids, "a")[0].tolist() == ids.tolist()  # as an index mask the same file loses class 0
    with pytest.raises(ValueError, match=r"'a' holds the value 183; COCO-Stuff's are 0 … 182, .*--mask-format index"):
        read_objects(np.array([[183]], np.uint8), "a", "coco-stuff")


def test_parts_keep_the_class_of_what_they_are_part_of():
    ids = np.array([[0, 7, 0], [0, 7, 0], [0, 7, 7]], np.uint8)
    objects, classes = read_objects(ids, "a", "coco-stuff", split_components=True)
    assert objects.tolist() == [[2, 1, 3], [2, 1, 3], [2, 1, 1]]
    assert classes == {1: "class 7", 2: "class 0", 3: "class 0"}
    objects, classes = read_objects(ids, "a", split_components=True)
    assert objects.tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 1]]
    assert classes == {1: "class 7"}


def test_ade20k_objects_are_in_blue_and_classes_in_red_and_green(tmp_path):
    def pixel(kind, instance):
        return (kind // 256 * 10, kind % 256, instance)

    rows = [[pixel(400, 1), pixel(400, 1), pixel(400, 2)], [pixel(0, 0), pixel(3000, 3), pixel(400, 1)]]
    path = write(tmp_path / "x_seg.png", rows, "RGB")
    objects, classes = read_objects(path, "x", "ade20k")
    assert objects.tolist() == [[1, 1, 2], [0, 3, 1]]
    assert classes == {1: "class 400", 2: "class 400", 3: "class 3000"}
    objects, classes = read_objects(np.array([[0, 5], [150, 5]], np.uint8), "x", "ade20k")
    assert objects.tolist() == [[0, 5], [150, 5]]
    assert classes == {5: "class 5", 150: "class 150"}
    with pytest.raises(ValueError, match=r"holds the value 255; ADE20K's masks of one channel hold 0 … 150"):
        read_objects(np.array([[255]], np.uint8), "x", "ade20k")


def test_voc_objects_take_their_classes_from_the_folder_beside(tmp_path):
    objects = write(tmp_path / "SegmentationObject" / "1.png", [[1, 1, 255], [0, 2, 255]], "P")
    found, classes = read_objects(objects, "1", "voc")
    assert (found.tolist(), classes) == ([[1, 1, 255], [0, 2, 255]], {})
    kinds = write(tmp_path / "SegmentationClass" / "1.png", [[15, 15, 255], [0, 8, 255]], "P")
    assert read_objects(objects, "1", "voc")[1] == {1: "person", 2: "cat"}
    assert read_objects(kinds, "1", "voc")[1] == {15: "person", 8: "cat"}
    write(kinds, [[15]], "P")
    with pytest.raises(ValueError, match="are of different sizes; both belong to one picture"):
        read_objects(objects, "1", "voc")


def test_masks_are_found_by_stem_and_the_formats_own_suffix(tmp_path):
    picture(tmp_path / "val" / "139.jpg")
    masks = tmp_path / "maps"
    write(masks / "139_labelTrainIds.png", [[0, 0, 1], [1, 1, 255]])
    with pytest.raises(ValueError, match=r"There is '139_labelTrainIds.png': give .*--mask-format coco-stuff"):
        find_pictures(tmp_path / "val", masks=masks)
    (item,) = find_pictures(tmp_path / "val", masks=masks, mask_format="coco-stuff").items
    assert item.open()[1].tolist() == [[1, 1, 2], [2, 2, 255]]
    (item,) = find_pictures(tmp_path / "val", masks=masks, mask_suffix="_labelTrainIds.png").items
    assert item.open()[1].tolist() == [[0, 0, 1], [1, 1, 255]]
    (masks / "139_labelTrainIds.png").rename(masks / "139.png")
    (item,) = find_pictures(tmp_path / "val", masks=masks, mask_format="coco-stuff").items
    assert item.read()[2] == {1: "class 0", 2: "class 1"}
    (masks / "139.png").rename(masks / "139_m.png")
    with pytest.raises(
        ValueError, match=r"expected '.*139.png' for '139.jpg'; masks that end otherwise need mask_suffix"
    ):
        find_pictures(tmp_path / "val", masks=masks)
    with pytest.raises(ValueError, match="mask_format is 'coco'; allowed: index, coco-stuff, ade20k, voc"):
        find_pictures(tmp_path / "val", masks=masks, mask_format="coco")


def test_masks_among_the_pictures_are_no_pictures(tmp_path):
    picture(tmp_path / "street" / "ADE_1.jpg")
    write(tmp_path / "street" / "ADE_1_seg.png", [[(0, 5, 1)] * 3] * 2, "RGB")
    write(tmp_path / "street" / "ADE_1_parts_1.png", [[(0, 0, 0)] * 3] * 2, "RGB")
    (item,) = find_pictures(tmp_path, masks=tmp_path, mask_format="ade20k").items
    assert (item.name, item.read()[2]) == ("street/ADE_1.jpg", {1: "class 5"})
    assert len(find_pictures(tmp_path)) == 3
