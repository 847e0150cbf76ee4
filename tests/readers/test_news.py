"""The readers of Politics and GoodNews, on small files in their exact formats."""

import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from published_formats import draw, sentence, write_goodnews, write_politics

import prepare_dataset
from pipeline.errors import UserError
from pipeline.registry import READERS
from pipeline.schema import Dataset, Doc2Vec, Settings
from pipeline.settings import mistakes
from readers.politics import read_pickle
from readers.published import Published, json_members


def published(source: str, root: Path) -> Published:
    return READERS.load(source)(Dataset(source=source, root=str(root)), root, 0)


# Politics


@pytest.mark.parametrize("small", [False, True])
def test_politics(tmp_path: Path, small: bool) -> None:
    write_politics(tmp_path, 8, 3, small)
    source = published("politics", tmp_path)
    rows = {row.image: row for row in source.rows()}
    assert len(rows) == 12 and all((tmp_path / image).is_file() for image in rows)
    assert {int(Path(image).stem): row.split for image, row in rows.items()} == {
        number: "train" if number < 8 else "test" if number < 11 else None for number in range(12)
    }
    last = rows["imgs/RIGHT/court/paper.com/11.jpg"]
    assert last.rejected == ("in no split", f"{last.image} is not in train_test_paths.pickle")
    row = rows["imgs/RIGHT/stars/paper.com/1.jpg"]
    assert row.text.startswith(sentence(1, 12)) and len(row.text) > 500
    assert row.category == (None if small else "stars")
    assert row.label == ("db.pickle 6" if small else "complete_db.pickle RIGHT stars 0")
    before = source.fingerprints()
    draw(tmp_path / row.image, 99)
    assert source.fingerprints() != before


def test_the_neurips_release_names_its_splits_otherwise(tmp_path: Path) -> None:
    write_politics(tmp_path, 8, 3)
    path = tmp_path / "train_test_paths.pickle"
    splits = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({f"{name}_imgs": paths for name, paths in splits.items()}))
    assert sum(row.split == "test" for row in published("politics", tmp_path).rows()) == 3
    path.write_bytes(pickle.dumps({"train": splits["train"], "test": splits["train"][:1]}))
    with pytest.raises(UserError, match="has imgs/LEFT/pets/paper.com/0.jpg in train and in test"):
        list(published("politics", tmp_path).rows())


def test_short_texts_are_rejected(tmp_path: Path) -> None:
    write_politics(tmp_path / "data", 30, 6)
    path = tmp_path / "data" / "complete_db.pickle"
    content = pickle.loads(path.read_bytes())
    for number, length in enumerate((500, 501)):
        content["LEFT"]["pets"][number]["content_text"] = "word " * 99 + "w" * (length - 495)
    path.write_bytes(pickle.dumps(content))
    words = ["--dataset.source", "politics", "--dataset.root", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    prepare_dataset.main([*words, "--dataset.min_characters", "501"])
    records = [json.loads(line) for line in (tmp_path / "work" / "rejected.jsonl").read_text().splitlines()]
    assert [record["reason"] for record in records if record["kind"] == "short text"] == [
        "short text: 500 characters of 501"
    ]
    texts = pq.read_table(tmp_path / "work" / "pairs.parquet")["text"].to_pylist()
    assert sum(len(text) == 501 for text in texts) == 1


@pytest.mark.parametrize("name", ["complete_db.pickle", "train_test_paths.pickle"])
def test_politics_names_what_is_missing(tmp_path: Path, name: str) -> None:
    write_politics(tmp_path, 2, 1)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"looked for {name}.*; found .*elsewhere, imgs.*cs\.pitt\.edu"):
        published("politics", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not built as Politics is"),
        ({"LEFT": [1]}, "is not built as Politics is"),
        ({"LEFT": {"pets": [{"local_path": 3, "content_text": "x"}]}}, None),
        ({"LEFT": {"pets": [{"local_path": "x.jpg"}]}}, None),
    ],
)
def test_broken_politics(tmp_path: Path, content: object, message: str | None) -> None:
    write_politics(tmp_path, 2, 1)
    (tmp_path / "complete_db.pickle").write_bytes(pickle.dumps(content))
    if message:
        with pytest.raises(UserError, match=message):
            list(published("politics", tmp_path).rows())
    else:
        (row,) = published("politics", tmp_path).rows()
        assert row.rejected and row.rejected[0] == "bad row"


# Pickles


class RunsACommand:
    """When it is unpickled by pickle.load, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    ran, root = tmp_path / "it ran", tmp_path / "data"
    root.mkdir()
    hostile = pickle.dumps({"LEFT": {"pets": [RunsACommand(ran)]}}, protocol)
    pickle.loads(hostile)
    assert ran.exists(), "the pickle is harmless, so the test would show nothing"
    ran.unlink()
    for name in ("complete_db.pickle", "train_test_paths.pickle"):
        write_politics(root, 2, 1)
        (root / name).write_bytes(hostile)
        words = ["--dataset.source", "politics", "--dataset.root", str(root), "--work", str(tmp_path / "work")]
        with pytest.raises(UserError, match=rf"refused to read .*{name}: it names (posix|nt)\.system"):
            prepare_dataset.main(words)
        assert not ran.exists()
        assert not (tmp_path / "work" / "pairs.parquet").exists()


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (b"cos\nsystem\n(S'echo hello'\ntR.", "os.system"),
        (b"c__builtin__\neval\n(S'1+1'\ntR.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n(cbuiltins\ndict\nS'mro'\ntR.", "builtins.getattr"),
        (b"(S'echo hello'\nios\nsystem\n.", "os.system"),
        (b"cbuiltins\ndict.__class__\n.", "builtins.dict.__class__"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0ddict.fromkeys\x93.", "builtins.dict.fromkeys"),
    ],
)
def test_nothing_but_containers_can_be_named(tmp_path: Path, program: bytes, names: str) -> None:
    path = tmp_path / "a.pickle"
    path.write_bytes(program)
    with pytest.raises(UserError, match=f"it names {names.replace('builtins.eval', '__builtin__.eval')}"):
        read_pickle(path)


def test_arrays_are_refused_by_name_and_plain_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps({"a": np.zeros(3)}))
    with pytest.raises(UserError, match="it names numpy"):
        read_pickle(path)
    plain = {
        "nested": [(1, 2.5, None, True, "text", b"bytes", 10**40), {3}, frozenset({4})],
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, b=[2]),
    }
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(plain, protocol))
        assert read_pickle(path) == plain
    path.write_bytes(pickle.dumps(plain)[:-9])
    with pytest.raises(UserError, match="refused to read"):
        read_pickle(path)


DEEP = {
    "tuples as a key": b"}" + b"K\1" + b"\x85" * 300_000 + b"K\1s.",
    "a frozenset as a key": b"\x80\4}(K\1\x91K\1s.",
    "tuples in a set": b"\x80\4\x8f(K\1" + b"\x85" * 300_000 + b"\x90.",
    "tuples in a frozenset": b"\x80\4(K\1" + b"\x85" * 300_000 + b"\x91.",
    "sets of sets": b"\x80\4(K\1\x91\x94" + b"".join(b"(h%c(h%c\x91\x91\x94" % (n, n) for n in range(60)) + b".",
    "tuples of two of the same": b"}K\1" + b"".join(b"2\x86" for _ in range(60)) + b"K\1s.",
    "numbers with one hash": b"}(" + b"".join(b"I%d\nN" % (n * (2**61 - 1)) for n in range(2, 50_000)) + b"u.",
    "numbers of the memo with one hash": b"N" + b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(2, 50_000)) + b".",
    "copies of a list": b"cbuiltins\nlist\nq\0]q\1(" + b"N" * 50_000 + b"e0" + b"h\0h\1\x85R" * 50_000 + b".",
    "a set that is called": b"c__builtin__\nset\n(]K\1" + b"\x85" * 300_000 + b"atR.",
}
READ = """
import sys, time
from pathlib import Path
from pipeline.errors import UserError
from readers.politics import read_pickle
try:
    read_pickle(Path(sys.argv[1]))
    print("read")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("name", DEEP)
def test_pickles_that_crash_or_hang_when_they_are_hashed_are_refused(tmp_path: Path, name: str) -> None:
    """In a process of its own: pickle.load ends it with signal 11, or takes hours."""
    path = tmp_path / "a.pickle"
    path.write_bytes(DEEP[name])
    words = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    why = "it copies containers" if name.startswith("copies") else "something else than texts and numbers"
    assert "refused to read" in done.stdout and why in done.stdout


def test_deep_values_are_no_texts(tmp_path: Path) -> None:
    """Nested where a path or a text should be: the row is rejected, or the file refused."""
    write_politics(tmp_path, 3, 1)
    deep = b"K\1" + b"\x85" * 300_000
    (tmp_path / "complete_db.pickle").write_bytes(
        b"}\x8c\4LEFT}\x8c\4pets](}(\x8c\nlocal_path" + deep + b"\x8c\x0ccontent_textK\1uess."
    )
    (row,) = published("politics", tmp_path).rows()
    assert row.rejected == ("bad row", "has no local_path")
    (tmp_path / "train_test_paths.pickle").write_bytes(b"}(\x8c\5train](" + deep + b"e\x8c\4test]u.")
    with pytest.raises(UserError, match="no lists of paths under train and test"):
        list(published("politics", tmp_path).rows())


def typed(value: object) -> tuple[type, object]:
    """With the types, by which 1 and True differ. Sets are sorted: their own order depends on the process."""
    match value:
        case dict():
            return type(value), [(typed(key), typed(entry)) for key, entry in value.items()]
        case list() | tuple():
            return type(value), [typed(entry) for entry in value]
        case set() | frozenset():
            return type(value), sorted(repr(typed(entry)) for entry in value)
    return type(value), repr(value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_are_read_as_pickle_reads_them(tmp_path: Path, protocol: int) -> None:
    shared = ["one list", "named twice"]
    plain = {
        "texts": ["", "a\nb", "图", "x" * 70_000, "\\ '"],
        "numbers": [0, -1, 255, 256, 65536, 2**31, -(2**40), 10**40, 1.5, -0.0, True, False, None],
        "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[], {}], {"a": {"b": (None,)}}),
        "shared": [shared, shared],
        "sets": [set(), {"a", 2}, frozenset(), frozenset({3, "b"})],
        "keys": {1: "a", 2.5: "b", None: "c", False: "d"},
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "default": collections.defaultdict(list, b=[2]),
    }
    if protocol >= 3:
        plain["bytes"] = [b"", b"\xff", b"y" * 300]
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps(plain, protocol))
    found = read_pickle(path)
    assert found == plain and typed(found) == typed(plain)
    assert found["shared"][0] is found["shared"][1]


# GoodNews


def test_goodnews(tmp_path: Path) -> None:
    write_goodnews(tmp_path, 12)
    splits = json.loads((tmp_path / "img_splits.json").read_text())
    source = published("goodnews", tmp_path)
    rows = list(source.rows())
    assert {row.image_id: row.split for row in rows} == splits
    assert all((tmp_path / row.image).is_file() for row in rows)
    row = rows[2]
    assert (row.image, row.text) == ("images/4fd2a0e18eb7c8105d000001_1.jpg", sentence(3001))
    assert row.label == "captioning_dataset.json 4fd2a0e18eb7c8105d000001_1"
    # Articles 3 to 8 are val and test, and of 9 and 11 the second image is.
    assert source.articles is not None
    held_out = {name for name, split in splits.items() if split != "train"}
    articles = list(source.articles(held_out))
    assert [text.split(".")[0] + "." for text in articles] == [sentence(number) for number in (0, 1, 2, 10)]


def test_what_goodnews_left_out_is_rejected(tmp_path: Path) -> None:
    write_goodnews(tmp_path, 3)
    path = tmp_path / "img_splits.json"
    splits = json.loads(path.read_text())
    first, second, *_ = splits
    path.write_text(json.dumps({f"{name}.jpg": split for name, split in splits.items() if name != first}))
    content = json.loads((tmp_path / "captioning_dataset.json").read_text())
    content[second.split("_")[0]]["images"]["0"] = None
    content["a/../b"] = {"images": {"0": "text"}, "article": "x"}
    (tmp_path / "captioning_dataset.json").rename(tmp_path / "article+caption.json")
    (tmp_path / "article+caption.json").write_text(json.dumps(content))
    path.write_text(json.dumps({**json.loads(path.read_text()), "a/../b_0": "train"}))
    rows = list(published("goodnews", tmp_path).rows())
    kinds = ["in no split", "bad row", None, None, "outside the root"]
    assert [row.rejected and row.rejected[0] for row in rows] == kinds


@pytest.mark.parametrize("name", ["captioning_dataset.json", "img_splits.json", "images"])
def test_goodnews_names_what_is_missing(tmp_path: Path, name: str) -> None:
    write_goodnews(tmp_path, 3)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"looked for {name}.*; found .*elsewhere.*github\.com/furkanbiten/GoodNews"):
        published("goodnews", tmp_path)


def test_broken_goodnews(tmp_path: Path) -> None:
    write_goodnews(tmp_path, 3)
    (tmp_path / "captioning_dataset.json").write_text('{"a": {"article": "x"}}')
    with pytest.raises(UserError, match="article a has no images"):
        list(published("goodnews", tmp_path).rows())
    (tmp_path / "img_splits.json").write_text('{"a_0": "held"}')
    with pytest.raises(UserError, match="does not say train, val or test"):
        list(published("goodnews", tmp_path).rows())


def test_articles_are_of_goodnews_only() -> None:
    wrong = Settings(dataset=Dataset(source="coco", root="x"), doc2vec=Doc2Vec(train_on="articles"))
    assert mistakes(wrong) == ["doc2vec.train_on articles goes with dataset.source goodnews, and that is coco"]
    for kept in (True, False):
        drawn = Dataset(source="goodnews", root="x", published_splits=kept)
        assert mistakes(Settings(dataset=drawn, doc2vec=Doc2Vec(train_on="articles"))) == []


# JSON, a member at a time


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "{}",
        ' {\n "a" : 1 , "b": [1, {"c": "}"}], "c": -1.5e3,\n"d":null, "e": "\\u4e2d\\" ,"} \n',
        '\ufeff{"a": {"b": 12345}}',
    ],
)
def test_json_members(tmp_path: Path, text: str, chunk: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert dict(json_members(path, chunk)) == json.loads(text.removeprefix("\ufeff"))


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1', '{"a": ', '{"a" 1}', '{"a": 1 "b": 2}', "{1: 2}", '{"a": tru}'])
def test_broken_json_members(tmp_path: Path, text: str, chunk: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match="cannot read"):
        list(json_members(path, chunk))
