"""Where batches of images come from: cached features of a frozen backbone, a pixel cache, or the image files."""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from PIL import __version__ as pillow_version

from datasets import Prepared
from images.backbones import build_backbone, is_given, pretrained_digest
from images.checked_rows import CheckedRows, row_checksums
from images.given_features import given_features, list_of
from images.loading import CachedImages, FeatureSource, ImageFiles, ImageSource, PixelSource, demand_readable
from images.networks import LIBRARIES, input_of
from images.pixel_cache import Kind, PixelCache, cache_folder, is_finished, kind_of_cache, open_pixel_cache, room_gb
from images.tar_members import file_of
from models import seeded
from pipeline.devices import autocast
from pipeline.errors import UserError
from pipeline.files import (
    fingerprint,
    flush_to_disk,
    lock,
    open_array,
    read_array,
    read_json,
    remove_notes,
    write_array,
    write_json,
)
from pipeline.given_arrays import read_given
from pipeline.pairs import Images
from pipeline.processes import cores
from pipeline.progress import ProgressBar
from pipeline.registry import argument
from pipeline.schema import ImageEncoder, Settings
from pipeline.steps import versions

SECONDS_BETWEEN_NOTES = 30
"""How much work on image features a kill may cost."""


def worker_count(workers: int | None) -> int:
    """Processes that read images: `training.workers`, or one a core."""
    return cores() if workers is None else workers


def features_path(settings: Settings, *, local: bool = False) -> Path:
    """The file of the features of this backbone at this size and precision."""
    encoder = settings.model.image
    weights = Path(encoder.weights).stem if encoder.weights not in ("imagenet", "none") else encoder.weights
    seed = f"-seed={settings.seed}" if encoder.weights == "none" else ""
    backbone = encoder.backbone.replace(":", "_").replace("/", "_")
    name = f"{backbone}-{weights}-{input_of(encoder).size}-{settings.training.precision}{seed}"
    return settings.features_folder / name / ("local_features.npy" if local else "features.npy")


def images_digest(images: Images) -> str:
    """A digest of the list of images with the size of each file. Copies have other times."""
    digest = hashlib.sha256()
    for path in images.paths:
        try:
            status = file_of(images.root / path).stat()
        except OSError as error:
            raise UserError(f"{images.root / path}: {error.strerror}; run prepare_dataset.py again") from None
        digest.update(f"{path}\0{status.st_size}\n".encode())
    return digest.hexdigest()


def weights_digest(encoder: ImageEncoder) -> str:
    """`none`, torchvision's `imagenet`, or a digest of a library's weights, of a file's, or of the features in a file.

    Raises UserError where they cannot be read.
    """
    backbone, weights = encoder.backbone, encoder.weights
    if is_given(backbone):
        path = Path(argument(backbone))
        read_given(path, "model.image.backbone")
        return f"{fingerprint(path)} {fingerprint(list_of(path))}"
    if weights == "imagenet" and backbone.partition(":")[0] in LIBRARIES:
        return pretrained_digest(backbone)
    if weights in ("imagenet", "none"):
        return weights
    try:
        return fingerprint(Path(weights))
    except OSError as error:
        raise UserError(f"cannot read model.image.weights {weights}: {error.strerror}") from None


def made_from(encoder: ImageEncoder, seed: int, images: Images) -> dict[str, object]:
    """What the pretrained features of the images depend on: image files, backbone, weights and size.

    Weights that are drawn depend on `seed`. Raises UserError where an image or the file with the weights is missing.
    """
    weights = weights_digest(encoder)
    made: dict[str, object] = {
        "images": images_digest(images),
        "backbone": encoder.backbone,
        "weights": weights,
        "size": input_of(encoder).size,
    }
    if input_of(encoder).interpolation != "bilinear":
        made["interpolation"] = input_of(encoder).interpolation
    return made | ({"seed": seed} if weights == "none" else {})


def pretrained_features(settings: Settings, images: Images, device: torch.device) -> tuple[CheckedRows, dict[int, str]]:
    """`cached_features`, which `evaluation.expand` compares images by.

    Raises UserError where they are missing and the model reads pixels, so that training did not need them.
    """
    image, path = settings.model.image, features_path(settings)
    if (image.trainable or not image.cache_features) and not path.is_file():
        raise UserError(
            f"evaluation.expand compares images by the backbone's pretrained features, and {path} is not there; run "
            "extract_image_features.py with the run's settings"
        )
    return cached_features(settings, images, device)


@torch.no_grad()
def cached_features(
    settings: Settings, images: Images, device: torch.device, *, local: bool = False
) -> tuple[CheckedRows, dict[int, str]]:
    """Pretrained features (I, 2, F), float32, of every image ([:, 0]) and its mirror image ([:, 1]), memory-mapped.

    Also returns, by number, what is wrong with images that cannot be read. Their features are NaN.

    The features are computed, under `training.precision`, where they are missing or the images or weights have changed.
    With `local` they are those of every place of the feature map, (I, 2, N, F) in float16: bfloat16 keeps fewer digits,
    and float32 would take a gigabyte for 2,000 images.
    """
    if is_given(settings.model.image.backbone):
        given = Path(argument(settings.model.image.backbone))
        return CheckedRows(given_features(given, images), None, given.parent), {}
    path, inputs = features_path(settings, local=local), made_from(settings.model.image, settings.seed, images)
    if found := _finished_features(path, inputs, len(images.paths)):
        return found
    with lock(path.parent, wait=True):
        if found := _finished_features(path, inputs, len(images.paths)):  # another run has made them meanwhile
            return found
        path.with_suffix(".json").unlink(missing_ok=True)
        unreadable = _compute_features(settings, images, device, path, inputs, local)
        print(f"wrote {path}")
        return _read_features(path, len(images.paths)), unreadable


def _finished_features(path: Path, inputs: dict[str, object], count: int) -> tuple[CheckedRows, dict[int, str]] | None:
    """The features of `count` images in a file, and its unreadable images; None where they are not made from `inputs`.

    Raises UserError where they are damaged.
    """
    stamp = path.with_suffix(".json")
    if not (path.exists() and stamp.exists()):
        return None
    try:
        made = read_json(stamp)
        if made["made_from"] != inputs:
            return None
        unreadable = {int(number): why for number, why in made.get("unreadable", {}).items()}
        remove_notes(path.with_suffix(".partial.json"))
        return _read_features(path, count), unreadable
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the image features {path.parent} are damaged ({error}); remove that folder") from None


def _compute_features(
    settings: Settings, images: Images, device: torch.device, path: Path, inputs: dict[str, object], local: bool
) -> dict[int, str]:
    """Compute the features, or those that a stopped call left, and write them with checksums and stamp.

    Returns, by number, what is wrong with images that cannot be read. `inputs`: what the features are made from.
    """
    with seeded(settings.seed):
        backbone = build_backbone(settings.model.image.backbone, settings.model.image.weights).to(device).eval()
    side, interpolation = input_of(settings.model.image)
    backbone.demand_size(side)
    count, size = len(images.paths), max(settings.evaluation.batch_size // 4, 1)
    files = ImageFiles(images, side, settings.dataset.max_pixels, interpolation=interpolation)
    source = PixelSource(files, worker_count(settings.training.workers), device)
    compute = backbone.local_features if local else backbone
    with autocast(settings.training.precision, device):
        shape = compute(torch.zeros(1, 3, side, side).byte().to(device)).shape
    if local:
        print(f"writing {2 * 2 * count * shape[1:].numel() / 2**30:.2f} GiB of local features to {path}")
    partial = _PartialFeatures(path, inputs, (count, 2, *shape[1:]), np.float16 if local else np.float32)
    source.unreadable.update(partial.unreadable)
    parts = [np.arange(start, min(start + size, count)) for start in range(partial.done, count, size)]
    requests = [(part, np.zeros(len(part), dtype=bool)) for part in parts]
    title = f"features of {settings.model.image.backbone}"
    with ProgressBar(total=count, desc=title, unit="image", initial=partial.done) as progress:
        for part, pixels in zip(parts, source.batches(requests), strict=True):
            with autocast(settings.training.precision, device):
                both = compute(torch.cat([pixels, pixels.flip(3)]))
            partial.add(
                part, both.float().unflatten(0, (2, len(part))).transpose(0, 1).cpu().numpy(), source.unreadable
            )
            demand_readable(source.unreadable, count, settings.training.max_unreadable_share)
            progress.update(len(part))
    partial.finish(source.unreadable)
    return source.unreadable


class _PartialFeatures:
    """Features on their way to `path`: a file beside it, and a note of how many images it holds."""

    def __init__(self, path: Path, inputs: dict[str, object], shape: tuple[int, ...], dtype: type) -> None:
        self.path, self.partial, self.note = path, path.with_suffix(".partial.npy"), path.with_suffix(".partial.json")
        self.made_from = {"made_from": inputs, "versions": versions()}
        noted = read_json(self.note) if self.note.is_file() and self.partial.is_file() else {}
        is_same = {name: noted.get(name) for name in self.made_from} == self.made_from
        self.done: int = noted["done"] if is_same else 0
        self.unreadable = {int(number): why for number, why in noted["unreadable"].items()} if is_same else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.features = open_array(self.partial, shape, dtype, keep=self.done > 0)
        self.saved = time.monotonic()
        if self.done:
            print(f"{self.done:,} of {shape[0]:,} images have their features; resuming")

    def add(self, part: np.ndarray, features: np.ndarray, unreadable: dict[int, str]) -> None:
        """Write the features of the images `part`, which follow those before."""
        self.features[part] = features
        self.done = int(part[-1]) + 1
        if time.monotonic() - self.saved >= SECONDS_BETWEEN_NOTES:
            self.features.flush()
            write_json(self.note, {**self.made_from, "done": self.done, "unreadable": unreadable})
            self.saved = time.monotonic()

    def finish(self, unreadable: dict[int, str]) -> None:
        """Put the features in their place, with checksums and, last, the stamp."""
        self.features[list(unreadable)] = np.nan
        self.features.flush()
        write_array(self.path.with_suffix(".checksums.npy"), np.stack([row_checksums(both) for both in self.features]))
        flush_to_disk(self.partial)
        self.partial.replace(self.path)
        write_json(self.path.with_suffix(".json"), {**self.made_from, "unreadable": unreadable})
        remove_notes(self.note)


def _read_features(path: Path, count: int) -> CheckedRows:
    """The features of `count` images; raises UserError and ValueError where they are broken."""
    features, checksums = read_array(path), path.with_suffix(".checksums.npy")
    if features.shape[:2] != (count, 2) or features.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path.name} holds {features.dtype} {features.shape}")
    return CheckedRows(features, read_array(checksums) if checksums.exists() else None, path.parent)


def pixel_cache(settings: Settings, images: Images, *, for_one_pass: bool = False) -> PixelCache | None:
    """The cache that `training.pixel_cache` asks for, made where it is missing; None where the files are to be read.

    For one pass no cache is made, and only an array of exact pixels is used.
    """
    target, max_pixels, training = input_of(settings.model.image), settings.dataset.max_pixels, settings.training
    parent, wanted = settings.features_folder, "raw" if for_one_pass else training.pixel_cache
    if wanted == "none" or (for_one_pass and not list(parent.glob(f"pixels-{target.size}-raw-*/pixels.json"))):
        return None
    inputs = {"images": images_digest(images), "max_pixels": max_pixels, "pillow": pillow_version}
    if target.interpolation != "bilinear":
        inputs["interpolation"] = target.interpolation
    kinds: tuple[Kind, ...] = ("raw", "jpeg")
    folders = {kind: cache_folder(parent, kind, target.size, inputs) for kind in kinds}
    finished = [kind for kind in folders if wanted in ("auto", kind) and is_finished(folders[kind])]
    if finished:
        kind, gigabytes = finished[0], 0.0
    elif for_one_pass:
        return None
    else:
        limit = min(training.pixel_cache_gb, room_gb(parent, *folders.values()))
        kind, gigabytes = kind_of_cache(wanted, images, target, max_pixels, limit)
    if kind == "none":
        print(
            f"{len(images.paths):,} images are decoded in each epoch: a pixel cache takes more than {limit:.3g} GB "
            f"(training.pixel_cache_gb, or what {parent} has room for)"
        )
        return None
    return open_pixel_cache(folders[kind], kind, gigabytes, images, target, max_pixels, inputs)


def image_source(
    settings: Settings, data: Prepared, device: torch.device, *, for_one_pass: bool = False
) -> ImageSource:
    """Cached features of a frozen backbone, a pixel cache, or the image files, by the settings.

    For one pass, to evaluate or to search, the files are read where no array of their pixels exists.
    """
    if settings.model.image.trainable or not settings.model.image.cache_features:
        cache = pixel_cache(settings, data.images, for_one_pass=for_one_pass)
        files: ImageFiles | CachedImages
        if cache:
            files = CachedImages(cache)
        else:
            size, interpolation = input_of(settings.model.image)
            files = ImageFiles(data.images, size, settings.dataset.max_pixels, interpolation=interpolation)
        return PixelSource(files, worker_count(settings.training.workers), device)
    local = settings.model.pvse.embeddings > 0
    features, unreadable = cached_features(settings, data.images, device, local=local)
    return FeatureSource(features, device, unreadable)
