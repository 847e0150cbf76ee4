"""A loss, a text encoder and a setting are added by their lines in the registries and in the schema, and nowhere else.

A reader: tests/readers/test_registry.py. A metric: tests/test_evaluate.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from torch import Tensor, nn

import evaluate
import train_cross_modal_retrieval_model as training
from pipeline import registry, schema


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("toys")
    monkeypatch.setitem(sys.modules, "toys", module)
    return module


def test_a_toy_loss(prepared: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the value of the setting that its option is named as."""
    margins = set()

    def closeness(
        anchors: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor | None = None, *, margin: float = 9.0
    ) -> Tensor:
        margins.add(margin)
        return margin + (anchors - positives).square().sum(dim=1).mean()

    toys.closeness = closeness  # type: ignore[attr-defined]
    monkeypatch.setitem(registry.LOSSES, "closeness", "toys:closeness")
    words = [*TINY, "--work", str(prepared), "--loss.base", "closeness", "--training.max_epochs", "1"]
    run = training.main(["1", "0.3", "0.2", *words, "--loss.margin", "0.25"])
    assert margins == {0.25}
    assert (run / "best.pt").is_file() and "closeness" in run.name


class ToyEncoder(nn.Module):
    """The mean of learned vectors of the words."""

    def __init__(self, text: schema.TextEncoder, word_vectors: np.ndarray, dimensions: int) -> None:
        super().__init__()
        self.words = nn.Embedding(*word_vectors.shape, padding_idx=0)
        self.project = nn.Linear(word_vectors.shape[1], dimensions)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return nn.functional.normalize(self.project(self.words(tokens).mean(dim=1)), dim=1)


def test_a_toy_text_encoder(prepared: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.ToyEncoder = ToyEncoder  # type: ignore[attr-defined]
    monkeypatch.setitem(registry.TEXT_ENCODERS, "toy", "toys:ToyEncoder")
    words = [*TINY, "--work", str(prepared), "--model.text.encoder", "toy", "--training.max_epochs", "1"]
    run = training.main(["1", "0", "0", *words])
    assert "texts.words.weight" in torch.load(run / "best.pt", weights_only=True)["model"]
    evaluate.main(["--run", str(run)])
    assert (run / "metrics.json").is_file()


TOY_SETTING = """    sharpness: Positive = 1.5
    \"\"\"How sharp a toy is.\"\"\"
    k: Count = 200
"""


def test_a_toy_setting(tmp_path: Path) -> None:
    """One field in a copy of the schema: flags, help, mistakes and the settings in a stamp follow from it."""
    for path in subprocess.check_output(["git", "ls-files", "*.py", "configs"], cwd=ROOT, text=True).split():
        if not path.startswith(("tests/", "benchmarks/")):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    copy = tmp_path / "pipeline" / "schema.py"
    written = copy.read_text()
    assert written.count("    k: Count = 200\n") == 1
    copy.write_text(written.replace("    k: Count = 200\n", TOY_SETTING))

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)

    shown = " ".join(python("knn_document_features.py", "--help").stdout.split())
    assert "--neighbors.sharpness X How sharp a toy is. (default: 1.5)" in shown
    refused = python("knn_document_features.py", "--neighbors.sharpness", "0")
    assert refused.returncode == 2 and "neighbors.sharpness is 0 and must be above 0" in refused.stderr
    stamped = python("-c", "from pipeline.steps import FIND_NEIGHBORS; print(*FIND_NEIGHBORS.settings)").stdout
    assert "neighbors.sharpness" in stamped.split()
