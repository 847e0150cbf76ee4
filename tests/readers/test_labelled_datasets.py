"""English Wikipedia, Chinese Wikipedia and TVGraz through step 0, on small files in their formats."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import one_line_error, run_script
from PIL import Image

import prepare_dataset
from pipeline.errors import UserError
from pipeline.registry import READERS
from pipeline.schema import Dataset
from readers.published import Row

ENGLISH = """<?xml version="1.0" encoding="UTF-8"?>
<article>
<name>{name}</name>
<section>History</section>
<text>
{text}
</text>
<image>{image}.jpg</image>
</article>
"""


def prepare(work: Path, *words: str | Path) -> list[dict[str, Any]]:
    """Run step 0 in this process, and return the pair table's rows."""
    with redirect_stdout(io.StringIO()):
        prepare_dataset.main(["--work", str(work), *map(str, words)])
    return pq.read_table(work / "pairs.parquet").to_pylist()


def draw(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (5, 4), colour % 256).save(path)


def ucsd(root: Path, texts: dict[str, tuple[str, str, str]], suffix: str, template: str, encoding: str) -> None:
    """UCSD's layout: by text's name its split, category and text."""
    categories = sorted({category for _, category, _ in texts.values()})
    (root / "texts").mkdir(parents=True)
    (root / "categories.list").write_text("".join(f"{name}\n" for name in categories))
    for split, name in (("train", "trainset_txt_img_cat.list"), ("test", "testset_txt_img_cat.list")):
        lines = [
            f"{text}\timage-{text}\t{categories.index(category) + 1}\n"
            for text, (of_split, category, _) in texts.items()
            if of_split == split
        ]
        (root / name).write_text("".join(lines))
    for number, (name, (_, category, text)) in enumerate(texts.items()):
        draw(root / "images" / category / f"image-{name}.jpg", number * 20)
        content = template.format(name=name, text=text, image=f"image-{name}")
        (root / "texts" / f"{name}{suffix}").write_text(content, encoding=encoding)


def test_english_wikipedia(tmp_path: Path) -> None:
    texts = {
        f"{number:032x}-{number % 3}": (
            "test" if number >= 8 else "train",
            ("art", "biology")[number % 2],
            f"The {number} oxen &amp;quot;plough&amp;quot; the {number + 7}th field.",
        )
        for number in range(10)
    }
    ucsd(tmp_path / "wikipedia", texts, ".xml", ENGLISH, "utf-8")
    table = prepare(tmp_path / "work", "--dataset.source", "wikipedia", "--dataset.root", tmp_path / "wikipedia")
    assert [row["split"] for row in table].count("test") == 2
    assert [row["split"] for row in table].count("val") == 2  # two images at least
    for row, (name, (_, category, _)) in zip(table, texts.items(), strict=True):
        assert row["image_path"] == f"images/{category}/image-{name}.jpg"
        assert row["category"] == category
    assert table[3]["text"] == 'The 3 oxen "plough" the 10th field.'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "template", "encoding"),
    [
        (".xml", ENGLISH, "utf-8"),
        (".txt", "{text}", "utf-8"),
        (".xml", ENGLISH, "utf-16"),
        (".txt", "{text}", "utf-16"),
    ],
)
def test_chinese_wikipedia(tmp_path: Path, suffix: str, template: str, encoding: str) -> None:
    texts = {
        f"{number}": ("test" if number >= 6 else "train", ("history", "sport")[number % 2], f"第{number}座大桥。很长。")
        for number in range(8)
    }
    ucsd(tmp_path / "wiki", texts, suffix, template, encoding)
    words = ["--dataset.source", "wikipedia", "--dataset.root", tmp_path / "wiki", "--dataset.language", "zh"]
    table = prepare(tmp_path / "work", *words)
    assert [row["text"] for row in table] == [text for _, _, text in texts.values()]
    assert {row["category"] for row in table} == {"history", "sport"}


TVGRAZ = '<?xml version="1.0"?>\n<PAGE>\n<URL>http://a.b/c?d&e</URL>\n<TEXT>\n{text}\n</TEXT>\n</PAGE>\n'


def tvgraz(root: Path) -> Path:
    """Two categories, with what may be odd about copies of the files."""
    for number in range(12):
        category = ("frog", "harp")[number % 2]
        draw(root / category / f"{number}.jpg", number)
        text = TVGRAZ.format(text=f"Page {number} &amp; its <b>tree</b> {category}{number * 3} in the pond.")
        (root / category / f"{number}.xml").write_bytes(text.encode("utf-16" if number % 3 else "utf-8"))
    draw(root / "harp" / "images" / "deep.PNG", 99)
    (root / "harp" / "texts").mkdir()
    (root / "harp" / "texts" / "deep.txt").write_text("A golden harp on a stage.")
    draw(root / "frog" / "mute.jpg")
    (root / "frog" / "unseen.xml").write_text(TVGRAZ.format(text="x"))
    draw(root / "frog" / "two.jpg")
    draw(root / "frog" / "two.gif")
    (root / "frog" / "two.xml").write_text(TVGRAZ.format(text="x"))
    draw(root / "harp" / "twice.jpg")
    for suffix in (".xml", ".txt"):
        (root / "harp" / f"twice{suffix}").write_text("x")
    draw(root / "harp" / "latin.jpg")
    (root / "harp" / "latin.txt").write_bytes("café".encode("latin-1"))
    (root / "harp" / "readme.html").write_text("no text")
    (root / "notes.txt").write_text("no category")
    return root


def test_tvgraz_rows(tmp_path: Path) -> None:
    root = tvgraz(tmp_path)
    source = READERS.load("tvgraz")(Dataset(source="tvgraz", root=str(root)), root, 0)
    rows = {row.label: row for row in source.rows()}
    first = rows["frog/0.jpg"]
    assert first == Row("frog/0.jpg", "frog/0.jpg", first.text, category="frog")
    assert " ".join(first.text.split()) == "Page 0 & its tree frog0 in the pond."
    assert " ".join(rows["harp/1.jpg"].text.split()) == "Page 1 & its tree harp3 in the pond.", "UTF-16"
    assert rows["harp/images/deep.PNG"].text == "A golden harp on a stage."
    assert len(rows) == 12 + 6
    assert {label: row.rejected[0] for label, row in rows.items() if row.rejected} == {
        "frog/mute.jpg": "missing file",
        "frog/unseen.xml": "missing file",
        "frog/two.gif": "ambiguous file",
        "harp/twice.jpg": "ambiguous file",
        "harp/latin.jpg": "unreadable text",
    }


def test_tvgraz(tmp_path: Path) -> None:
    root = tvgraz(tmp_path / "tvgraz")
    words = ["--dataset.source", "tvgraz", "--dataset.root", root, "--dataset.near_duplicates", "false"]
    table = prepare(tmp_path / "work", *words)
    assert len(table) == 13
    assert {row["split"] for row in table} == {"train", "val", "test"}
    assert {row["category"] for row in table} == {"frog", "harp"}
    rejected = (tmp_path / "work" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 5
    assert "a picture frog/unseen" in json.loads(rejected[2])["reason"]


def test_tvgraz_needs_a_folder_for_each_category(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no folders"):
        READERS.load("tvgraz")(Dataset(source="tvgraz", root=str(tmp_path)), tmp_path, 0)
    done = run_script("prepare_dataset.py", "--dataset.source", "tvgraz", "--work", tmp_path / "work", ok=False)
    assert "needs dataset.root" in one_line_error(done)
