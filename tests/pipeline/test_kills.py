"""Steps and tools that are killed before any of their operations on files end, run again, as undisturbed ones."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import run_script, with_libraries
from kill_points import Program, kill_everywhere

from pipeline.schema import Synthetic
from readers.synthetic import draw

CONFIG = """
deterministic: true
dataset: {source: manifest, manifest: %s, near_duplicates: true, val_share: 0.2, test_share: 0.25}
doc2vec: {vector_size: 4, mode: pv_dbow, hierarchical_softmax: false, negative: 5, window: 3, min_count: 1, epochs: 2}
neighbors: {k: 3}
model:
  dimensions: 4
  image: {backbone: efficientnet_lite0, weights: none, trainable: false, size: 32}
  text: {encoder: bag_of_words}
training: {batch_size: 16, max_epochs: 2, workers: 0, log_every: 1, checkpoint_minutes: 1.0e-9}
evaluation: {kway: [2], preservation_k: 1, bootstrap: 10, projector_pairs: 3}
siamese: {max_epochs: 1, dimensions: 4}
tuning: {trials: 2}
"""
TRAIN = "train_cross_modal_retrieval_model.py"
RUN = "WORK/runs/l_i2t_l_sym_1_l_img_0_3_l_text_0_2-seed=0"
WEIGHTS = ["1", "0.3", "0.2"]
SYNTHETIC = ["--dataset.source", "synthetic", "--dataset.synthetic.topics", "2", "--dataset.synthetic.pairs"]
CHAIN = [
    ("prepare_dataset.py", []),
    ("train_doc2vec.py", []),
    ("extract_doc2vec_vectors.py", []),
    ("knn_document_features.py", []),
    ("extract_image_features.py", []),
    (TRAIN, WEIGHTS),
    ("evaluate.py", ["--run", RUN]),
]
"""What makes the WORK in which programs are killed, one after the other."""
NOTHING, PREPARED, TRAINED_OMEGA, EMBEDDED, NEIGHBORS, FEATURES, TRAINED, EVALUATED = range(len(CHAIN) + 1)
"""How much of that was done before."""

KILLED = {
    "0": (NOTHING, Program("prepare_dataset.py", [])),
    "0, which draws": (NOTHING, Program("prepare_dataset.py", [*SYNTHETIC, "20"])),
    "0, which draws anew": (PREPARED, Program("prepare_dataset.py", [*SYNTHETIC, "20", "--seed", "1"])),
    "1": (PREPARED, Program("train_doc2vec.py", [])),
    "1, anew": (NEIGHBORS, Program("train_doc2vec.py", ["--seed", "1"])),
    "2": (TRAINED_OMEGA, Program("extract_doc2vec_vectors.py", [])),
    "2, anew": (NEIGHBORS, Program("extract_doc2vec_vectors.py", ["--seed", "1"])),
    "3": (EMBEDDED, Program("knn_document_features.py", [])),
    "3, by HNSW": (EMBEDDED, Program("knn_document_features.py", ["--neighbors.method", "hnsw"])),
    "features": (PREPARED, Program("extract_image_features.py", [])),
    "siamese": (NEIGHBORS, Program("train_siamese_labels.py", [])),
    "4": (FEATURES, Program(TRAIN, WEIGHTS, ("--resume",))),
    "4, anew": (EVALUATED, Program(TRAIN, [*WEIGHTS, "--overwrite"])),
    **{
        f"pixel cache, {kind}": (
            NEIGHBORS,
            Program(
                TRAIN,
                [*WEIGHTS, "--model.image.cache_features", "false", "--training.pixel_cache", kind],
                ("--resume",),
                only="images/pixel_cache.py",
            ),
        )
        for kind in ("raw", "jpeg")
    },
    "5": (TRAINED, Program("evaluate.py", ["--run", RUN])),
    "5, anew": (EVALUATED, Program("evaluate.py", ["--run", RUN, "--evaluation.kway", "[3]"])),
    "search": (TRAINED, Program("search.py", ["--run", RUN, "--image", "IMAGES/000000.png"])),
    "report": (TRAINED, Program("make_report.py", ["--runs", RUN])),
    "encode texts": (TRAINED, Program("encode.py", ["--run", RUN, "--texts", "TEXTS", "--out", "WORK/out.npy"])),
    "encode images": (TRAINED, Program("encode.py", ["--run", RUN, "--images", "IMAGES", "--out", "WORK/out.npy"])),
    "tuning": (FEATURES, Program("tune_loss_weights.py", [])),
    "tables": (
        NOTHING,
        Program(
            "reproduce_tables.py",
            ["--seeds", "1", "--tables", "1", "--methods", "OURS", "OURS (Img NNs)", "--out", "WORK/tables"],
        ),
    ),
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, `config.yaml`, and `0`, a folder in which WORK is empty; not to be changed."""
    top = tmp_path_factory.mktemp("kills")
    manifest = draw(Synthetic(pairs=60, topics=2), 0, top / "data")
    (top / "config.yaml").write_text(CONFIG % manifest)
    (top / "0" / "work").mkdir(parents=True)
    return top


@pytest.fixture(scope="session")
def made(published: Path) -> Path:
    """The same, and for each number of scripts of CHAIN the folder that they leave."""
    now = Path(shutil.copytree(published / "0", published / "now"))
    for number, (script, words) in enumerate(CHAIN, start=1):
        run_script(script, *filled(Program(script, list(words)), published, now).words)
        shutil.copytree(now, published / str(number))
    return published


def filled(program: Program, made: Path, folder: Path) -> Program:
    """The program with its paths."""
    places = {"WORK": folder / "work", "TEXTS": made / "data" / "pairs.jsonl", "IMAGES": made / "data" / "images"}
    words = program.words
    for name, path in places.items():
        words = [word.replace(name, str(path)) for word in words]
    if "--run" not in words and "--runs" not in words:
        words = [*words, "--config", str(made / "config.yaml"), "--work", str(folder / "work")]
    return Program(program.script, words, program.again, program.only)


def killed_everywhere(name: str, made: Path, tmp_path: Path, share: float) -> dict[str, int]:
    """How many operations the program has and before how many it was killed; asserts that it recovers from each."""
    done, program = KILLED[name]
    folder, report = Path(shutil.copytree(made / str(done), tmp_path / "folder")), tmp_path / "report.json"
    process = with_libraries().Process(
        target=kill_everywhere, args=(filled(program, made, folder), folder, share, 0, report)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    found = json.loads(report.read_text())
    print(name, found["operations"], found["points"])
    assert not found["wrong"], chr(10).join(found["wrong"])
    return found


def test_a_sample_of_step_0(published: Path, tmp_path: Path) -> None:
    assert killed_everywhere("0", published, tmp_path, 0.1)["points"] > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_before_any_operation(name: str, made: Path, tmp_path: Path) -> None:
    """Before a sample of the operations. With KILL_SHARE=1 in the environment, before all of them: half an hour."""
    share = float(os.environ.get("KILL_SHARE", 0.005 if name == "tables" else 0.05))
    assert killed_everywhere(name, made, tmp_path, share)["points"] >= 4
