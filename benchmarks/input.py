"""Images a second on their way to the model, by where they come from.

    python benchmarks/input.py [--work WORK] [--images 1000] [--longest 400] [--workers 0 1 2] [--batch-size 64]

The images of a prepared dataset, written as JPEGs of which the longest side has --longest pixels (as they are with
--longest 0), are read in random order as step 4 reads them, each twice a round: from the files, and from a pixel cache
of either kind. Beside them stand other ways to decode the files: Pillow without `draft`, and torchvision's decoder.
All that is read is in the page cache.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from timing import machine, print_table  # noqa: E402

from images.files import MAX_PIXELS, load_thumbnail  # noqa: E402
from images.loading import CachedImages, ImageFiles, PixelSource  # noqa: E402
from images.networks import Input  # noqa: E402
from images.pixel_cache import kind_of_cache, open_pixel_cache  # noqa: E402
from pipeline.command_line import run_script  # noqa: E402
from pipeline.pairs import Images, load_images  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "web_news", help="a prepared folder")
    parser.add_argument("--images", type=int, default=1000, help="how many of its images")
    parser.add_argument("--longest", type=int, default=400, help="longest side of the JPEGs; 0 leaves the files alone")
    parser.add_argument("--size", type=int, default=224, help="the model's images are --size x --size pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes that read")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    images = load_images(arguments.work)
    images = Images(images.paths[: arguments.images], images.of_pair, images.root)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.longest:
            images = smaller(images, arguments.longest, Path(folder) / "images")
        rows = measured(images, Path(folder), arguments)
    print_table(["source", "workers", "images/s"], rows)
    kind = f"JPEGs of {arguments.longest} pixels" if arguments.longest else "files as they are"
    print(f"\n{len(images.paths)} {kind}, to {arguments.size} pixels, {machine(arguments.device)}")


def smaller(images: Images, longest: int, folder: Path) -> Images:
    """Their JPEGs, of quality 90, in a folder of their own."""
    folder.mkdir()
    for number, path in enumerate(images.paths):
        load_thumbnail(images.root / path, longest).save(folder / f"{number}.jpg", quality=90)
    return Images([f"{number}.jpg" for number in range(len(images.paths))], images.of_pair, folder)


def measured(images: Images, folder: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """A row for each source and number of workers."""
    rows, target = [], Input(arguments.size)
    for name in ("files", "raw", "jpeg"):
        if name == "files":
            files: ImageFiles | CachedImages = ImageFiles(images, arguments.size, MAX_PIXELS)
        else:
            kind, gigabytes = kind_of_cache(name, images, target, MAX_PIXELS, 1.0)
            cache = open_pixel_cache(folder / name, kind, gigabytes, images, target, MAX_PIXELS, {})
            files = CachedImages(cache)
        for workers in arguments.workers:
            source = PixelSource(files, workers, torch.device(arguments.device))
            rows.append([name, workers, f"{images_a_second(source, len(files), arguments):,.0f}"])
    paths = [str(images.root / path) for path in images.paths]
    for name, decode in (("Pillow without draft", by_pillow), ("torchvision", by_torchvision)):
        rows.append([f"files, {name}", 0, f"{decoded_a_second(decode, paths, arguments):,.0f}"])
    return rows


def images_a_second(source: PixelSource, count: int, arguments: argparse.Namespace) -> float:
    """Median of the rounds, in each of which every image comes twice, mirrored half of the times."""
    rng, seconds = np.random.default_rng(0), []
    for _ in range(arguments.rounds):
        numbers = np.concatenate([rng.permutation(count), rng.permutation(count)])
        parts = np.array_split(numbers, max(len(numbers) // arguments.batch_size, 1))
        started = time.perf_counter()
        for batch in source.batches([(part, rng.random(len(part)) < 0.5) for part in parts]):
            batch[0, 0, 0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * count / median(seconds)


def decoded_a_second(decode: Callable[[str, int], object], paths: list[str], arguments: argparse.Namespace) -> float:
    """The same of a decoder in this process."""
    seconds = []
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        for path in paths:
            decode(path, arguments.size)
        seconds.append(time.perf_counter() - started)
    return len(paths) / median(seconds)


def by_pillow(path: str, size: int) -> object:
    """All of the JPEG, and then the resize that averages over what it leaves out."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def by_torchvision(path: str, size: int) -> object:
    """libjpeg-turbo through torchvision, resized by torch."""
    pixels = torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)
    return torchvision.transforms.functional.resize(pixels, [size, size], antialias=True)


if __name__ == "__main__":
    run_script(main)
