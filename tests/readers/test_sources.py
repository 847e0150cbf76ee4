"""Readers of published datasets, on small files in their exact formats."""

import csv
import itertools
import json
import os
import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from pipeline.errors import UserError
from pipeline.registry import READERS
from pipeline.schema import Dataset
from readers.manifest import read_manifest
from readers.openclipart import _Metadata, openclipart_text
from readers.published import Published, Row
from readers.wikipedia import read_wikipedia


def published(work: Path | None = None, **dataset: Any) -> Published:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in dataset.items()}
    return READERS.load(values["source"])(Dataset(**values), (work or Path("no")) / "published", 0)


# OpenClipart

SVG = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.0//EN" "http://www.w3.org/TR/2001/REC-SVG-20010904/DTD/svg10.dtd" [
  <!ENTITY ns_svg "http://www.w3.org/2000/svg">
]>
<svg xmlns="&ns_svg;" height="1pt" width="1pt">
  <metadata>
    <rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
      xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
      <cc:Work rdf:about="">
        <dc:title>{title}</dc:title>
        <dc:description>{description}</dc:description>
        <dc:subject><rdf:Bag><rdf:li>hash</rdf:li><rdf:li></rdf:li>{keywords}</rdf:Bag></dc:subject>
        <dc:publisher><cc:Agent rdf:about="http://www.openclipart.org"><dc:title>C</dc:title></cc:Agent></dc:publisher>
        <dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator>
        <dc:format>image/svg+xml</dc:format>
      </cc:Work>
    </rdf:RDF>
  </metadata>
  <path d="M 0 0 {title}"/>
</svg>
"""


def write_drawing(
    root: Path, name: str, title: str, description: str = "", keywords: tuple[str, ...] = (), creator: str = "A B"
) -> None:
    """png/NAME.png, which is no image but named as one, and svg/NAME.svg with the metadata."""
    for folder, suffix in (("png", ".png"), ("svg", ".svg")):
        path = root / folder / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
        path.write_text(
            SVG.format(title=title, description=description, keywords=items, creator=creator), encoding="utf-8"
        )


def metadata(title: str = "", description: str = "", keywords: tuple[str, ...] = (), creator: str = "") -> _Metadata:
    return _Metadata(title, description, keywords, creator)


def test_openclipart(tmp_path: Path) -> None:
    write_drawing(tmp_path, "food/fruit/apple_01", "Apple", "A red apple.", ("fruit", "apple"))
    write_drawing(tmp_path, "animals/v0.1_cat", "Cat", keywords=("mammal", "animal"))
    (tmp_path / "png" / "food" / "apple_02.png").symlink_to("fruit/apple_01.png")
    (tmp_path / "svg" / "food" / "apple_02.svg").symlink_to("fruit/apple_01.svg")
    (tmp_path / "png" / "food" / "orphan.png").write_bytes(b"")
    (tmp_path / "png" / "food" / "readme.txt").write_bytes(b"")
    (tmp_path / "png" / "food" / "secret.png").symlink_to("/etc/passwd")
    (tmp_path / "svg" / "food" / "secret.svg").symlink_to("fruit/apple_01.svg")
    rows = list(published(source="openclipart", root=tmp_path).rows())
    assert rows == [
        Row("png/animals/v0.1_cat.png", "png/animals/v0.1_cat.png", "Cat. animal, mammal.", category="animals"),
        Row("png/food/apple_02.png", "png/food/fruit/apple_01.png", APPLE, category="food"),
        Row(
            "png/food/orphan.png",
            "png/food/orphan.png",
            rejected=("no metadata", "svg/food/orphan.svg is not there"),
        ),
        Row(
            "png/food/secret.png",
            "png/food/secret.png",
            rejected=("outside the root", "the link leads out of it"),
        ),
        Row("png/food/fruit/apple_01.png", "png/food/fruit/apple_01.png", APPLE, category="food"),
    ]


APPLE = "Apple. A red apple. apple, fruit."


def test_openclipart_takes_what_dpkg_unpacks(tmp_path: Path) -> None:
    write_drawing(tmp_path / "usr" / "share" / "openclipart", "food/apple", "Apple")
    assert published(source="openclipart", root=tmp_path).root == tmp_path / "usr" / "share" / "openclipart"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no folders png and svg"):
        published(source="openclipart", root=tmp_path / "empty")
    with pytest.raises(UserError, match="is no folder"):
        published(source="openclipart", root=tmp_path / "nowhere")


def test_titles_and_descriptions_on_many_drawings_are_dropped(tmp_path: Path) -> None:
    for number in range(11):
        write_drawing(tmp_path, f"icons/{number}", "Lemon SVG theme", "Drawn in 2004", (f"icon{number}",))
    for number in range(10):
        write_drawing(tmp_path, f"cats/{number}", "Cats", keywords=(f"cat{number}",))
    write_drawing(tmp_path, "cats/link", "", keywords=("x",))
    for number in range(20):  # links to one drawing are one drawing
        (tmp_path / "svg" / "cats" / f"link{number}.svg").symlink_to("0.svg")
        (tmp_path / "png" / "cats" / f"link{number}.png").symlink_to("0.png")
    texts = {row.label: row.text for row in published(source="openclipart", root=tmp_path).rows()}
    assert texts["png/icons/3.png"] == "icon3."
    assert texts["png/cats/3.png"] == "Cats. cat3."


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (metadata("Apple Pie", "Apple Pie", ("food", "pie")), "Apple Pie. food, pie."),
        (metadata("Clipart by Nicu Buculei - beer", "", ("food",)), "beer. food."),
        (metadata("Clipart by Jon A. Cruz - United States - California"), "United States - California."),
        (metadata("LED Circle", "jean.victor.balin@gmail.com", ("led",)), "LED Circle. led."),
        (metadata("Telefono (email: frollandin@email.it)"), "Telefono."),
        (metadata("A car", "contact: hermann.schwarting@knackich.de"), "A car."),
        (metadata("Planet", "Planet http://www.bcostea.net", ("HASH(0x8a07724)", "0x851ce54")), "Planet."),
        (metadata("Wagon [www.chevycelebrity.com]"), "Wagon."),
        (metadata("Roll (B &amp; W)", "&quot;Good&quot; &amp;quot;bread&amp;quot;"), 'Roll (B & W). "Good" "bread".'),
        (metadata("L&Atilde;&copy;zard"), "Lézard."),
        (metadata("Mikolá\x9a Ale\x9a"), "Mikoláš Aleš."),
        (metadata("étoile", "Буран"), "étoile. Буран."),
        (metadata("video_lcd", keywords=("united_nations_member",)), "video lcd. united nations member."),
        (metadata("Sun", "Created with Inkscape http://www.inkscape.org/"), "Sun."),
        (metadata("Sun", "create with the inkscape"), "Sun."),
        (metadata("Sapin", "Tree with stars made with Inkscape"), "Sapin. Tree with stars made with Inkscape."),
        (metadata("Gym", "Part of Hotel Icons Collection"), "Gym."),
        (metadata("Ox", "EPS converted from  http://aiga.org"), "Ox."),
        (metadata("Ox", "This work is hereby released into the Public Domain. To view"), "Ox."),
        (metadata("Ox", '<!-- x --><a href="http://creativecommons.org/">CC</a> This is <b>free</b>'), "Ox."),
        (metadata("tsunami", "sign from a public domain website"), "tsunami. sign from a public domain website."),
        (metadata("Cd", "Franco R", ("franco r", "cd"), creator="Franco R"), "Cd."),
        (metadata("books-aj.svg"), "books-aj."),
        (metadata("HASH(0x850c64c)", "", ("hash", "unsorted", "", "???")), ""),
        (metadata("", "", ("zebra", "ant", "zebra")), "ant, zebra."),
    ],
)  # fmt: skip
def test_openclipart_text(given: _Metadata, text: str) -> None:
    assert openclipart_text(given) == text


FAKE_APT = """#!/bin/sh
echo "$@" >> "$LOG"
[ -n "$FAIL" ] && { echo "E: Unable to locate package $2" >&2; exit 100; }
shift
for name in "$@"; do echo > "${name}_0.18_all.deb"; done
"""
FAKE_DPKG = """#!/bin/sh
echo "$@" >> "$LOG"
mkdir -p "$3/usr/share/openclipart/png/food" "$3/usr/share/openclipart/svg/food"
"""


@pytest.fixture
def fake_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt-get and dpkg that write down what they were asked for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("apt-get", FAKE_APT), ("dpkg", FAKE_DPKG)):
        (tools / name).write_text(script)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path


def test_openclipart_is_fetched_once(fake_debian: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = fake_debian / "work"
    first = published(work, source="openclipart")
    assert first.root == work / "published" / "openclipart" / "usr" / "share" / "openclipart"
    assert (fake_debian / "log").read_text().splitlines() == [
        "download openclipart-png openclipart-svg",
        "-x openclipart-png_0.18_all.deb .",
        "-x openclipart-svg_0.18_all.deb .",
    ]
    assert "fetching openclipart-png and openclipart-svg" in capsys.readouterr().out
    assert published(work, source="openclipart").root == first.root
    assert len((fake_debian / "log").read_text().splitlines()) == 3
    assert os.listdir(work / "published") == ["openclipart"]


def test_failed_fetch_leaves_nothing(fake_debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(UserError, match=r"apt-get download` failed \(E: Unable to locate package openclipart-png"):
        published(fake_debian / "work", source="openclipart")
    assert not list((fake_debian / "work" / "published").iterdir())


def test_without_apt_the_synthetic_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no apt-get here .* --dataset\.source synthetic"):
        published(tmp_path / "work", source="openclipart")


# Wikipedia


@pytest.fixture
def ucsd(tmp_path: Path) -> Path:
    """UCSD's layout, with what is odd about it and about collections that follow it."""
    (tmp_path / "texts").mkdir()
    for category in ("art", "biology"):
        (tmp_path / "images" / category).mkdir(parents=True)
    (tmp_path / "categories.list").write_text("art\r\nbiology\r\n")
    (tmp_path / "trainset_txt_img_cat.list").write_text(
        "aa-1\tone\t1\n"
        "bb-4.5\tone\t2\n"
        "cc\tblank\t1\n"
        "dd\tblank\t2\n"
        "aa-1\tgone\t1\n"
        "gone\tone\t1\n"
        "aa-1\tone\n"
        "aa-1\tone\t3\n"
        "latin\tone\t1\n"
    )
    (tmp_path / "testset_txt_img_cat.list").write_bytes(b"plain\ttwo\t2\r\n\r\n")
    for name in ("art/one.jpg", "biology/one.jpg", "biology/two.jpg", "art/blank .jpg", "biology/blank .jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "images" / "biology" / " blank.jpg").write_bytes(b"")
    (tmp_path / "texts" / "aa-1.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<wiki>\n<name>Ox & Co</name>\n<section>1</section>\n'
        "<text>\nThe ox &amp;quot;Ben&amp;quot; <b>ploughs</b> & a < b.\n</text>\n<image>one.jpg</image>\n</wiki>\n"
    )
    (tmp_path / "texts" / "bb-4.5.xml").write_text("<article>Cells <i>divide</i>.</article>")
    (tmp_path / "texts" / "cc.xml").write_text(
        '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><x><text><![CDATA[A & B]]> &b;</text>'
        "<skip>no</skip><text lang='en'>More.</text></x>"
    )
    (tmp_path / "texts" / "dd.xml").write_text("<text>x</text>")
    (tmp_path / "texts" / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "texts" / "plain.txt").write_text("\ufeffPlain & simple <text>.\n", encoding="utf-8")
    return tmp_path


def test_wikipedia(ucsd: Path) -> None:
    train = "trainset_txt_img_cat.list line {}".format
    rows = list(published(source="wikipedia", root=ucsd).rows())
    assert [(row.label, row.image, row.category, row.split) for row in rows if not row.rejected] == [
        (train(1), "images/art/one.jpg", "art", "train"),
        (train(2), "images/biology/one.jpg", "biology", "train"),
        (train(3), "images/art/blank .jpg", "art", "train"),
        ("testset_txt_img_cat.list line 1", "images/biology/two.jpg", "biology", "test"),
    ]
    assert [" ".join(row.text.split()) for row in rows if not row.rejected] == [
        'The ox "Ben" ploughs & a < b.',
        "Cells divide .",
        "A & B &b; More.",
        "Plain & simple <text>.",
    ]
    assert {row.label: row.rejected[0] for row in rows if row.rejected} == {
        train(4): "ambiguous file",
        train(5): "missing file",
        train(6): "missing file",
        train(7): "bad row",
        train(8): "bad row",
        train(9): "unreadable text",
    }


@pytest.mark.parametrize("name", ["categories.list", "testset_txt_img_cat.list", "texts"])
def test_wikipedia_names_what_is_missing(ucsd: Path, name: str) -> None:
    (ucsd / name).rename(ucsd / "elsewhere")
    with pytest.raises(UserError, match=rf"{name} is not there"):
        published(source="wikipedia", root=ucsd)
    with pytest.raises(UserError, match=r"needs dataset\.root"):
        published(source="wikipedia")


WEB_NEWS = ROOT.parent / "shared" / "data" / "web_news"


@pytest.mark.skipif(not WEB_NEWS.is_dir(), reason="the collection is not part of the project")
def test_web_news() -> None:
    rows = list(read_wikipedia(WEB_NEWS))
    assert len(rows) == 2200
    assert sum(row.split == "train" for row in rows) == 1700
    assert [row.rejected[0] for row in rows if row.rejected] == ["missing file"] * 7
    assert sum(row.image.endswith(" .jpg") for row in rows) == 3
    kept = [row for row in rows if not row.rejected]
    assert len({row.image for row in kept}) == len(kept)
    assert all((WEB_NEWS / row.image).is_file() and row.text for row in kept)


# Manifests

RECORDS = [
    {"image": "a.png", "text": 'A "cat"\nsat, there', "image_id": "1", "category": "cats", "split": "train"},
    {"image": "b/c.png", "text": "图为大桥", "image_id": "2", "category": "", "split": "Validation"},
    {"image": "./d.png", "text": "", "image_id": "", "category": "dogs", "split": "TEST"},
]
ROWS = [
    Row("", "a.png", 'A "cat"\nsat, there', "1", "cats", "train"),
    Row("", "b/c.png", "图为大桥", "2", None, "val"),
    Row("", "d.png", "", None, "dogs", "test"),
]


def write_manifest(path: Path, records: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records), encoding=encoding)
    else:
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_manifests_of_every_format(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = write_manifest(tmp_path / f"pairs{suffix}", RECORDS, encoding)
    source = published(source="manifest", manifest=path)
    assert source.root == tmp_path
    rows = list(source.rows())
    labels = {".csv": ["line 2", "line 4", "line 5"], ".jsonl": ["line 1", "line 2", "line 3"]}
    labels |= {".tsv": labels[".csv"], ".parquet": ["row 1", "row 2", "row 3"]}
    assert [row.label for row in rows] == labels[suffix]
    assert [(r.image, r.text, r.image_id, r.category, r.split) for r in rows] == [
        (r.image, r.text, r.image_id, r.category, r.split) for r in ROWS
    ]


def test_manifest_is_found_as_given_or_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write_manifest(tmp_path / "data" / "pairs.csv", RECORDS)
    (path,) = published(source="manifest", manifest="pairs.csv", root=tmp_path / "data").lists
    assert path == tmp_path / "data" / "pairs.csv"
    monkeypatch.chdir(tmp_path)
    source = published(source="manifest", manifest="data/pairs.csv", root="data")
    assert (source.root, source.lists) == (Path("data"), (Path("data/pairs.csv"),))


def rows_of(tmp_path: Path, name: str, content: str | bytes) -> list[Row]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_manifest(path, tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "kinds"),
    [
        ("p.csv", "image,text\na.png,one\nb.png\nc.png,two,three\n\nd.png,four\n", [None, "bad row", "bad row", None]),
        ("p.csv", 'image,text\na.png,"one"x\nb.png,two\n', ["bad row", None]),
        ("p.tsv", 'image\ttext\na.png\tsay "hi"\n', [None]),
        ("p.jsonl", '{"image": "a", "text": "b"}\n{"im\n\n[1]\n{"image": "b"}', [None, "bad row", "bad row", None]),
        ("p.jsonl", '{"image": "a", "text": null}\n{"image": "b", "text": [["x"]]}\n', [None, "bad row"]),
        ("p.jsonl", '{"image": "a", "text": "x", "category": 3}\n{"image": 1.5, "text": "x"}', [None, "bad row"]),
        ("p.csv", "image,text\n,one\n", ["bad row"]),
        ("p.csv", "image,text\n/etc/passwd,one\n../a.png,two\nb/../../c.png,x\n", ["outside the root"] * 3),
    ],
)  # fmt: skip
def test_bad_records_are_rejected_rows(tmp_path: Path, name: str, content: str, kinds: list[str | None]) -> None:
    assert [row.rejected and row.rejected[0] for row in rows_of(tmp_path, name, content)] == kinds


def test_detours_are_rejected_and_absolute_paths_in_the_root_are_its_images(tmp_path: Path) -> None:
    """Either would be another name of an image that has one."""
    (tmp_path / "a").mkdir()
    rows = rows_of(tmp_path, "p.csv", f"image,text\na/../b.png,x\n{tmp_path}/b.png,x\nb.png,x\n")
    assert [row.rejected and row.rejected[0] for row in rows] == ["outside the root", None, None]
    assert [row.image for row in rows[1:]] == ["b.png", "b.png"]


def test_numbers_are_good_enough_for_ids_and_categories(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": ["a.png"], "text": ["x"], "image_id": [7], "category": [3]}), path)
    (row,) = read_manifest(path, tmp_path)
    assert (row.image_id, row.category) == ("7", "3")


def test_links_may_not_lead_out_of_the_root_but_folders_may(tmp_path: Path) -> None:
    """A folder of images may be a link to another disk. A link to a single file may not lead out of its folder."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "in", outside):
        folder.mkdir(parents=True)
        (folder / "image.png").write_bytes(b"")
    (outside / "same.png").symlink_to("image.png")
    (outside / "out.png").symlink_to("/etc/hostname")
    (root / "good.png").symlink_to("in/image.png")
    (root / "bad.png").symlink_to(outside / "image.png")
    (root / "folder").symlink_to(outside)
    names = ["good.png", "bad.png", "folder/image.png", "folder/same.png", "folder/out.png", "in/image.png"]
    (root / "p.csv").write_text("image,text\n" + "".join(f"{name},x\n" for name in names))
    rows = list(read_manifest(root / "p.csv", root))
    assert [row.image for row in rows if row.rejected] == ["bad.png", "folder/out.png"]
    assert {row.rejected[0] for row in rows if row.rejected} == {"link out of the root"}
    (tmp_path / "link").symlink_to(root)
    again = list(read_manifest(tmp_path / "link" / "p.csv", tmp_path / "link"))
    assert [row.image for row in again if row.rejected] == ["bad.png", "folder/out.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "place,words\na,b\n", "no column image and no column text; its columns are: place, words"),
        ("p.csv", "", "its columns are: none"),
        ("p.csv", "image:text\na;b\n", "its columns are: image:text"),
        ("p.jsonl", '{"image": "a", "words": "b"}\n', "no column text; its columns are: image, words"),
        ("p.csv", 'image,text\na.png,"one\ntwo,\n\nthree\n', "line 2: a quote is opened and never closed"),
        ("p.csv", 'image,"text\n', "first line cannot be read"),
        ("p.csv", "image,text\n".encode("utf-16"), "is UTF-16"),
        ("p.parquet", "image,text\n", "cannot read"),
        ("p.csv", "image,text,split\na,x,train\nb,y,held\n", "line 3: split is 'held' and must be one of train, val"),
        ("p.csv", "image,text,split\na,x,train\nb,y,\n", "line 2 has a split, line 3 has none"),
    ],
)  # fmt: skip
def test_manifests_that_cannot_be_meant(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, name, content)


def test_wrong_manifest_settings(tmp_path: Path) -> None:
    (tmp_path / "pairs.xlsx").write_bytes(b"")
    for dataset, message in (
        ({}, r"needs dataset\.manifest"),
        ({"manifest": tmp_path / "no.csv"}, r"no\.csv is not there"),
        ({"manifest": "no.csv", "root": tmp_path}, rf"no\.csv is not there, nor is {tmp_path}/no\.csv"),
        ({"manifest": tmp_path / "pairs.xlsx"}, r"must end in one of \.csv, \.tsv, \.jsonl, \.json, \.parquet"),
        ({"manifest": "no.csv", "root": tmp_path / "nowhere"}, "is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            published(source="manifest", **dataset)


# Fingerprints


def test_fingerprints_change_with_the_files(ucsd: Path) -> None:
    seen = [published(source="wikipedia", root=ucsd).fingerprints()]
    assert seen[0] == published(source="wikipedia", root=ucsd).fingerprints()
    changes = [
        lambda: (ucsd / "texts" / "plain.txt").write_text("Something else"),
        lambda: (ucsd / "texts" / "plain.txt").write_text("something else"),  # of the same size
        lambda: (ucsd / "images" / "art" / "one.jpg").write_bytes(b"of another size"),
        lambda: (ucsd / "images" / "art" / "new.jpg").write_bytes(b""),
        lambda: (ucsd / "images" / "art" / "new.jpg").unlink(),
        lambda: (ucsd / "categories.list").write_text("art\nphysics\n"),
    ]
    for change in changes:
        change()
        seen.append(published(source="wikipedia", root=ucsd).fingerprints())
    assert all(one != other for one, other in itertools.pairwise(seen))
    os.utime(ucsd / "images" / "art" / "one.jpg", ns=(1, 1))
    assert seen[-1] == published(source="wikipedia", root=ucsd).fingerprints()  # as after a copy
    assert set(seen[0]) == {
        *(str(ucsd / name) for name in os.listdir(ucsd) if name.endswith(".list")),
        "images and texts",
    }


def test_of_a_manifest_the_images_it_names_are_watched(tmp_path: Path) -> None:
    write_manifest(tmp_path / "pairs.jsonl", [{"image": name, "text": "x"} for name in ("a.png", "\ud800", "../..")])
    seen = [published(source="manifest", manifest=tmp_path / "pairs.jsonl").fingerprints()]
    (tmp_path / "unrelated.png").write_bytes(b"")
    seen.append(published(source="manifest", manifest=tmp_path / "pairs.jsonl").fingerprints())
    (tmp_path / "a.png").write_bytes(b"")
    seen.append(published(source="manifest", manifest=tmp_path / "pairs.jsonl").fingerprints())
    assert seen[0] == seen[1] != seen[2]
