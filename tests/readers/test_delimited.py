"""Tables as text: no line of them vanishes, and the same table is the same dataset in every format."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_formats import draw
from test_sources import published

from pipeline.errors import UserError
from readers.delimited import names_an_image, read_records
from readers.manifest import read_manifest
from readers.published import Row


def records(text: str, columns: int = 2, **options: Any) -> list[tuple[int, list[str] | str]]:
    def is_row(fields: list[str]) -> bool:
        return len(fields) == columns and names_an_image(fields[0])

    return list(read_records(Path("p.csv"), io.StringIO(text, newline=""), ",", is_row, **options))


def test_a_quote_that_is_never_closed_swallows_no_row() -> None:
    found = records('a.png,one\nb.png,"two\nof it\nc.png,three\nd.png,"fo""ur"\ne.png,"five, six"\n')
    assert [number for number, _ in found] == [1, 2, 4, 5, 6]
    assert found[1][1] == "opens a quote (lines 2 to 3) that is not closed before line 4, a row of its own"
    assert [fields[1] for _, fields in found if not isinstance(fields, str)] == ["one", "three", 'fo"ur', "five, six"]


def test_two_open_quotes_in_a_row() -> None:
    found = records('a.png,"one\nb.png,"two\nc.png,three\n')
    assert [isinstance(fields, str) for _, fields in found] == [True, True, False]


@pytest.mark.parametrize("text", ["two\nlines", "a, b\nand c, d\n", "see\r\nphoto.png\nthere", '"\n\n"', "\n"])
def test_texts_of_several_lines_are_one_record(text: str) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([["a.png", text], ["b.png", "x"]])
    first, second = records(file.getvalue())
    assert first == (1, ["a.png", text]) and second[1] == ["b.png", "x"]
    assert second[0] == file.getvalue().removesuffix("\n").count("\n") + 1


def test_a_quote_that_no_row_follows_is_refused_by_its_line() -> None:
    with pytest.raises(UserError, match=r"p\.csv line 2: a quote is opened and never closed"):
        records('a.png,one\nb.png,"two\nand more\n')


def test_text_behind_a_closing_quote() -> None:
    assert records('a.png,"one"x\nb.png,two\n')[0][1] == "',' expected after '\"'"
    assert records('a.png,"one"x\nb.png,two\n', strict=False) == [(1, ["a.png", "onex"]), (2, ["b.png", "two"])]


@given(st.lists(st.text('ab",\n '), min_size=1, max_size=12), st.sets(st.integers(0, 11)))
def test_every_row_is_read_or_reported(texts: list[str], opened: set[int]) -> None:
    """Rows that csv wrote, some of them with a quote before their text that nobody closes."""
    file, numbers = io.StringIO(newline=""), []
    for place, text in enumerate(texts):
        numbers.append(file.getvalue().count("\n") + 1)
        if place in opened:
            file.write(f'{place}.png,"{text.replace(chr(34), "").replace(chr(10), "")}\n')
        else:
            csv.writer(file, lineterminator="\n").writerow([f"{place}.png", text])
    file.write("last.png,end\n")
    found = dict(records(file.getvalue()))
    assert set(numbers) <= set(found)
    for place, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        assert isinstance(found[number], str) if place in opened else found[number] == [f"{place}.png", text]


@pytest.mark.parametrize("later", [False, True])
def test_captions_behind_an_open_quote_are_read(tmp_path: Path, later: bool) -> None:
    """Of 40 captions of Flickr, and of as many rows of a manifest, one is lost and named."""
    lines = [f"{number // 2:03}.jpg,A dog on day {number}." for number in range(40)]
    lines[10] = '005.jpg,"A cat.'
    if later:
        lines[30] = '015.jpg,"A sign says ""stop"" there."'
    for number in range(20):
        draw(tmp_path / "Images" / f"{number:03}.jpg", number)
    (tmp_path / "captions.txt").write_text("image,caption\n" + "\n".join(lines) + "\n")
    rows = list(published(source="flickr30k", root=tmp_path).rows())
    assert [row.label for row in rows] == [f"captions.txt line {number}" for number in range(2, 42)]
    assert [row.label for row in rows if row.rejected] == ["captions.txt line 12"]
    (tmp_path / "my.csv").write_text("image,text\n" + "\n".join(lines) + "\n")
    rows = list(read_manifest(tmp_path / "my.csv", tmp_path))
    assert [row.label for row in rows] == [f"line {number}" for number in range(2, 42)]
    (bad,) = [row for row in rows if row.rejected]
    assert bad.label == "line 12" and "not closed before line 13" in bad.rejected[1]
    assert rows[30].text == ('A sign says "stop" there.' if later else "A dog on day 30.")


# The same table in every format


def values(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row.image, row.text, row.image_id, row.category, row.split, bool(row.rejected)) for row in rows]


@pytest.mark.parametrize(
    ("category", "wanted"),
    [
        ([3.0, None, 1.0], ["3", None, "1"]),
        ([1.5, None, -2.0], ["1.5", None, "-2"]),
        ([3, 4, 5], ["3", "4", "5"]),
        ([True, False, True], ["True", "False", "True"]),
        (["3.0", "cat", "v2.0"], ["3", "cat", "v2.0"]),
    ],
)
def test_the_same_table_is_the_same_dataset_in_every_format(
    tmp_path: Path, category: list[Any], wanted: list[str | None]
) -> None:
    """A table library turns a column of whole numbers with a gap into floats, and writes 3.0 or nan."""
    table = [
        {"image": f"{number}.png", "text": f"text {number}", "image_id": float(number), "category": value}
        for number, value in enumerate(category)
    ]
    found = []
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        path = tmp_path / f"p{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(table), path)
        elif suffix == ".jsonl":
            lines = (json.dumps(row | {"category": float("nan") if row["category"] is None else row["category"]})
                     for row in table)  # fmt: skip
            path.write_text("\n".join(lines))
        else:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(table[0]), delimiter="," if suffix == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(table)
        found.append(values(list(read_manifest(path, tmp_path))))
    assert found[0] == found[1] == found[2] == found[3]
    assert [row[3] for row in found[0]] == wanted
    assert [row[2] for row in found[0]] == ["0", "1", "2"] and not any(row[5] for row in found[0])


@pytest.mark.parametrize("without", [0, 3])
@pytest.mark.parametrize("key", ["text", "image", "category"])
def test_one_record_without_a_key_decides_for_no_other(tmp_path: Path, key: str, without: int) -> None:
    """Writers of JSON Lines may leave out empty fields."""
    table = [{"image": f"{number}.png", "text": f"text {number}", "category": "c"} for number in range(5)]
    del table[without][key]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, table)))
    rows = list(read_manifest(tmp_path / "p.jsonl", tmp_path))
    assert len(rows) == 5
    assert [row.text for row in rows if row.label != f"line {without + 1}"] == [
        f"text {number}" for number in range(5) if number != without
    ]
    assert bool(rows[without].rejected) == (key == "image")  # an empty text is rejected later
