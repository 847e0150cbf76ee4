"""When features are extracted anew. The features themselves are made up here."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import TINY

import extract_image_features
from pipeline.pairs import SCHEMA, write_pairs
from training import image_sources


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """WORK with one pair and its image."""
    (tmp_path / "drawing.png").write_bytes(b"image")
    row = {"image_id": "a", "image_path": "drawing.png", "text": "a", "category": None, "split": "train"}
    (tmp_path / "work").mkdir()
    write_pairs(tmp_path / "work" / "pairs.parquet", [pa.RecordBatch.from_pylist([row], SCHEMA)], tmp_path)
    monkeypatch.setattr(extract_image_features, "require", lambda *_: None)
    monkeypatch.setattr(image_sources, "cached_features", lambda *_: (np.zeros((1, 2, 3), np.float32), {}))
    return tmp_path / "work"


def extract(work: Path, *words: str) -> None:
    extract_image_features.main([*TINY, "--work", str(work), *words])


def test_features_of_a_replaced_weights_file_are_extracted_anew(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = work / "backbone.pt"
    weights.write_bytes(b"weights")
    extract(work, "--model.image.weights", str(weights))
    assert "wrote" in capsys.readouterr().out
    extract(work, "--model.image.weights", str(weights))
    assert "up to date" in capsys.readouterr().out
    weights.write_bytes(b"others")
    extract(work, "--model.image.weights", str(weights))
    assert "(weights): making it anew" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "anew"), [("none", True), ("imagenet", False)])
def test_the_seed_counts_where_weights_are_drawn(
    work: Path, capsys: pytest.CaptureFixture[str], weights: str, anew: bool
) -> None:
    extract(work, "--model.image.weights", weights)
    capsys.readouterr()
    extract(work, "--model.image.weights", weights, "--seed", "1")
    assert ("wrote" in capsys.readouterr().out) == anew
