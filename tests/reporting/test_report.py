"""make_report.py on two tiny trained runs: its numbers against loops, and the page in a browser."""

import html
import json
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY, one_line_error, page_problems, run_script
from torch.utils.tensorboard import SummaryWriter

import evaluate
import extract_doc2vec_vectors
import knn_document_features
import make_report
import prepare_dataset
import train_cross_modal_retrieval_model
import train_doc2vec
from pipeline.command_line import make_parser, parse_settings
from pipeline.errors import UserError
from pipeline.files import fingerprint, read_json, write_json
from pipeline.schema import Synthetic
from ranking import gap_of_own, rank_of_own
from readers.synthetic import World
from reporting import page as page_module
from reporting.compared_runs import ComparedRuns, mark_words
from reporting.figures import read_metrics
from reporting.sections import SECTIONS, read_scalars, retrieval_of_pair, validation_terms
from training.encoder import RunEncoder

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SCRIPT_TEXT = "<script>document.title = 'run'</script>"
CHINESE, ARABIC = "红色的圆形，", "هذه صورة، "
ODD = (2, 5, 8)
"""Pairs of the test split whose texts hold a script, begin in Chinese, and begin in Arabic."""


def made_up(folder: Path, *, categories: bool) -> tuple[list[str], Path]:
    """Steps 0 to 3 on 90 drawings; the flags of the steps, and WORK."""
    world = World(Synthetic(topics=4, literalness=1.0), random.Random(0))
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(90):
        picture, (text,) = world.captioned(1)
        name = f"images/{number:02}.png"
        picture.save(folder / name)
        row = {"image": name, "text": text, "split": ("train", "val", "test")[number % 3]}
        rows.append(row | ({"category": f"<{number % 4}>"} if categories else {}))
    rows[ODD[0]]["text"] += f" {SCRIPT_TEXT} & more"
    rows[ODD[1]]["text"] = CHINESE + rows[ODD[1]]["text"]
    rows[ODD[2]]["text"] = ARABIC + rows[ODD[2]]["text"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    work = folder / "work"
    flags = [*TINY, "--work", str(work), "--dataset.source", "manifest", "--dataset.name", "made <up>"]
    flags += ["--dataset.manifest", str(folder / "pairs.jsonl"), "--dataset.near_duplicates", "false"]
    for script in (prepare_dataset, train_doc2vec, extract_doc2vec_vectors, knn_document_features):
        script.main(flags)
    return flags, work


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A method and a baseline, trained and evaluated; not to be changed."""
    flags, _ = made_up(tmp_path_factory.mktemp("reported"), categories=True)
    method, baseline = (
        train_cross_modal_retrieval_model.main([*weights, *flags]) for weights in (["1", "0.3", "0.2"], ["1", "0", "0"])
    )
    for run in (method, baseline):
        evaluate.main(["--run", str(run)])
    return method, baseline


@pytest.fixture(scope="session")
def report(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of both, from the command line."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    queries = map(str, ODD)
    words = ["--words", known_word(runs[0]), "zzqxq", "--top", "4"]
    done = run_script("make_report.py", "--runs", *runs, "--queries", *queries, *words, "--out", out)
    assert done.stdout.splitlines()[-1] == f"wrote {out}"
    return out


def known_word(run: Path) -> str:
    text = pq.read_table(run.parents[1] / "pairs.parquet")["text"][11].as_py()
    known, _ = RunEncoder(run).words(text)
    return known[0]


def embedded(run: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
    """The test pairs, and what encode.py makes of their files and texts: another way than the report's."""
    encoder = RunEncoder(run)
    table = pq.read_table(run.parents[1] / "pairs.parquet")
    pairs = [row for row in table.to_pylist() if row["split"] == "test"]
    root = Path(table.schema.metadata[b"root"].decode())
    x, _ = encoder.images([root / row["image_path"] for row in pairs])
    y, problems = encoder.texts([row["text"] for row in pairs])
    assert not problems
    return np.arange(2, 90, 3), x, y, pairs


def sections(page: str) -> dict[str, str]:
    """The page's sections by id."""
    return dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))


def test_a_torn_event_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SummaryWriter(str(tmp_path)) as board:
        for step in range(10):
            board.add_scalar("loss", step / 4, step)
    (path,) = tmp_path.iterdir()
    steps, values = read_scalars(tmp_path)["loss"]
    assert steps.tolist() == list(range(10)) and np.array_equal(values, steps / 4)
    assert not capsys.readouterr().out
    torn, flipped = path.read_bytes()[:-5], bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    for damaged in (torn, flipped):
        path.write_bytes(damaged)
        steps, _ = read_scalars(tmp_path)["loss"]
        assert 0 < len(steps) < 10 and steps.tolist() == list(range(len(steps)))
        assert f"{path} is torn or damaged after" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_has_every_section_in_order_and_a_link_to_each(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', page) == list(SECTIONS)
    assert re.findall(r'<a href="#(\w+)">(.*?)</a>', page) == [(name, title) for name, (title, _) in SECTIONS.items()]
    templates = Path(page_module.__file__).parent / "report_sections"
    assert {path.stem for path in templates.iterdir()} == set(SECTIONS)


@pytest.mark.slow
def test_results_and_ranks_are_those_of_a_loop(runs: tuple[Path, Path], report: Path) -> None:
    articles = sections(report.read_text(encoding="utf-8"))["retrieval"].split("<article>")[1:]
    assert len(articles) == len(ODD)
    spaces = [embedded(run) for run in runs]
    for pair, article in zip(ODD, articles, strict=True):
        expected_ranks, expected_gaps, expected_pairs = [], [], []
        for way in ("texts", "images"):
            for rows, x, y, _ in spaces:
                place = list(rows).index(pair)
                query, targets = (x[place], y) if way == "texts" else (y[place], x)
                scores = [float(np.dot(query, target)) for target in targets]
                order = sorted(range(len(rows)), key=lambda number: -scores[number])
                expected_ranks.append(1 + order.index(place))
                expected_gaps.append(scores[place] - max(score for i, score in enumerate(scores) if i != place))
                expected_pairs.append([int(rows[number]) for number in order[:4]])
        assert [int(rank) for rank in re.findall(r'class="rank">(\d+)<', article)] == expected_ranks
        gaps = [float(gap.replace("−", "-")) for gap in re.findall(r'class="gap">([+−][\d.]+)<', article)]
        np.testing.assert_allclose(gaps, expected_gaps, atol=6e-4)
        assert [gap > 0 for gap in expected_gaps] == [rank == 1 for rank in expected_ranks]
        texts, images = article.split("Images that the text finds")
        found_texts = [int(number) for number in re.findall(r" · pair (\d+)", texts)]
        assert found_texts == expected_pairs[0] + expected_pairs[1]
        found_images = [int(number) for number in re.findall(r'alt="Image of pair (\d+)', images)]
        assert found_images == expected_pairs[2] + expected_pairs[3]


@pytest.mark.slow
def test_ratios_of_distances_are_those_of_a_loop(runs: tuple[Path, Path], report: Path) -> None:
    (rows, *first, _), (_, *second, _) = (embedded(run) for run in runs)
    reference = np.load(runs[0].parents[1] / "doc2vec" / "vectors.npy")[rows]
    pairs = set()
    for i in range(len(rows)):  # the neighbors.k = 5 nearest of each of 30 pairs
        apart = [np.linalg.norm(reference[i] - reference[j]) if j != i else np.inf for j in range(len(rows))]
        pairs |= {tuple(sorted((i, int(j)))) for j in np.argsort(apart)[:5]}
    section = sections(report.read_text(encoding="utf-8"))["proximity"]
    assert f"{len(pairs)} pairs of different images" in section
    for kind, place in (("Images", 0), ("Texts", 1)):
        a, b = first[place], second[place]
        ratios = sorted(np.linalg.norm(a[i] - a[j]) / np.linalg.norm(b[i] - b[j]) for i, j in pairs)
        of_kind = re.split(r"<h3>(?:Images|Texts)</h3>", section)[1 + place]
        median = float(re.search(r'class="median">([\d.]+)<', of_kind)[1])
        assert median == pytest.approx(np.median(ratios), abs=1e-3), kind
        shown = [float(value) for value in re.findall(r'class="value">([\d.]+)<', of_kind)]
        np.testing.assert_allclose(shown, [*ratios[:2], *ratios[::-1][:2]], atol=1e-3)


@pytest.mark.slow
def test_figures_are_those_of_metrics_json(runs: tuple[Path, Path], report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    deciding, table = sections(page)["figures"].split("<table")[1:]
    decides, shown = (
        {cells[0]: cells[1:] for cells in (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in of.split("<tr>")[2:])}
        for of in (deciding, table)
    )
    assert page.index("<table") < page.index("<svg") < page.index("<img")  # the figures that decide are first
    assert decides == {name: shown[name] for name in shown if "Recall@" in name or "neighbors kept" in name}
    assert {"Recall@10, text to image", "neighbors kept of nearest 3, images"} <= set(decides) < set(shown)
    assert all(re.fullmatch(r"[+-][\d.]+ \[[+-][\d.]+ [+-][\d.]+\]", cells[4]) for cells in decides.values())
    figures = [json.loads((run / "metrics.json").read_text())["figures"] for run in runs]
    titles = {name: metric.title for name, metric in read_metrics(runs[0]).items()}
    assert {titles[name] for name in figures[0]} == set(shown)
    assert "5-way Recall@1, image to text" in shown
    for name, figure in figures[0].items():
        cells = shown[titles[name]]
        assert cells[0] == f"{figure['value']:.4f}"
        assert cells[2] == f"{figures[1][name]['value']:.4f}"
        if "low" in figure:
            assert cells[1] == f"{figure['low']:.4f} {figure['high']:.4f}"
        assert cells[-1] == f"{figure['chance']:.4f}"
    assert "L_img: images of neighbors <span" in page  # the baseline has no such curve
    made = sections(page)["made"]
    assert re.search(r"<td>test</td><td class=\"number\">30</td><td class=\"number\">30</td>", made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "terms"),
    [([], "i2t + sym"), (["--training.val_loss", "i2t"], "i2t"), (["--loss.base", "fine_grained"], "pairwise loss")],
)
def test_the_validation_loss_is_labelled_by_its_terms(flags: list[str], terms: str) -> None:
    settings, _, _ = parse_settings(make_parser(""), flags)
    assert validation_terms(settings) == terms


def test_words_are_searched_and_an_unknown_one_is_said_to_be(runs: tuple[Path, Path], report: Path) -> None:
    words = sections(report.read_text(encoding="utf-8"))["words"].split("<article>")[1:]
    word = known_word(runs[0])
    (query,), _ = RunEncoder(runs[0]).texts([word])
    rows, x, _, _ = embedded(runs[0])
    best = [int(rows[number]) for number in np.argsort(-(x @ query))[:4]]
    assert [int(pair) for pair in re.findall(r'alt="Image of pair (\d+)', words[0])][:4] == best
    assert words[1].count("no word of it is in the vocabulary") == 2
    holding = sum(word in RunEncoder(runs[0]).words(row["text"])[0] for row in embedded(runs[0])[3])
    assert holding and f"In {holding} texts of the test split" in words[0]
    assert "No text of the test split holds <bdi>zzqxq</bdi>" in words[1] and "No text" not in words[0]


def test_a_gap_is_that_to_the_best_other_item() -> None:
    vectors, query = np.eye(3, dtype=np.float32), np.array([0.6, 0.8, 0.0], np.float32)
    assert gap_of_own(vectors, query, np.array([True, False, True])) == pytest.approx(-0.2)
    assert gap_of_own(vectors, query, np.array([True, True, False])) == pytest.approx(0.8)
    assert gap_of_own(vectors, query, np.ones(3, dtype=bool)) is None
    twice = vectors[[0, 0]]  # a tie is a miss
    assert (
        gap_of_own(twice, query, np.array([True, False])) == 0
        and rank_of_own(twice, query, np.array([True, False])) == 2
    )


def test_matching_words_are_marked_in_any_script() -> None:
    assert mark_words("Red, a redder RED.", ["red"], "en") == [
        ("Red", True),
        (", a redder ", False),
        ("RED", True),
        (".", False),
    ]
    assert mark_words("红色的圆形", ["圆形"], "zh") == [("红色的", False), ("圆形", True)]
    assert mark_words("a.b", [], "en") == [("a.b", False)]
    assert mark_words("a.c abc", ["a.c"], "en") == [("a.c", True), (" abc", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (375, "dark"), (375, "light")])
def test_the_page_in_a_browser(report: Path, browser: "Chrome", width: int, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        browser.get(report.as_uri())
        assert page_problems(browser) == []
        assert browser.execute_script("return document.images.length") > 25
        assert browser.execute_script("return document.querySelectorAll('script').length") == 0
        assert browser.title.startswith("Report: made <up>, SYM 1, IMG 0.3, TEXT 0.2")
        text = browser.execute_script("return document.body.textContent")
        assert SCRIPT_TEXT in text and CHINESE in text and ARABIC in text
        direction = "return getComputedStyle(document.querySelectorAll('.query .text')[arguments[0]]).direction"
        assert [browser.execute_script(direction, number) for number in range(3)] == ["ltr", "ltr", "rtl"]
        ground, ink, bar = (
            browser.execute_script(f"return getComputedStyle({of}).{style}")
            for of, style in (
                ("document.body", "backgroundColor"),
                ("document.querySelector('#figures svg text')", "fill"),
                ("document.querySelector('#figures svg path[style*=run-a]')", "fill"),
            )
        )
        light = "rgb(255, 255, 255)", "rgb(91, 98, 109)", "rgb(0, 103, 165)"
        dark = "rgb(20, 22, 26)", "rgb(165, 172, 184)", "rgb(86, 180, 233)"
        assert (ground, ink, bar) == (light if scheme == "light" else dark)
        ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(element => element.id)")
        assert len(ids) == len(set(ids))
        unnamed = "return document.querySelectorAll('svg:not([aria-label]), img:not([alt])').length"
        assert browser.execute_script(unnamed) == 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_on_a_phone_the_page_is_not_much_longer_than_on_a_desk(report: Path, browser: "Chrome") -> None:
    heights, wide = [], []
    try:
        for width in (1280, 390):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(report.as_uri())
            heights.append(browser.execute_script("return document.documentElement.scrollHeight"))
            wide.append(browser.execute_script("return document.documentElement.scrollWidth > innerWidth"))
        scrolls = (
            "const box = document.querySelector('.deciding').parentElement; return box.scrollWidth > box.clientWidth"
        )
        assert browser.execute_script(scrolls)
        one_row = "return new Set([...document.querySelector('.found').children].map(item => item.offsetTop)).size"
        assert browser.execute_script(one_row) == 1
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not any(wide)
    assert heights[1] < 2.5 * heights[0]  # the limit is 5


@pytest.mark.slow
def test_one_run_of_several_embeddings_without_categories_that_is_not_evaluated(tmp_path: Path) -> None:
    flags, work = made_up(tmp_path, categories=False)
    pvse = ["--model.pvse.embeddings", "2", "--model.image.size", "64", "--training.max_epochs", "1"]
    run = train_cross_modal_retrieval_model.main(["1", "0", "0", *flags, *pvse])
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"work": str(work)}))
    out = make_report.main(["--config", str(config), "--runs", run.name, "--count", "2"])
    assert out == work / "reports" / f"{run.name}.html"
    page = out.read_text(encoding="utf-8")
    assert f"run evaluate.py --run {run} first" in html.unescape(page)
    encoder = RunEncoder(run)
    rows, x, y, _ = embedded(run)
    found = ComparedRuns([encoder])
    (query,) = found.positions_of([ODD[0]], 1)
    scores = [max(float(a @ b) for a in image for b in y[query]) for image in x]
    ranked = retrieval_of_pair(found, query, 3)["images"][0]
    assert [one["pair"] for one in ranked["results"]] == [int(rows[number]) for number in np.argsort(scores)[::-1][:3]]
    before = out.read_bytes()
    assert make_report.main(["--runs", str(run), "--count", "2"]).read_bytes() == before
    evaluate.main(["--run", str(run), "--evaluation.split", "val"])
    assert ComparedRuns([RunEncoder(run)]).split == "val"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--queries", "0"], "--queries 0 is no pair of the test split"),
        (["--top", "0"], "--top and --count"),
        (["--out", "report.pdf"], "must end in .html"),
    ],
)
def test_a_wrong_call_ends_in_one_line(runs: tuple[Path, Path], words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_report.main(["--runs", str(runs[0]), *words])


@pytest.mark.slow
def test_runs_of_different_pairs_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(runs[1].parents[1], work)
    other = work / "runs" / runs[1].name
    table = pq.read_table(work / "pairs.parquet")
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"other": b""}), work / "pairs.parquet")
    (work / "prepare_dataset.json").unlink()  # as if it were another dataset, and not a damaged one
    inputs = read_json(other / "inputs.json")
    inputs["pairs.parquet"] = fingerprint(work / "pairs.parquet")
    write_json(other / "inputs.json", inputs)
    out = tmp_path / "report.html"
    done = run_script("make_report.py", "--runs", runs[0], other, "--out", out, ok=False)
    assert "were trained on different pairs.parquet" in one_line_error(done)
    assert not out.exists()
