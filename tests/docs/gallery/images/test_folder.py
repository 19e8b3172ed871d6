"""The reader of folders of JPEGs, on some that are written here."""

import pathlib

import grain
import numpy as np
import pytest
from PIL import Image

from docs.gallery.images import folder
from docs.gallery.images.folder import Files, ImageError, train_batches, val_batches

CLASSES = ("cat", "dog")
SIZE = {"rows": 4, "size": 8, "threads": 1}


def write_folder(root: pathlib.Path, train: int, val: int) -> None:
    """JPEGs of noise, so many of each of two classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{k}.JPEG")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(root, train=10, val=3)
    return root


@pytest.fixture
def damaged(tmp_path):
    write_folder(tmp_path, train=2, val=1)
    return tmp_path


def take(batches, count):
    return [next(batches) for _ in range(count)]


def images(batches):
    return np.concatenate([batch["images"] for batch in batches])


def test_batches_are_pixels_and_labels(root):
    batch = next(train_batches(root, seed=0, **SIZE))
    assert {k: (x.shape, x.dtype.name) for k, x in batch.items()} == {
        "images": ((4, 8, 8, 3), "uint8"), "labels": ((4,), "int32"), "weights": ((4,), "float32"),
    }  # fmt: skip


def test_every_image_comes_once_before_any_comes_again(root):
    labels = np.concatenate([b["labels"] for b in take(train_batches(root, seed=0, **SIZE), 10)])
    assert [labels[:20].sum(), labels[20:].sum()] == [10, 10]
    assert list(labels[:20]) != list(labels[20:])  # in another order


def test_an_order_follows_from_its_seed_and_a_step_restores_it(root):
    whole = take(train_batches(root, seed=3, **SIZE), 8)
    later = train_batches(root, seed=3, **SIZE)
    grain.experimental.set_next_index(later, 6)
    np.testing.assert_array_equal(images(take(later, 2)), images(whole[6:]))
    assert (images(take(train_batches(root, seed=4, **SIZE), 8)) != images(whole)).any()


def test_a_state_that_was_saved_restores_it(root):
    first = train_batches(root, seed=3, **SIZE)
    take(first, 3)
    other = train_batches(root, seed=3, **SIZE)
    other.set_state(first.get_state())
    np.testing.assert_array_equal(next(other)["images"], next(first)["images"])


def test_processes_read_parts_of_the_same_batches(root):
    whole = take(train_batches(root, seed=0, **SIZE), 3)
    parts = [take(train_batches(root, seed=0, rank=r, world=2, **SIZE), 3) for r in (0, 1)]
    shared = [images([a, b]) for a, b in zip(*parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(shared), images(whole))
    with pytest.raises(ValueError, match="world=3 does not divide the 4 rows"):
        train_batches(root, seed=0, rank=0, world=3, **SIZE)


def test_validation_reads_every_image_once_whatever_the_number_of_processes(root):
    whole = list(val_batches(root, **SIZE))
    assert [b["weights"].tolist() for b in whole] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert np.concatenate([b["labels"] for b in whole])[:6].tolist() == [0, 0, 0, 1, 1, 1]
    parts = [list(val_batches(root, rank=r, world=2, **SIZE)) for r in (0, 1)]
    assert [len(part) for part in parts] == [2, 2]
    assert sum(b["weights"].sum() for part in parts for b in part) == 6


def test_crops_lie_inside_and_have_the_areas_of_the_recipe():
    rng = np.random.default_rng(0)
    boxes = np.array([folder.random_box(200, 100, rng) for _ in range(500)])
    left, upper, right, lower = boxes.T
    assert (left >= 0).all() and (upper >= 0).all()
    assert (right <= 200).all() and (lower <= 100).all()
    areas, proportions = (right - left) * (lower - upper) / 2e4, (right - left) / (lower - upper)
    assert 0.07 < areas.min() < 0.1 and areas.max() > 0.5
    assert 0.7 < proportions.min() < 0.8 and 1.25 < proportions.max() < 1.4
    # Of a strip no part has the proportions: the middle.
    assert folder.random_box(1000, 4, rng)[0] == 498.0
    assert folder.middle_box(64, 32, 0.5) == (24.0, 8.0, 40.0, 24.0)


def test_half_of_the_images_are_mirrored(tmp_path):
    path = tmp_path / "x.JPEG"
    ramp = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], (24, 24, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(path)
    element = {"path": str(path), "label": 0, "weight": 1.0}
    falls = [
        int(x[:, 0].sum()) > int(x[:, -1].sum())
        for k in range(60)
        for x in [folder.augmented(8, element, np.random.default_rng(k))["images"]]
    ]
    assert 15 < sum(falls) < 45


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_become_rgb(tmp_path, mode):
    Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode).save(tmp_path / "x.JPEG")
    image = folder.read_image(str(tmp_path / "x.JPEG"))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image), 200, atol=3)


@pytest.mark.parametrize("rest", [b"", b"no image", None])
def test_a_broken_image_is_named(damaged, rest):
    path = damaged / "train" / "dog" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:200] if rest is None else rest)
    with pytest.raises(ImageError, match=rf"{path}: not read \(.*\); replace it, or remove it"):
        take(train_batches(damaged, seed=0, **SIZE), 1)


def test_a_class_without_images_is_named(damaged):
    (damaged / "train" / "bird").mkdir()
    with pytest.raises(ImageError, match=f"{damaged}/train/bird: no .jpeg or .jpg file; put"):
        train_batches(damaged, seed=0, **SIZE)


def test_classes_of_both_parts_have_to_be_the_same(damaged):
    (damaged / "val" / "bird").mkdir()
    with pytest.raises(ImageError, match=f"{damaged}/val/bird: .*/train has no such class"):
        val_batches(damaged, **SIZE)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ImageError, match="/train: no such folder; images belong in"):
        train_batches(tmp_path, seed=0, **SIZE)
    (tmp_path / "train").mkdir()
    with pytest.raises(ImageError, match="/train: no class; images belong in"):
        train_batches(tmp_path, seed=0, **SIZE)


def test_a_batch_needs_as_many_images(damaged):
    with pytest.raises(ImageError, match="/train: 4 images, less than a batch of 8"):
        train_batches(damaged, seed=0, **SIZE | {"rows": 8})


def test_files_are_in_order(root):
    files = Files(root, "val", list(CLASSES))
    assert [pathlib.Path(files[k]["path"]).name for k in range(3)] == ["0.JPEG", "1.JPEG", "2.JPEG"]
    assert repr(files) == "Files(6 images)"
