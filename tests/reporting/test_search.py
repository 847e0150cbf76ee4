"""search.py and encode.py on a tiny trained run whose images have two texts each: answers, files, the page's server."""

import base64
import concurrent.futures
import csv
import html
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, one_line_error, page_problems, run_script
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import encode
import extract_doc2vec_vectors
import metrics
import prepare_dataset
import search
import train_cross_modal_retrieval_model
import train_doc2vec
from datasets import load_prepared
from pipeline.errors import UserError
from pipeline.pairs import SPLITS
from pipeline.schema import Synthetic
from ranking import nearest
from readers.synthetic import World
from reporting.answers import answer_image, answer_pair, answer_text, draw_pairs, fit_columns, printable
from reporting.retrieval_index import Index, open_index
from reporting.search_page import MAX_PICTURES, TIMEOUT_S, UPLOAD_BYTES, local_server, make_app
from training.embedding import embed_pairs
from training.encoder import RunEncoder
from training.image_sources import image_source

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SCRIPT_TEXT = "<script>document.title = 'run'</script>"
NO_WORD = "zzqx xqzz"
NONCE = re.compile(r'nonce="[^"]*"')


def made_up(folder: Path, *words: str) -> Path:
    """A run on 60 drawings with two texts each; pair 0's text holds a script, and no word of pair 3 is known."""
    world = World(Synthetic(topics=4, literalness=1.0), random.Random(0))
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(60):
        picture, texts = world.captioned(2)
        name = f"images/{number:02}.png"
        picture.save(folder / name)
        rows += [{"image": name, "text": text, "split": ("train", "val", "test")[number % 3]} for text in texts]
    rows[0]["text"] += f" {SCRIPT_TEXT} &"
    rows[3]["text"] = NO_WORD
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = [*TINY, "--work", str(folder / "work"), "--dataset.source", "manifest", "--dataset.name", "made up"]
    flags += ["--dataset.manifest", str(folder / "pairs.jsonl"), "--dataset.near_duplicates", "false"]
    flags += ["--training.max_epochs", "2", *words]
    for script in (prepare_dataset, train_doc2vec, extract_doc2vec_vectors):
        script.main(flags)
    return train_cross_modal_retrieval_model.main(["1", "0", "0", *flags])


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; only its index may be made anew."""
    return made_up(tmp_path_factory.mktemp("searched"))


@pytest.fixture(scope="session")
def encoder(run: Path) -> RunEncoder:
    return RunEncoder(run)


@pytest.fixture(scope="session")
def index(encoder: RunEncoder) -> Index:
    return open_index(encoder)


@pytest.fixture(scope="session")
def embedded(encoder: RunEncoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs with a known word, and the embeddings of their images and texts as step 5 computes them."""
    data, settings, device = (
        load_prepared(encoder.settings.work_folder, encoder.settings.model.text.max_words),
        encoder.settings,
        torch.device("cpu"),
    )
    rows = np.sort(np.concatenate([data.rows[split] for split in SPLITS]))
    x, y = embed_pairs(encoder.model, data, image_source(settings, data, device), rows, 256, "float32", device)
    return rows, x.numpy(), y.numpy()


def table_of(run: Path) -> list[dict]:
    return pq.read_table(run.parents[1] / "pairs.parquet").to_pylist()


# The nearest


@given(
    vectors=arrays(np.float32, (12, 2, 3), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])),
    query=arrays(np.float32, (2, 3), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])),
    among=st.none() | arrays(np.bool_, 12),
    top=st.integers(1, 15),
)
def test_nearest_is_a_sort_of_all(vectors: np.ndarray, query: np.ndarray, among: np.ndarray | None, top: int) -> None:
    # Multiples of 1/4 are exact, so that ties are ties.
    scores = [max(float(a @ b) for a in item for b in query) for item in vectors]
    order = sorted((-score, place) for place, score in enumerate(scores) if among is None or among[place])
    assert nearest(vectors, query, top, among) == [(place, -score) for score, place in order[:top]]
    one = [float(item[0] @ query[0]) for item in vectors]
    order = sorted((-score, place) for place, score in enumerate(one) if among is None or among[place])
    assert nearest(vectors[:, 0], query[0], top, among) == [(place, -score) for score, place in order[:top]]


@pytest.mark.slow
def test_a_text_finds_the_images_in_the_order_of_the_metrics(
    run: Path, encoder: RunEncoder, index: Index, embedded: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    rows, x, y = embedded
    table = table_of(run)
    pair = 10
    answer = answer_text(encoder, index, table[pair]["text"], top=1000)
    assert len(answer["images"]) == 60  # each once, though every one has two texts
    assert len({found["path"] for found in answer["images"]}) == 60
    assert [found["rank"] for found in answer["images"]] == list(range(1, 61))
    by_path = {found["path"]: found for found in answer["images"]}
    query = y[list(rows).index(pair)]
    for row, vector in zip(rows, x, strict=True):
        path = str(Path(index.files.root) / table[row]["image_path"])
        np.testing.assert_allclose(by_path[path]["score"], 1 - ((query - vector) ** 2).sum() / 2, atol=2e-6)
    own = by_path[str(Path(index.files.root) / table[pair]["image_path"])]
    ranks = metrics.rank_pairs(y, x, groups=rows // 2)
    assert own["rank"] == ranks.closer[list(rows).index(pair)] + 1
    assert own["texts_of_image"] == 2
    scores = {found["pair"]: found["score"] for found in answer["texts"]}
    assert answer["texts"][0]["pair"] == pair and scores[pair] == pytest.approx(1, abs=1e-5)
    assert sorted(scores) == rows.tolist()  # every text with a known word
    for row, vector in zip(rows.tolist(), y, strict=True):
        assert scores[row] == pytest.approx(float(query @ vector), abs=2e-6)


@pytest.mark.slow
def test_an_image_finds_texts_and_images_and_itself_first(
    run: Path, encoder: RunEncoder, index: Index, embedded: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    rows, x, y = embedded
    table = table_of(run)
    answer = answer_image(encoder, index, index.files.root / table[20]["image_path"], top=1000)
    assert answer["images"][0]["pair"] == 20
    assert answer["images"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert sorted(found["pair"] for found in answer["texts"]) == rows.tolist()  # all but the one without a known word
    expected = rows[np.argsort(-(y @ x[list(rows).index(20)]), kind="stable")]
    assert [found["pair"] for found in answer["texts"]][:10] == expected[:10].tolist()
    assert answer_pair(index, 20, top=1000)["images"][0]["pair"] == 20
    with pytest.raises(KeyError):
        answer_pair(index, 21, top=5)  # the image's second text
    for split in SPLITS:
        of_split = answer_pair(index, 20, 1000, split)
        assert {found["split"] for kind in ("images", "texts") for found in of_split[kind]} == {split}
    assert sum(len(answer_pair(index, 20, 1000, split)["images"]) for split in SPLITS) == 60


@pytest.mark.slow
def test_a_query_is_told_which_words_are_not_known(encoder: RunEncoder, index: Index) -> None:
    known = next(word for word in encoder.vocabulary if len(word) > 5 and word.isalpha())
    misspelt = known[:-1] + "q"
    answer = answer_text(encoder, index, f"{known} {misspelt} the", top=3)
    assert answer["query"]["words"] == [known]
    assert answer["query"]["ignored_words"] == [misspelt]
    assert known in answer["query"]["near_words"][misspelt]
    again = answer_text(encoder, index, known, top=3)
    assert list(answer) == ["query", "score", "split", "images", "texts"]
    assert (answer["images"], answer["texts"]) == (again["images"], again["texts"])
    with pytest.raises(UserError, match=rf"{misspelt} \(near it: .*{known}"):
        answer_text(encoder, index, misspelt, top=3)
    with pytest.raises(UserError, match="no word"):
        answer_text(encoder, index, "the of !", top=3)


@pytest.mark.slow
def test_pvse_is_searched_by_the_closest_of_its_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = made_up(tmp_path, "--model.pvse.embeddings", "2", "--model.image.size", "64", "--training.max_epochs", "1")
    encoder = RunEncoder(run)
    index = open_index(encoder)
    assert index.images.vectors.shape == (60, 2, 16)
    text = table_of(run)[10]["text"]
    (query,), _ = encoder.texts([text])
    scores = np.einsum("nkd,jd->nkj", index.images.vectors, query).max(axis=(1, 2))
    found = answer_text(encoder, index, text, top=60)["images"]
    np.testing.assert_allclose([one["score"] for one in found], np.sort(scores)[::-1], atol=1e-6)
    texts = tmp_path / "texts.txt"
    texts.write_text(text)
    encode.main(["--run", str(run), "--texts", str(texts), "--out", str(tmp_path / "x.npy")])
    assert np.load(tmp_path / "x.npy").shape == (1, 2, 16)


# The index


@pytest.mark.slow
def test_the_index_is_made_once_and_anew_when_the_run_has_changed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    work = tmp_path / "work"
    shutil.copytree(run.parents[1], work)  # a run lies in the WORK that it lies in now
    copy = work / "runs" / run.name
    shutil.rmtree(copy / "index", ignore_errors=True)

    def made(expected: bool) -> None:
        capsys.readouterr()
        open_index(RunEncoder(copy))
        assert (f"wrote {copy / 'index'}" in capsys.readouterr().out) == expected

    made(True)
    made(False)
    checkpoint = torch.load(copy / "best.pt", weights_only=True)
    checkpoint["model"]["texts.project.bias"] += 1
    torch.save(checkpoint, copy / "best.pt")
    before = np.load(copy / "index" / "texts.npy")
    made(True)
    assert not np.allclose(before, np.load(copy / "index" / "texts.npy"))
    (copy / "index" / "images.npy").unlink()
    made(True)

    (work / "doc2vec" / "vocabulary.txt").write_text("<pad>\n<start>\n<end>\nother\n")
    with pytest.raises(UserError, match=r"vocabulary.txt is damaged: .* run train_doc2vec.py again"):
        open_index(RunEncoder(copy))
    (work / "doc2vec" / "train_doc2vec.json").unlink()  # another vocabulary, and not a damaged one
    with pytest.raises(UserError, match=r"another doc2vec/vocabulary.txt"):
        open_index(RunEncoder(copy))
    (work / "pairs.parquet").unlink()
    with pytest.raises(UserError, match=r"pairs.parquet is not there"):
        open_index(RunEncoder(copy))


@pytest.mark.slow
def test_an_image_that_has_become_unreadable_is_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    work = tmp_path / "work"
    shutil.copytree(run.parents[1], work)
    copy = work / "runs" / run.name
    encoder = RunEncoder(copy)
    encoder.settings.training.max_unreadable_share = 0.1
    path = run.parents[2] / "images" / "10.png"
    saved, status = path.read_bytes(), path.stat()
    try:
        path.write_bytes(b"no image any more")
        index = open_index(encoder)
    finally:
        path.write_bytes(saved)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert f"left out: 1 images that cannot be read, the first: {path}" in capsys.readouterr().out
    assert len(index.images.pairs) == 59
    assert not index.holds_image(20)
    assert 20 in index.texts.pairs
    assert np.isfinite(index.images.vectors).all()


# The command lines


@pytest.mark.slow
def test_search_from_a_shell(run: Path, index: Index, capsys: pytest.CaptureFixture) -> None:
    table = table_of(run)
    word = next(word for word in table[10]["text"].lower().strip(".").split())
    shown = run_script("search.py", "--run", run, word, "zzqx", "--top", "3", "--split", "test").stdout
    assert "ignored, not in the vocabulary: zzqx" in shown
    images, texts = shown.split("images by cosine similarity")[1].split("texts by cosine similarity")
    for table_shown in (images, texts):
        assert len([line for line in table_shown.splitlines() if ".png" in line]) == 3
    assert "near it: " in one_line_error(run_script("search.py", "--run", run, f"{word}q", ok=False))
    image = index.files.root / table[20]["image_path"]
    capsys.readouterr()
    search.main(["--run", str(run), "--image", str(image), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["images"][0]["path"] == str(image)
    assert len(answer["texts"]) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give words to search for"),
        (["a", "--image", "b.png"], "give words to search for"),
        (["--image", "nowhere.png"], "there is no such file"),
        (["--image", "README.md"], "not an image"),
        (["word", "--top", "0"], "--top"),
        (["--serve", "--port", "70000"], "--port"),
        (["word", "--port", "8000"], "--port goes with --serve"),
        (["--serve", "--json"], "--json is for one query"),
        ([NO_WORD], "no word of the query is in the run's vocabulary"),
        (["the"], "no word"),
    ],
)
def test_a_wrong_search_ends_in_one_line(run: Path, index: Index, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search.main(["--run", str(run), *words])


@pytest.mark.slow
def test_search_wants_a_finished_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.yaml"):
        search.main(["--run", str(tmp_path), "word"])
    shutil.copytree(run, tmp_path / "runs" / "run")
    (tmp_path / "runs" / "run" / "run.json").unlink()
    with pytest.raises(UserError, match="is unfinished"):
        search.main(["--run", str(tmp_path / "runs" / "run"), "word"])


def test_a_table_is_safe_for_a_terminal_and_in_columns() -> None:
    assert printable("a\x1b[2Jb\n\tc\u202e") == "a[2Jb c"
    assert fit_columns("边境墙的照片", 6) == "边境… "
    assert fit_columns("short", 8) == "short   "


# encode.py


@pytest.mark.slow
def test_embeddings_of_the_datasets_own_files_are_those_of_step_5(
    run: Path, index: Index, embedded: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    rows, x, y = embedded
    table = table_of(run)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": row["text"]}) for row in table))
    paths = [str((Path(index.files.root) / row["image_path"]).absolute()) for row in table]
    (tmp_path / "list.txt").write_text("\n".join([*paths, "nowhere.png"]) + "\n")
    shown = run_script("encode.py", "--run", run, "--texts", tmp_path / "texts.jsonl", "--out", tmp_path / "texts.npy")
    assert "line 4: no word of it is in the vocabulary; row 3 is NaN" in shown.stderr
    assert f"wrote {tmp_path / 'texts.npy'}" in shown.stdout
    texts = np.load(tmp_path / "texts.npy")
    assert texts.dtype == np.float32
    np.testing.assert_allclose(texts[rows], y, atol=1e-6)
    assert np.isnan(texts[3]).all()
    named = list(csv.DictReader((tmp_path / "texts.csv").open(encoding="utf-8")))
    assert [row["line"] for row in named] == [str(number) for number in range(1, 121)]
    assert [row["row"] for row in named if row["problem"]] == ["3"]

    encode.main(["--run", str(run), "--images", str(tmp_path / "list.txt"), "--out", str(tmp_path / "images.npy")])
    images = np.load(tmp_path / "images.npy")
    np.testing.assert_allclose(images[rows], x, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(images[:-1], axis=1), 1, atol=1e-6)
    assert np.isnan(images[-1]).all()
    named = list(csv.DictReader((tmp_path / "images.csv").open(encoding="utf-8")))
    assert [Path(row["path"]).name for row in named if row["problem"]] == ["nowhere.png"]


@pytest.mark.slow
def test_a_folder_is_encoded_by_path_and_broken_images_keep_their_row(
    run: Path, encoder: RunEncoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "photos" / "b").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / "b" / "one.JPG")
    Image.new("CMYK", (30, 40)).save(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "b" / "\x1b]0;x\x07\n").write_bytes(b"no image")
    (tmp_path / "photos" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path)
    out = tmp_path / "x.npy"
    encode.main(["--run", str(run), "--images", str(tmp_path / "photos"), "--out", str(out)])
    said = capsys.readouterr()
    assert "broken.png" in said.err and "notes.txt: .txt is no suffix of an image; left out\n" in said.err
    assert "/\\u001b]0;x\\u0007\\n: has no suffix; left out\n" in said.err
    assert said.out.startswith("7 files: 3 images, 4 left out\n2 of 3 images encoded: ")
    listed = list(csv.DictReader((tmp_path / "x.csv").open(newline="", encoding="utf-8")))
    named, left_out = listed[:3], listed[3:]
    assert [Path(row["path"]).name for row in named] == ["a.jpg", "one.JPG", "broken.png"]
    assert [row["row"] for row in listed] == ["0", "1", "2", "", "", "", ""]
    assert {Path(row["path"]).name: row["problem"] for row in left_out} == {
        "\x1b]0;x\x07\n": "has no suffix",
        "gone.png": "a link that leads nowhere",
        "linked": "a link to a folder is not followed",
        "notes.txt": ".txt is no suffix of an image",
    }
    vectors = np.load(out)
    assert np.isnan(vectors).any(axis=1).tolist() == [False, False, True]
    alone, problems = encoder.images([tmp_path / "photos" / "b" / "one.JPG"])
    assert not problems
    np.testing.assert_allclose(alone[0], vectors[1], atol=1e-5)


@pytest.mark.slow
def test_nothing_is_written_where_nothing_can_be_encoded(run: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text(f"{NO_WORD}\n\n")
    (tmp_path / "wrong.jsonl").write_text('"fine"\n{"title": "no text"}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for what, name, message in (
        ("--texts", "none.txt", "none of the 2 texts can be encoded; line 1"),
        ("--texts", "wrong.jsonl", "line 2 is neither"),
        ("--texts", "empty.txt", "is empty"),
        ("--texts", "nowhere.txt", "cannot read"),
        ("--images", "folder", "holds no image"),
        ("--images", "nowhere", "neither a folder nor a file"),
    ):
        words = ["--run", str(run), what, str(tmp_path / name), "--out", str(tmp_path / "x.npy")]
        with pytest.raises(UserError, match=message):
            encode.main(words)
    with pytest.raises(UserError, match=r"must end in \.npy"):
        encode.main(["--run", str(run), "--texts", "a", "--out", "x.npz"])
    (tmp_path / "list.csv").write_text("one\n")
    for what in ("--texts", "--images"):
        with pytest.raises(UserError, match=r"list\.npy would overwrite .*list\.csv: .*; give another name"):
            encode.main(["--run", str(run), what, str(tmp_path / "list.csv"), "--out", f"{tmp_path}/./list.npy"])
    assert (tmp_path / "list.csv").read_text() == "one\n"
    assert not list(tmp_path.glob("*x.*"))


@pytest.mark.slow
def test_encoding_leaves_torchs_random_state_alone(run: Path, encoder: RunEncoder, index: Index) -> None:
    before = torch.get_rng_state()
    encoder.texts(["anything", table_of(run)[0]["text"]])
    encoder.images([index.files.root / index.files.paths[0]])
    assert torch.equal(before, torch.get_rng_state())


# The page's server


@pytest.fixture(scope="session")
def client(encoder: RunEncoder, index: Index) -> FlaskClient:
    return make_app(encoder, index).test_client()


def upload(client: FlaskClient, content: bytes, name: str = "photo.png"):
    return client.post("/", data={"picture": (io.BytesIO(content), name)}, content_type="multipart/form-data")


@pytest.mark.slow
def test_the_page_shows_what_is_found_and_texts_stay_texts(
    client: FlaskClient, encoder: RunEncoder, index: Index, run: Path
) -> None:
    text = table_of(run)[0]["text"]
    shown = client.get("/", query_string={"text": text}).text
    assert "/image/0" in shown
    assert SCRIPT_TEXT not in shown
    assert "&lt;script&gt;document.title" in shown
    nothing = client.get("/", query_string={"text": "<b>zzqx</b>"})
    assert nothing.status_code == 400
    assert "<b>zzqx" not in nothing.text
    assert "vocabulary" in nothing.text
    assert client.get("/", query_string={"text": text, "top": "-5", "split": "nonsense"}).status_code == 200
    few = make_app(encoder, index, 3, "val").test_client()
    shown = few.get("/", query_string={"text": text}).text
    assert shown.count(" · val") == 6  # images, and texts
    assert '<option value="val" selected>' in shown


@pytest.mark.slow
def test_a_picture_finds_texts_and_images(client: FlaskClient, index: Index, run: Path) -> None:
    path = index.files.root / table_of(run)[20]["image_path"]
    shown = upload(client, path.read_bytes(), "<script>.png").text
    assert "<h2>Texts by cosine similarity</h2>" in shown
    assert shown.index("/image/20") < shown.index("/image/0")
    assert "<script>.png" not in shown
    assert "/image/20" in client.get("/?pair=20&split=all").text
    assert client.get("/?pair=21").status_code == 404


@pytest.mark.slow
def test_the_page_opens_with_drawn_pairs_common_words_and_the_run_in_words(
    client: FlaskClient, encoder: RunEncoder, index: Index, run: Path
) -> None:
    shown = client.get("/").text
    assert shown == NONCE.sub(NONCE.search(shown)[0], client.get("/").text)  # drawn by seed
    drawn = [int(pair) for pair in re.findall(r'<img src="/image/(\d+)"', shown)]
    assert drawn == [pair["pair"] for pair in draw_pairs(index, 12, encoder.settings.seed)]
    assert len(set(drawn)) == 12 and drawn != sorted(drawn)
    names = [Path(table_of(run)[pair]["image_path"]).name for pair in drawn]
    assert re.findall(r'<bdi class="file">(.*?)</bdi>', shown) == names
    of_val = client.get("/?split=val").text
    assert of_val.count(" · val · ") == 12 and "from the val split" in of_val
    about = (
        "Angular N-pairs loss without neighbors; weights: text to image 1, images of neighbors 0, neighboring texts 0; "
    )
    assert about in shown and "seed 0" in shown and run.name in shown and '<a href="/">Search</a> made up</h1>' in shown
    counts = Counter(
        word for row in table_of(run) if row["split"] == "train" for word in encoder.tokenizer.words(row["text"])
    )
    words = re.findall(r"<bdi>(\w+)</bdi></a>", shown)
    assert [counts[word] for word in words] == sorted(counts.values(), reverse=True)[:10]
    linked = [html.unescape(link) for link in re.findall(r'href="(/\?text=.*?)"', shown)]
    assert len(linked) == 10 and all("Texts by" in client.get(link).text for link in linked)
    assert "Common words" not in client.get(linked[0]).text


@pytest.mark.slow
def test_near_words_of_unknown_ones_are_links(client: FlaskClient, encoder: RunEncoder) -> None:
    known = next(word for word in encoder.vocabulary if len(word) > 5 and word.isalpha())
    misspelt = known[:-1] + "q"
    nothing = client.get("/", query_string={"text": f"{misspelt} <i>zzqx", "split": "val"})
    assert nothing.status_code == 400
    link = f'<a href="/?text={known}&amp;split=val"><bdi>{known}</bdi></a>'
    suggested = re.search(r'role="alert">(.*?)</p>', nothing.text)[1]
    assert f"<bdi>{misspelt}</bdi></b> (near it: " in suggested and link in suggested and "<i>" not in suggested
    ignored = client.get("/", query_string={"text": f"{known} {misspelt}", "split": "val"}).text
    assert link in re.search(r'role="status">(.*?)</p>', ignored, re.DOTALL)[1]


@pytest.mark.slow
def test_a_text_found_is_shown_with_the_image_it_belongs_to(client: FlaskClient, index: Index, run: Path) -> None:
    shown = client.get("/", query_string={"text": table_of(run)[21]["text"], "top": 1}).text
    texts = shown.split("<h2>Texts by")[1]
    assert 'src="/image/20"' in texts and "pair 21" in texts  # its second text
    assert index.image_pair(20) == index.image_pair(21) == 20


def png(width: int, height: int) -> bytes:
    """A file of a few bytes that says it is so many black and white pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bomb", "large", "text", "cut off", "empty", "svg"])
def test_hostile_pictures_get_a_message(client: FlaskClient, kind: str) -> None:
    content = {
        "bomb": png(60_000, 60_000),
        "large": png(5_001, 5_000),
        "text": b"no image",
        "empty": b"",
        "svg": b"<svg onload='alert(1)'/>",
        "cut off": b"\xff\xd8\xff\xe0",
    }[kind]
    answer = upload(client, content)
    assert answer.status_code == 400
    assert "photo.png is no image that can be read" in answer.text
    assert "Traceback" not in answer.text
    assert "/tmp" not in answer.text
    assert ("more than this page&#39;s limit of 25000000" in answer.text) == (kind in ("bomb", "large"))


@pytest.mark.slow
def test_an_upload_is_limited_in_size(client: FlaskClient) -> None:
    answer = upload(client, bytes(UPLOAD_BYTES + 1))
    assert answer.status_code == 413
    assert "larger than 32 MB" in answer.text
    assert upload(client, b"", "").status_code == 400


@pytest.mark.slow
def test_only_images_of_the_index_are_served_and_as_jpeg(client: FlaskClient, index: Index) -> None:
    answer = client.get("/image/0")
    assert answer.mimetype == "image/jpeg"
    assert Image.open(io.BytesIO(answer.data)).format == "JPEG"
    assert client.get("/image/0", headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert client.get("/image/0/large").status_code == 200
    for path in ("/image/1", "/image/120", "/image/-1", "/image/../pairs.parquet", "/image/0/other", "/search.py"):
        assert client.get(path).status_code == 404, path
    for digits in (30, 5000):
        assert client.get(f"/image/{'9' * digits}").status_code == 404
        assert client.get(f"/?pair={'9' * digits}").status_code < 500
    assert client.post("/image/0").status_code == 405


@pytest.mark.slow
def test_other_hosts_are_refused_and_nothing_comes_from_elsewhere(client: FlaskClient) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        assert client.get("/", headers={"Host": host}).status_code == 400, host
        assert client.get("/image/0", headers={"Host": host}).status_code == 400, host
    for host in ("127.0.0.1:8000", "localhost:8123", "localhost"):
        answer = client.get("/", headers={"Host": host})
        assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in answer.text.replace("http://127.0.0.1", "")
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.slow
def test_other_sites_may_only_link_to_the_page(client: FlaskClient) -> None:
    for site in ("cross-site", "same-site"):
        embedded = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
        link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert client.get("/image/0", headers=embedded).status_code == 403
        assert client.get("/", headers=link).status_code == 200
        assert client.get("/", headers=link | {"Sec-Fetch-Dest": "iframe"}).status_code == 403
        assert client.post("/", headers=link).status_code == 403
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert client.get("/image/0", headers=own).status_code == 200


@pytest.mark.slow
def test_everything_is_for_this_origin_alone_and_names_no_server(address: str) -> None:
    for path in ("", "image/0", "image/0/large", "image/1", "nowhere", "?pair=21", f"image/{'9' * 5000}"):
        try:
            with urllib.request.urlopen(address + path, timeout=60) as answer:
                headers = answer.headers
        except urllib.error.HTTPError as error:
            headers = error.headers
        assert headers["Cross-Origin-Resource-Policy"] == headers["Cross-Origin-Opener-Policy"] == "same-origin", path
        assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers
        assert "Server" not in headers and "Via" not in headers


@pytest.mark.slow
def test_a_thumbnail_follows_its_file(encoder: RunEncoder, index: Index) -> None:
    page, path = make_app(encoder, index).test_client(), Path(index.describe(20)["path"])
    saved, status = path.read_bytes(), path.stat()
    before = page.get("/image/20").data
    try:
        Image.new("RGB", (32, 32), "red").save(path, "PNG")
        assert page.get("/image/20").data != before
        path.unlink()
        assert page.get("/image/20").status_code == 404
    finally:
        path.write_bytes(saved)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert page.get("/image/20").data == before


def test_an_upload_has_no_more_pixels_than_the_datasets_images(encoder: RunEncoder, index: Index) -> None:
    limit = encoder.settings.dataset.max_pixels
    encoder.settings.dataset.max_pixels = 10_000
    try:
        assert upload(make_app(encoder, index).test_client(), png(101, 100)).status_code == 400
    finally:
        encoder.settings.dataset.max_pixels = limit


def test_pictures_wait_for_each_other_and_nothing_waits_for_them(client: FlaskClient, index: Index, run: Path) -> None:
    page = client.application.view_functions["image"].__self__
    content = Path(index.describe(20)["path"]).read_bytes()
    for _ in range(MAX_PICTURES):
        page.pictures.acquire()
    answer = upload(client, content)
    assert answer.status_code == 503 and "Try again" in answer.text and answer.headers["Retry-After"] == "5"
    page.pictures.release()
    with page.decoding:  # a large image of the dataset is being decoded
        assert upload(client, content).status_code == 200
    page.thumbnail.cache_clear()
    with page.decoding_picture:
        assert client.get("/image/0").status_code == client.get("/", query_string={"pair": 20}).status_code == 200
    for _ in range(MAX_PICTURES - 1):
        page.pictures.release()
    assert upload(client, b"no image").status_code == 400
    for _ in range(MAX_PICTURES):  # each was released, after a mistake too
        assert page.pictures.acquire(blocking=False)
    for _ in range(MAX_PICTURES):
        page.pictures.release()
    decoded = page.thumbnail.cache_info().misses
    client.get("/image/0")
    assert page.thumbnail.cache_info().misses == decoded


@pytest.mark.slow
def test_two_hundred_queries_at_once_are_answered(address: str, run: Path) -> None:
    query = urllib.parse.urlencode({"text": table_of(run)[0]["text"], "top": 1})

    def ask(_: int) -> int:
        with urllib.request.urlopen(f"{address}?{query}", timeout=120) as answer:
            return answer.status

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        assert set(pool.map(ask, range(200))) == {200}


@pytest.mark.slow
def test_connections_that_send_nothing_are_closed(client: FlaskClient) -> None:
    server = local_server(client.application, 0)
    with socket.create_connection(("127.0.0.1", server.effective_port), timeout=60) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\n")
        server.handle_accept()
        (channel,) = server.active_channels.values()
        server.maintenance(time.time() + TIMEOUT_S - 10)
        assert not channel.will_close
        server.maintenance(time.time() + TIMEOUT_S + 10)
        assert channel.will_close
    server.close()
    server.task_dispatcher.shutdown()


@pytest.mark.slow
def test_the_page_is_served_until_ctrl_c_and_a_port_in_use_is_told(
    run: Path, index: Index, client: FlaskClient
) -> None:
    command = [sys.executable, str(ROOT / "search.py"), "--run", str(run), "--serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with server:
        try:
            (address,) = re.findall(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert "Drop a picture here" in answer.read().decode()
            port = int(address.split(":")[2].strip("/"))
            with pytest.raises(UserError, match=f"cannot listen on port {port}: .*--port"):
                local_server(client.application, port)
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
            assert not server.stderr.read()
        finally:
            server.kill()


# The page in a browser


@pytest.fixture(scope="session")
def address(encoder: RunEncoder, index: Index) -> Iterator[str]:
    """Where the page is served."""
    server = local_server(make_app(encoder, index), 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://127.0.0.1:{server.effective_port}/"
    server.trigger.pull_trigger(server.close)
    thread.join()
    server.task_dispatcher.shutdown()


def wait_for(browser: "Chrome", what: Callable[["Chrome"], Any]) -> Any:
    """What `what` returns, as soon as that is something."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(what)


def headings(browser: "Chrome") -> list[str]:
    return [heading.text for heading in browser.find_elements("tag name", "h2")]


def found_something(browser: "Chrome") -> bool:
    return "Images by cosine similarity" in headings(browser)


@pytest.mark.slow
def test_words_are_typed_and_images_found(browser: "Chrome", address: str, run: Path) -> None:
    text = table_of(run)[0]["text"]
    browser.get(address)
    assert not page_problems(browser)
    field = browser.find_element("name", "text")
    field.send_keys(text)
    field.submit()
    wait_for(browser, found_something)
    assert headings(browser) == ["Images by cosine similarity", "Texts by cosine similarity"]
    found = browser.find_elements("css selector", ".images li")
    assert len(found) == 24
    browser.find_element("link text", "More").click()
    wait_for(browser, lambda _: len(browser.find_elements("css selector", ".images li")) == 48)
    assert not page_problems(browser)
    # The pair's text holds a script, in the field and among the results: it stays a text.
    assert browser.find_element("name", "text").get_attribute("value") == text
    assert SCRIPT_TEXT in browser.find_element("tag name", "main").get_attribute("textContent")
    assert browser.title.startswith(text[:20])
    browser.find_element("link text", "like this").click()
    wait_for(browser, lambda _: "Like the image of pair" in browser.find_element("tag name", "main").text)
    assert not page_problems(browser)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["drop", "choose"])
def test_a_picture_is_dropped_or_chosen(browser: "Chrome", address: str, index: Index, way: str) -> None:
    path = Path(index.describe(20)["path"]).absolute()
    browser.get(address)
    browser.find_element("css selector", "option[value=val]").click()
    if way == "choose":
        browser.find_element("id", "picture").send_keys(str(path))
    else:
        browser.execute_script(
            """const bytes = Uint8Array.from(atob(arguments[0]), character => character.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], "photo.png", {type: "image/png"}));
            for (const name of ["dragover", "drop"]) document.getElementById("drop").dispatchEvent(
                new DragEvent(name, {dataTransfer: dropped, bubbles: true, cancelable: true}));""",
            base64.b64encode(path.read_bytes()).decode(),
        )
    wait_for(browser, found_something)
    assert headings(browser) == ["Images by cosine similarity", "Texts by cosine similarity"]
    assert "1.000 · pair 20 · val" in browser.find_element("css selector", ".images .faint").text
    assert len(browser.find_elements("css selector", ".images li")) == 20  # those of val
    assert not page_problems(browser)


@pytest.mark.slow
def test_a_broken_picture_gets_a_message_on_the_page(browser: "Chrome", address: str, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(60_000, 60_000))
    browser.get(address)
    browser.find_element("id", "picture").send_keys(str(tmp_path / "photo.png"))
    shown = wait_for(browser, lambda _: browser.find_elements("css selector", "[role=alert]"))
    assert "photo.png is no image that can be read" in shown[0].text
    browser.get_log("browser")  # Chromium notes the status 400


@pytest.mark.slow
def test_the_page_is_dark_where_it_is_wanted_and_fits_a_phone(browser: "Chrome", address: str, run: Path) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(f"{address}?pair=20")
        grounds[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert grounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 22, 26)"}
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for path in ("", "?pair=20", f"?text={'x' * 300}+{table_of(run)[10]['text']}"):
        browser.get(address + path)
        assert not page_problems(browser), path
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
