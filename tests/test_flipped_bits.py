"""One flipped bit in any artifact: its reader refuses it in one line, or gives what it gives without it.

The readers are the scripts themselves, in a fork of this process, which has imported what they import.
"""

import functools
import hashlib
import importlib
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY

import compare_runs
import evaluate
import extract_doc2vec_vectors
import knn_document_features
import make_report
import search
import train_cross_modal_retrieval_model as training
import train_doc2vec
import tune_loss_weights
from pipeline.command_line import run_script

pytestmark = pytest.mark.slow

FLIPS = int(os.environ.get("FLIPS_OF_AN_ARTIFACT", "3"))
LATE = (
    "reporting.evaluation reporting.precision_curves reporting.answers reporting.retrieval_index reporting.page "
    "reporting.sections reporting.compared_runs training.tensorboard_pages training.tuning training.encoder "
    "training.image_sources training.loop training.trainer text_space.inference text_space.neighbors text_space.table "
    "optuna.storages matplotlib.pyplot sqlalchemy.dialects.sqlite tensorboard.compat.proto.event_pb2 torch._dynamo"
)
"""Modules that the scripts import when they need them."""


class Ended(NamedTuple):
    """How a script ended."""

    code: int
    stdout: str
    stderr: str


def forked(main: Callable[[], object], words: list[str], folder: Path) -> Ended:
    """Run a script's `main` in a fork of this process."""
    paths = [folder / "stdout", folder / "stderr"]
    process = os.fork()
    if not process:
        code = 1
        try:
            signal.alarm(120)
            for number, path in enumerate(paths, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["reader.py", *words]
            run_script(main)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException as error:
            print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return Ended(code, *(path.read_text(errors="replace") for path in paths))


class Reader(NamedTuple):
    """A script that reads an artifact."""

    main: Callable[..., object]
    words: Callable[[Path], list[str]]
    result: Callable[[Path, str], object]
    """What it gives, from WORK and what it printed."""
    before: Callable[[Path], object] = lambda _: None
    """What is done to WORK before."""


def run_of(work: Path) -> Path:
    (run,) = (work / "runs").iterdir()
    return run


def files(*patterns: str) -> Callable[[Path, str], object]:
    """The bytes of files in WORK."""
    return lambda work, _: [hashlib.sha256(path.read_bytes()).digest() for p in patterns for path in work.glob(p)]


def printed(pattern: str = "") -> Callable[[Path, str], object]:
    """The lines that a script printed, those in which the pattern is found."""
    return lambda _, stdout: [line for line in stdout.splitlines() if re.search(pattern, line)]


def in_work(*words: str) -> Callable[[Path], list[str]]:
    return lambda work: [*words, *TINY, "--work", str(work)]


def of_run(*words: str) -> Callable[[Path], list[str]]:
    return lambda work: ["--run", str(run_of(work)), *words]


def read_images(argv: list[str]) -> None:
    """Every image, as step 4 reads it with these settings."""
    from datasets import load_prepared
    from pipeline.command_line import make_parser, parse_settings
    from training.image_sources import image_source

    settings, _, _ = parse_settings(make_parser("", "model", "training"), argv)
    data = load_prepared(settings.work_folder, settings.model.text.max_words)
    numbers = np.arange(len(data.images.paths))
    source = image_source(settings, data, torch.device("cpu"))
    for part in np.array_split(numbers, 3):
        for flips in (np.zeros(len(part), bool), np.ones(len(part), bool)):
            print("read", hashlib.sha256(source.load(part, flips).contiguous().numpy().tobytes()).hexdigest())


def resumed_weights(work: Path, _: str) -> object:
    state = torch.load(run_of(work) / "last.pt", weights_only=True)
    return [hashlib.sha256(tensor.numpy().tobytes()).digest() for tensor in state["model"].values()]


PIXELS = ["--model.image.cache_features", "false", "--training.pixel_cache"]
TUNED = in_work("--tuning.trials", "2", "--training.max_epochs", "1")
EXTRACT = Reader(
    extract_doc2vec_vectors.main,
    in_work(),
    files("doc2vec/vectors.npy", "doc2vec/tokens.npy", "doc2vec/offsets.npy"),
    lambda work: (work / "doc2vec" / "extract_doc2vec_vectors.json").unlink(),
)
NEIGHBORS = Reader(knn_document_features.main, in_work("--neighbors.k", "4"), files("neighbors/doc2vec/*.npy"))
TRAIN = Reader(training.main, in_work("0", "0.3", "0.2", "--training.max_epochs", "1"), files("runs/*/best.pt"))
RESUME = Reader(
    training.main,
    in_work("1", "0.3", "0.2", "--resume"),
    resumed_weights,
    lambda work: (run_of(work) / "run.json").unlink(),
)
EVALUATE = Reader(evaluate.main, of_run("--evaluation.bootstrap", "10"), files("runs/*/metrics.json"))
EVALUATED = Reader(evaluate.main, of_run(), files("runs/*/metrics.json"))
COMPARE = Reader(compare_runs.main, lambda work: [str(run_of(work))] * 2, printed())
SEARCH = Reader(search.main, of_run("--json", "--image", "IMAGE"), printed())
REPORT = Reader(make_report.main, lambda work: ["--runs", str(run_of(work))], files("reports/*.html"))
TUNE = Reader(tune_loss_weights.main, TUNED, printed("Recall@1"))
FEATURES, RAW, JPEG = (
    Reader(read_images, in_work(*words), printed("^read")) for words in ([], [*PIXELS, "raw"], [*PIXELS, "jpeg"])
)

READERS: dict[str, tuple[Reader, ...]] = {
    "pairs.parquet": (Reader(train_doc2vec.main, in_work("--doc2vec.epochs", "2"), files("doc2vec/*.npy")), NEIGHBORS),
    "prepare_dataset.json": (NEIGHBORS,),
    "doc2vec/model": (EXTRACT,),
    "doc2vec/vocabulary.txt": (EXTRACT, SEARCH),
    "doc2vec/punkt.json": (EXTRACT, SEARCH),
    "doc2vec/word_vectors.npy": (TRAIN, EVALUATE),
    "doc2vec/train_doc2vec.json": (EXTRACT,),
    "doc2vec/vectors.npy": (NEIGHBORS, EVALUATE),
    "doc2vec/tokens.npy": (NEIGHBORS, TRAIN, EVALUATE),
    "doc2vec/offsets.npy": (NEIGHBORS, TRAIN, EVALUATE),
    "doc2vec/extract_doc2vec_vectors.json": (NEIGHBORS,),
    "neighbors/doc2vec/rows.npy": (TRAIN,),
    "neighbors/doc2vec/indices.npy": (TRAIN, REPORT),
    "neighbors/doc2vec/distances.npy": (TRAIN,),
    "neighbors/doc2vec/knn_document_features.json": (TRAIN,),
    "features/efficientnet*/features.json": (FEATURES,),
    "features/efficientnet*/features.npy": (FEATURES, TRAIN),
    "features/efficientnet*/features.checksums.npy": (FEATURES,),
    "features/pixels-*-raw-*/pixels.npy": (RAW,),
    "features/pixels-*-raw-*/pixels.json": (RAW,),
    "features/pixels-*-raw-*/checksums.npy": (RAW,),
    "features/pixels-*-jpeg-*/00000.jpegs": (JPEG,),
    "features/pixels-*-jpeg-*/00000.npy": (JPEG,),
    "features/pixels-*-jpeg-*/pixels.json": (JPEG,),
    "runs/*/config.yaml": (EVALUATE,),
    "runs/*/inputs.json": (EVALUATE, COMPARE),
    "runs/*/run.json": (EVALUATE, REPORT),
    "runs/*/best.pt": (EVALUATE, SEARCH),
    "runs/*/last.pt": (RESUME,),
    "runs/*/metrics.json": (COMPARE, EVALUATED, REPORT),
    "runs/*/queries.parquet": (COMPARE,),
    "runs/*/evaluate.json": (COMPARE, EVALUATED),
    "runs/*/index/index.json": (SEARCH,),
    "runs/*/index/images.npy": (SEARCH,),
    "runs/*/index/texts.npy": (SEARCH,),
    "runs/*/index/image_pairs.npy": (SEARCH,),
    "runs/*/index/text_pairs.npy": (SEARCH,),
    "tuning/*/method/trials.db": (TUNE,),
    "tuning/*/method/best.json": (TUNE,),
}


class Place(NamedTuple):
    """WORK with all artifacts, and where it is copied to for each reading."""

    finished: Path
    work: Path
    image: Path

    def words(self, reader: Reader) -> list[str]:
        return [word.replace("IMAGE", str(self.image)) for word in reader.words(self.work)]

    def read(self, reader: Reader, name: str = "", flip: int | None = None) -> tuple[Ended, object]:
        """How the reader ends, and what it gives, with a flipped bit in the artifact."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.finished, self.work)
        if flip is not None:
            (path,) = self.work.glob(name)
            flip_bit(path, random.Random(f"{name} {flip}"))
        reader.before(self.work)
        words = self.words(reader)
        ended = forked(functools.partial(reader.main, words), words, self.work.parent)
        return ended, None if ended.code else reader.result(self.work, ended.stdout)


def flip_bit(path: Path, chance: random.Random) -> None:
    """Flip a random bit of a file, which keeps its times."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture(scope="module")
def place(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """WORK with everything that the pipeline and its tools write."""
    for name in LATE.split():
        importlib.import_module(name)
    folder = tmp_path_factory.mktemp("flipped")
    work = folder / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    image = sorted(prepared_once.rglob("*.png"))[0]
    here = Place(folder / "finished", work, image)
    train = Reader(training.main, in_work("1", "0.3", "0.2"), printed())
    for reader in (train, EVALUATED, SEARCH, RAW, JPEG, TUNE):
        words = here.words(reader)
        ended = forked(functools.partial(reader.main, words), words, folder)
        assert ended.code == 0, ended.stderr
    shutil.move(work, here.finished)
    return here


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Callable[[Reader], object]:
    """What a reader gives without a flipped bit."""

    @functools.cache
    def read(reader: Reader) -> object:
        ended, result = place.read(reader)
        assert ended.code == 0, ended.stderr
        return result

    return read


def verdict(ended: Ended, result: object, wanted: Callable[[], object]) -> str:
    """`refused`, `harmless`, `silent` or `traceback`."""
    if ended.code == 2 and "Traceback" not in ended.stderr and len(ended.stderr.strip().splitlines()) == 1:
        return "refused"
    if ended.code:
        return "traceback"
    return "harmless" if result == wanted() else "silent"


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_refused_or_harmless(
    place: Place, undisturbed: Callable[[Reader], object], name: str, record_property: Callable[[str, object], None]
) -> None:
    found, told = Counter[str](), []
    for flip in range(FLIPS):
        reader = READERS[name][flip % len(READERS[name])]
        ended, result = place.read(reader, name, flip)
        how = verdict(ended, result, lambda reader=reader: undisturbed(reader))
        found[how] += 1
        told.append(f"{how} {flip}: {ended.stderr.strip()[-400:]}")
    record_property("verdicts", dict(found))
    print(name, dict(found))
    assert found.keys() <= {"refused", "harmless"}, "\n".join(told)
    for line in told:
        if line.startswith("refused"):
            assert re.search(r"\.py|--overwrite|remove", line), line
