"""Readers are found by the registry: a toy one is added through it alone."""

import inspect
import sys
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from published_formats import draw, sentence

import prepare_dataset
from pipeline import registry
from pipeline.errors import UserError
from pipeline.registry import FILES_IN_ROOT, READERS
from pipeline.schema import Dataset, Settings
from pipeline.settings import mistakes
from readers.published import Published, Row, files_below, given_root


def toy(dataset: Dataset, published_folder: Path, seed: int) -> Published:
    """NAME.png beside NAME.txt in dataset.root."""
    root = given_root(dataset, "https://example.com/toys")

    def rows() -> list[Row]:
        names = [name for name in files_below(root, ".") if name.endswith(".png")]
        return [Row(name, name, (root / name).with_suffix(".txt").read_text()) for name in names]

    return Published(root, lambda: iter(rows()), (), lambda: files_below(root, "."))


def test_a_toy_reader_is_added_by_its_line_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("readers.toy")
    module.toy = toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "readers.toy", module)
    monkeypatch.setitem(registry.READERS, "toy", "readers.toy:toy")
    monkeypatch.setitem(registry.FILES_IN_ROOT, "toy", "NAME.png and NAME.txt")
    (message,) = mistakes(Settings(dataset=Dataset(source="toy")))
    assert "NAME.png and NAME.txt" in message
    for number in range(20):
        draw(tmp_path / "toys" / f"{number}.png", number)
        (tmp_path / "toys" / f"{number}.txt").write_text(sentence(number))
    words = ["--dataset.source", "toy", "--dataset.root", str(tmp_path / "toys"), "--work", str(tmp_path / "work")]
    prepare_dataset.main(words)
    assert sorted(pq.read_table(tmp_path / "work" / "pairs.parquet")["text"].to_pylist()) == sorted(
        sentence(number) for number in range(20)
    )


@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_what_it_reads_and_names_where_its_files_are(tmp_path: Path, name: str) -> None:
    reader = READERS.load(name)
    assert list(inspect.signature(reader).parameters) == ["dataset", "published_folder", "seed"]
    if name in FILES_IN_ROOT:
        missing = tmp_path / "nowhere"
        own = name in ("folder", "webdataset", "huggingface")
        where = r"docs/data\.md" if own else "published at http"
        message = rf"dataset\.root {missing} is no folder: name .* with --dataset\.root; {where}"
        with pytest.raises(UserError, match=message):
            reader(Dataset(source=name, root=str(missing)), tmp_path, 0)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"--dataset\.root.*" + (where if own else "http")):
            reader(Dataset(source=name, root=str(tmp_path / "empty")), tmp_path, 0)
