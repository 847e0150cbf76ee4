"""Steps 0 to 5 by command line on small datasets in their owners' formats."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import TINY, run_script
from published_formats import (
    write_coco,
    write_conceptual_captions,
    write_flickr30k,
    write_goodnews,
    write_politics,
)

from reporting.evaluation import MIN_IMAGES

pytestmark = pytest.mark.slow

DATASETS: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    "politics": ("politics", write_politics, ["--dataset.min_characters", "501", "--text.max_sentences", "2"]),
    "goodnews": ("goodnews", write_goodnews, []),
    "goodnews-articles": ("goodnews", write_goodnews, ["--doc2vec.train_on", "articles"]),
    "conceptual_captions-files": ("conceptual_captions", partial(write_conceptual_captions, tars=False), []),
    "conceptual_captions-shards": (
        "conceptual_captions",
        write_conceptual_captions,
        ["--dataset.near_duplicates", "true", "--dataset.check_images", "header"],
    ),
    "coco": ("coco", write_coco, []),
    "coco-karpathy": ("coco", partial(write_coco, karpathy=True), []),
    "flickr30k": ("flickr30k", write_flickr30k, []),
    "flickr30k-karpathy": ("flickr30k", partial(write_flickr30k, karpathy=True), []),
}
"""By name: source, what writes the dataset, and further words of the command line."""


@pytest.mark.parametrize("name", DATASETS)
def test_steps_0_to_5(name: str, tmp_path: Path) -> None:
    source, write, more = DATASETS[name]
    root, work = tmp_path / "data", tmp_path / "work"
    root.mkdir()
    write(root)
    words = [*TINY, "--work", work, "--dataset.source", source, "--dataset.root", root, *more]
    printed = run_script("prepare_dataset.py", *words).stdout
    assert f"wrote {work}/pairs.parquet" in printed
    splits = pq.read_table(work / "pairs.parquet").group_by("split").aggregate([("image_id", "count_distinct")])
    assert set(splits["split"].to_pylist()) == {"train", "val", "test"}
    for script in ("train_doc2vec.py", "extract_doc2vec_vectors.py", "knn_document_features.py"):
        run_script(script, *words)
    run_script("train_cross_modal_retrieval_model.py", "1", "0.3", "0.2", *words)
    (run,) = (work / "runs").iterdir()
    run_script("evaluate.py", "--run", run)
    measured = json.loads((run / "metrics.json").read_text())
    images = pq.read_table(run / "queries.parquet")["image_id"].unique()
    assert ("5way_recall_at_1_image_to_text" in measured["figures"]) == (len(images) >= MIN_IMAGES)
    if name == "conceptual_captions-shards":  # its images are small pictures from within the shards
        run_script("make_report.py", "--runs", run, "--out", tmp_path / "report.html")
        assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/") > 20
    again = run_script("prepare_dataset.py", *words).stdout
    assert again.startswith("up to date")
