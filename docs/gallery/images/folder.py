"""A folder of JPEGs, `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, as batches through Grain.

An item of the training data follows from seed and position alone, crop and flip too, and process
r's part of batch s is the r-th part of global batch s: a step number restores the position
(`grain.experimental.set_next_index`), also with another number of processes.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import grain
import numpy as np
from PIL import Image

SUFFIXES = (".jpeg", ".jpg")
# Of ImageNet's training images divided by 255, by channel; for `scaled`.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Share of an image's area and proportions that a training crop has (Szegedy et al. 2015,
# arXiv:1409.4842, section 6); of a test image the middle seven eighths of the shorter side.
AREA, PROPORTIONS, MIDDLE = (0.08, 1.0), (3 / 4, 4 / 3), 224 / 256
TRIES = 10  # at a crop that fits
PREFETCH = 16  # images that each thread reads ahead


class ImageError(ValueError):
    """A folder or an image that cannot be used; names it and the remedy."""


class Batch(TypedDict):
    """uint8 (B, size, size, 3), int32 (B,), and float32 (B,): 0 for what only fills a batch."""

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def class_names(root: Path) -> list[str]:
    """Names of the classes of `root/train`, in order of their labels.

    Args:
        root: folder with `train` and `val`.

    Raises:
        ImageError: no such folder, or no class in it.
    """
    folder = root / "train"
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; images belong in {folder}/<class>/*.JPEG.")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise ImageError(f"{folder}: no class; images belong in {folder}/<class>/*.JPEG.")
    return names


class Files:
    """Random access to the paths and labels of one part, for Grain: sorted by class and name.

    Args:
        root: folder with `train` and `val`.
        part: which of both.
        names: of all classes; every one has to have an image.
        multiple: length that items of weight 0 fill up to; 1 for none.

    Raises:
        ImageError: a class without images, or one that is not known.
    """

    def __init__(self, root: Path, part: str, names: list[str], multiple: int = 1):
        self._paths: list[str] = []
        self._labels: list[int] = []
        folder = root / part
        found = {e.name for e in os.scandir(folder) if e.is_dir()} if folder.is_dir() else set()
        if unknown := sorted(found - set(names)):
            raise ImageError(f"{folder / unknown[0]}: {root / 'train'} has no such class.")
        for label, name in enumerate(names):
            own = folder / name
            files = sorted(e.path for e in os.scandir(own) if _is_jpeg(e)) if name in found else []
            if not files:
                raise ImageError(f"{own}: no {' or '.join(SUFFIXES)} file; put images of it there.")
            self._paths += files
            self._labels += [label] * len(files)
        self.images = len(self._paths)
        self._length = -(-self.images // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        real, at = index < self.images, min(int(index), self.images - 1)
        return {"path": self._paths[at], "label": self._labels[at], "weight": float(real)}

    def __repr__(self) -> str:
        return f"Files({self.images} images)"


def _is_jpeg(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def read_image(path: str) -> Image.Image:
    """A JPEG as RGB, whatever its colours are: grey, CMYK.

    Raises:
        ImageError: it is damaged, or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not read ({error}); replace it, or remove it.") from error


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Left, upper, right and lower edge of a random part; the middle where no try fits.

    Args:
        width: of the image.
        height: of the image.
        rng: draws area and proportions, then the place.
    """
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        proportion = np.exp(rng.uniform(*np.log(PROPORTIONS)))
        w, h = round(np.sqrt(area * proportion)), round(np.sqrt(area / proportion))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(upper), float(left + w), float(upper + h)
    return middle_box(width, height, 1.0)


def middle_box(width: int, height: int, share: float = MIDDLE) -> tuple[float, ...]:
    """The square in the middle whose side is that share of the shorter one."""
    side = share * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def augmented(size: int, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A random part of an image, resized and, one time in two, mirrored.

    Args:
        size: pixels of a side.
        element: of `Files`.
        rng: draws.
    """
    image = read_image(element["path"])
    pixels = _resized(image, random_box(*image.size, rng), size)
    return _item(pixels[:, ::-1] if rng.integers(2) else pixels, element)


def middle(size: int, element: Mapping[str, Any]) -> dict[str, Any]:
    """The middle of an image, resized.

    Args:
        size: pixels of a side.
        element: of `Files`.
    """
    image = read_image(element["path"])
    return _item(_resized(image, middle_box(*image.size), size), element)


def _resized(image: Image.Image, box: tuple[float, ...], size: int) -> np.ndarray:
    small = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)  # type: ignore
    return np.asarray(small)


def _item(pixels: np.ndarray, element: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "images": np.ascontiguousarray(pixels),
        "labels": np.int32(element["label"]),
        "weights": np.float32(element["weight"]),
    }


def train_batches(
    root: Path, *, rows: int, size: int, seed: int, rank: int = 0, world: int = 1, threads: int = 8
) -> grain.DatasetIterator[Batch]:
    """Iterates for ever over one process's part of the training batches.

    Every image comes once before any comes again, each time cropped and mirrored anew.

    Args:
        root: folder with `train` and `val`.
        rows: images of a batch, of all processes together.
        size: pixels of a side.
        seed: of order, crops and flips.
        rank: this process.
        world: number of processes, which divides `rows`.
        threads: that read and decode.

    Returns:
        Iterator of `Batch` with rows / world images.

    Raises:
        ImageError: a class without images, or fewer images than a batch has; while iterating, an
            image that cannot be read.
        ValueError: `world` does not divide `rows`.
    """
    local, files = _local(rows, world), Files(root, "train", class_names(root))
    if len(files) < rows:
        raise ImageError(f"{root / 'train'}: {len(files)} images, less than a batch of {rows}.")
    items = grain.MapDataset.source(files).shuffle(seed).repeat(None)
    images = items.random_map(functools.partial(augmented, size), seed=seed + 1)
    batches = images.batch(local, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH)
    return iter(batches[rank::world].to_iter_dataset(options))


def val_batches(
    root: Path, *, rows: int, size: int, rank: int = 0, world: int = 1, threads: int = 8
) -> Iterator[Batch]:
    """Iterates once over one process's part of the validation images.

    All processes get as many batches; the last ones are filled up with images of weight 0.

    Args:
        root: folder with `train` and `val`.
        rows: images of a batch, of all processes together.
        size: pixels of a side.
        rank: this process.
        world: number of processes, which divides `rows`.
        threads: that read and decode.

    Raises:
        ImageError: as of `train_batches`.
        ValueError: `world` does not divide `rows`.
    """
    local, files = _local(rows, world), Files(root, "val", class_names(root), rows)
    batches = grain.MapDataset.source(files).map(functools.partial(middle, size)).batch(local)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH)
    return iter(batches[rank::world].to_iter_dataset(options))


def _local(rows: int, world: int) -> int:
    if rows % world:
        raise ValueError(f"world={world} does not divide the {rows} rows of a batch.")
    return rows // world
