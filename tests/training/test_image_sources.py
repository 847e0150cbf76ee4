"""Image features that were stopped while they were computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from images.backbones import Backbone
from pipeline.command_line import make_parser, parse_settings
from pipeline.pairs import load_images
from training import image_sources
from training.image_sources import cached_features

FLAGS = ["--evaluation.batch_size", "16", "--training.workers", "0"]  # four images at a time


class Stopped(Exception):
    """In place of a kill."""


def features(work: Path, folder: Path) -> np.ndarray:
    settings, _, _ = parse_settings(make_parser(""), [*TINY, *FLAGS, "--work", str(work), "--features", str(folder)])
    return np.array(cached_features(settings, load_images(settings.work_folder), torch.device("cpu"))[0])


def test_features_that_were_stopped_are_resumed(
    prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_sources, "SECONDS_BETWEEN_NOTES", 0)
    undisturbed = features(prepared_once, tmp_path / "one")
    usual, batches = Backbone.forward, []

    def forward(self: Backbone, images: torch.Tensor) -> torch.Tensor:
        batches.append(len(images))
        if stopping and len(batches) == 5:  # the first two look at sizes and shapes
            raise Stopped
        return usual(self, images)

    monkeypatch.setattr(Backbone, "forward", forward)
    stopping = True
    with pytest.raises(Stopped):
        features(prepared_once, tmp_path / "other")
    stopping, first = False, len(batches)
    capsys.readouterr()
    assert np.array_equal(features(prepared_once, tmp_path / "other"), undisturbed, equal_nan=True)
    assert f"8 of {len(undisturbed)} images have their features; resuming" in capsys.readouterr().out
    assert sum(batches[first + 2 :]) == 2 * (len(undisturbed) - 8)  # each image and its mirror image
    (path,) = (tmp_path / "other").rglob("features.npy")
    path.with_suffix(".partial.json").write_text("{}")  # as a kill right after the last write leaves it
    features(prepared_once, tmp_path / "other")
    names = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("one", "other")]
    assert names[0] == names[1]


def test_features_of_other_images_are_not_resumed(
    prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_sources, "SECONDS_BETWEEN_NOTES", 0)
    usual = image_sources._PartialFeatures.finish

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(image_sources._PartialFeatures, "finish", stop)
    with pytest.raises(Stopped):
        features(prepared_once, tmp_path)
    monkeypatch.setattr(image_sources._PartialFeatures, "finish", usual)
    monkeypatch.setattr(image_sources, "images_digest", lambda images: "others")
    features(prepared_once, tmp_path)
    assert "resuming" not in capsys.readouterr().out
