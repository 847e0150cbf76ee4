"""The pixel cache against the image files that it stands for."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_script
from PIL import Image

from images import checked_rows, pixel_cache
from images.loading import CachedImages, ImageFiles, PixelSource
from images.networks import Input
from images.pixel_cache import PixelCache, kind_of_cache, open_pixel_cache
from pipeline.errors import UserError
from pipeline.pairs import Images
from pipeline.schema import Settings
from training.image_sources import pixel_cache as cache_of

SIZE = 16


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """Seven pictures of any size, in which neighboring pixels are alike, the last but one no picture."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    paths = [f"{number}.{'png' if number % 2 else 'jpg'}" for number in range(7)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8))
        small.resize(tuple(rng.integers(10, 60, 2).tolist())).save(tmp_path / "images" / path)
    (tmp_path / "images" / paths[5]).write_bytes(b"no picture")
    return Images(paths, np.arange(7), tmp_path / "images")


def opened(folder: Path, kind: str, images: Images, made_from: str = "these") -> PixelCache:
    return open_pixel_cache(folder, kind, 1e-6, images, Input(SIZE), 10**6, {"images": made_from})


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
@pytest.mark.parametrize("part", [1000, 3])  # one part, made here; three, made by two processes
def test_cached_pixels_are_those_of_the_files(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, part: int
) -> None:
    monkeypatch.setattr(pixel_cache, "IMAGES_PER_SHARD", part)
    monkeypatch.setattr(pixel_cache, "cores", lambda: 2)
    cached = CachedImages(opened(tmp_path / "cache", kind, images))
    files = ImageFiles(images, SIZE, 10**6)
    assert len(cached) == 7 and cached.unreadable == files.__getitems__([5])[1]
    numbers = np.array([6, 0, 5, 3, 0]), np.array([True, False, True, False, True])
    sources = [PixelSource(each, 0, torch.device("cpu")) for each in (cached, files)]
    assert 5 in sources[0].unreadable  # known before it is asked for
    (here,), (there,) = (list(source.batches([numbers])) for source in sources)
    assert here.dtype == torch.uint8 and here.is_contiguous(memory_format=torch.channels_last)
    assert not here[2].any()
    if kind == "raw":
        assert torch.equal(here, there)
    else:
        assert not torch.equal(here, there)
        assert (here.float() - there.float()).abs().mean() < 3
    assert torch.equal(sources[0].load(*numbers), here)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_cache_that_was_stopped_goes_on(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(pixel_cache, "IMAGES_PER_SHARD", 2)
    monkeypatch.setattr(pixel_cache, "cores", lambda: 0)  # what is interrupted is this process
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    opened(whole, kind, images)
    name = "_make_array" if kind == "raw" else "_make_shard"
    make, made = getattr(pixel_cache, name), []

    def until_the_third(*arguments: Any) -> Any:
        made.append(arguments[-1][0])
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(pixel_cache, name, until_the_third)
    with pytest.raises(KeyboardInterrupt):
        opened(stopped, kind, images)
    (stopped / "done.jsonl").open("a").write("[[0, ")  # the line that was being written
    cache = opened(stopped, kind, images)
    assert made == [0, 1, 2, 2, 3] and list(cache.unreadable) == [5]
    for path in whole.iterdir():
        assert path.name == ".lock" or path.read_bytes() == (stopped / path.name).read_bytes()
    opened(stopped, kind, images)
    assert len(made) == 5
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "begun.json").write_text(json.dumps({"images": "others"}))  # other files: all is made anew
    (begun / "done.jsonl").write_text("[]\n")
    (begun / ".00001.jpegs.here.1.part.jpegs").touch()
    opened(begun, kind, images)
    assert len(made) == 9
    assert sorted(path.name for path in begun.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_auto_takes_what_there_is_room_for(images: Images) -> None:
    raw = 7 * 64 * 64 * 3 / 1e9
    assert kind_of_cache("auto", images, Input(64), 10**6, raw) == ("raw", raw)
    kind, jpeg = kind_of_cache("jpeg", images, Input(64), 10**6, 1e-12)
    assert kind == "jpeg" and 0 < jpeg < raw
    assert kind_of_cache("auto", images, Input(64), 10**6, jpeg) == ("jpeg", jpeg)
    assert kind_of_cache("auto", images, Input(64), 10**6, jpeg * 0.99) == ("none", 0)
    assert kind_of_cache("raw", images, Input(64), 10**6, 1e-12) == ("raw", raw)
    assert kind_of_cache("none", images, Input(64), 10**6, 1.0) == ("none", 0)


def test_a_cache_that_another_run_has_finished_meanwhile_is_not_made_again(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = opened(tmp_path / "cache", "raw", images).pixels
    looked = iter([False])
    monkeypatch.setattr(pixel_cache, "is_finished", lambda _: next(looked, True))
    monkeypatch.setattr(pixel_cache, "_make", None)
    assert np.array_equal(opened(tmp_path / "cache", "raw", images).pixels, wanted)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("raw", "pixels.npy"), ("raw", "pixels.json"), ("jpeg", "00000.jpegs"), ("jpeg", "00000.npy")],
)
def test_a_damaged_cache_is_named(images: Images, tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "cache"
    cache = opened(folder, kind, images)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"the pixel cache .*cache is damaged \(.*\); remove that folder") as told:
        opened(folder, kind, images)
    assert "\n" not in str(told.value)
    if name == "00000.jpegs":  # damaged while it is read
        pixels, lost = CachedImages(cache).__getitems__([0, 6])
        assert pixels[0].any() and not pixels[1].any() and list(lost) == [6] and "remove that folder" in lost[6]


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_flipped_bit_in_a_cache_is_told_when_it_is_read(images: Images, tmp_path: Path, kind: str) -> None:
    folder, numbers, chance = tmp_path / "cache", np.arange(7), random.Random(0)

    def read() -> torch.Tensor:
        source = PixelSource(CachedImages(opened(folder, kind, images)), 0, torch.device("cpu"))
        return source.load(numbers, numbers < 0)

    wanted, told = read(), 0
    for path in sorted(folder.glob("[!.]*")):
        content = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(content)
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            try:
                assert torch.equal(read(), wanted)
            except UserError as error:
                assert "remove that folder" in str(error)
                told += 1
        path.write_bytes(content)
    assert told > 40


def test_a_row_is_verified_once() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    checksums = np.stack([checked_rows.row_checksums(row) for row in array])
    rows = checked_rows.CheckedRows(array, checksums, Path("features"))
    assert np.array_equal(rows[np.array([0, 2]), np.array([1, 0])], array[[0, 2], [1, 0]])
    array += 1
    rows[np.array([0, 2]), np.array([1, 0])]
    with pytest.raises(UserError, match="features is damaged"):
        rows[np.array([0, 2]), np.array([1, 1])]


def test_a_disk_that_fills_up_ends_the_making_in_one_line(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "begun.json").write_text(json.dumps({"images": "these"}))
    (tmp_path / "cache" / "done.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*cache: No space left on device"):
        opened(tmp_path / "cache", "jpeg", images)


def test_auto_goes_without_a_cache_where_the_disk_has_no_room(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(features=str(tmp_path / "features"))
    settings.model.image.size, settings.dataset.max_pixels = SIZE, 10**6
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert cache_of(settings, images) is None and not (tmp_path / "features").exists()
    monkeypatch.undo()
    assert cache_of(settings, images, for_one_pass=True) is None
    made = cache_of(settings, images)
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    for there in (cache_of(settings, images), cache_of(settings, images, for_one_pass=True)):
        assert there.folder == made.folder  # it takes no more room
    others = Images(images.paths[:3], images.of_pair[:3], images.root)
    assert cache_of(settings, others, for_one_pass=True) is None
    assert np.array_equal(made.pixels, cache_of(settings, images).pixels)


def test_a_disk_without_room_is_named_before_anything_is_written(images: Images, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes 1000000.0 GB and .* training.pixel_cache to auto, jpeg or none"):
        open_pixel_cache(tmp_path / "cache", "raw", 1e6, images, Input(SIZE), 10**6, {})
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_size_of_its_own_for_each_cache(images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(features=str(tmp_path / "features"))
    settings.model.image.size, settings.dataset.max_pixels = SIZE, 10**6
    assert cache_of(settings, images).folder.name.startswith("pixels-16-raw-")
    settings.model.image.size = 8
    assert cache_of(settings, images).pixels.shape[1] == 8
    settings.training.pixel_cache_gb, settings.model.image.size = 1e-12, 9
    assert (
        cache_of(settings, images) is None and "more than 1e-12 GB (training.pixel_cache_gb" in capsys.readouterr().out
    )
    settings.training.pixel_cache, settings.dataset.max_pixels = "jpeg", 20 * 20  # some are too large now
    assert len(cache_of(settings, images).unreadable) > 1


@pytest.mark.slow
def test_training_on_a_cache_is_training_on_files(prepared: Path) -> None:
    weights = []
    for cache in ("none", "auto", "raw", "jpeg"):
        words = ["1", "0.3", "0.2", *TINY, "--work", str(prepared), "--model.image.cache_features", "false"]
        done = run_script("train_cross_modal_retrieval_model.py", *words, "--training.pixel_cache", cache)
        (run,) = [Path(line.split()[-1]).parent for line in done.stdout.splitlines() if line.endswith("best.pt")]
        weights.append(torch.load(run / "best.pt", weights_only=True)["model"]["images.project.weight"])
        assert ("GB of pixels to" in done.stdout) == (cache in ("auto", "jpeg"))  # raw finds that of auto
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    torch.testing.assert_close(weights[0], weights[3], atol=0.05, rtol=0)
    (folder,) = (prepared / "features").glob("pixels-32-raw-*")
    stamp = json.loads((folder / "pixels.json").read_text())
    assert stamp["unreadable"] == {}
