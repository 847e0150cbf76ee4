"""The paper's tables: what stands in them, how they are filled and written, and that a stopped call goes on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, one_line_error, run_script
from scipy import stats

import reproduce_tables
from metrics import METRICS, Metric
from pipeline.command_line import make_parser, parse_settings, without
from pipeline.files import write_json
from pipeline.schema import Settings
from reporting import filled_tables, tables
from reporting.significance import holm
from reporting.tables import ANG, CONTROL, OURS, TABLES, TRIP, Method, Table
from reproduce_tables import Request, alike, evaluation_flags, is_measured, measured_runs, read_request
from training.runs import read_run

SMALL = Table(1, "Small", ((ANG, OURS), (TRIP,)), "toys", underlined=(ANG.name, TRIP.name))
COLUMNS = [Metric("a", "A", "texts", lambda pairs: 0.0, lambda pairs: 0.2)]
CHANCE = {"a_texts": 0.2}
VALUES = {
    ANG.name: {"a_texts": [0.5, 0.6, 0.7]},
    OURS.name: {"a_texts": [0.6, 0.65, 0.9]},
    TRIP.name: {"a_texts": [0.3, 0.4, 0.5]},
}


def rows(content: dict) -> dict[str, dict]:
    return {row["method"]: row["figures"]["a_texts"] for row in content["rows"]}


def test_means_deviations_and_paired_differences() -> None:
    filled = rows(filled_tables.fill(SMALL, COLUMNS, VALUES, "politics", CHANCE))
    assert np.isclose(filled[OURS.name]["mean"], np.mean([0.6, 0.65, 0.9]))
    assert np.isclose(filled[OURS.name]["sd"], np.std([0.6, 0.65, 0.9], ddof=1))
    interval = stats.ttest_rel([0.6, 0.65, 0.9], [0.5, 0.6, 0.7]).confidence_interval(0.95)
    difference = filled[OURS.name]["difference"]
    assert np.allclose([difference["low"], difference["high"]], interval)
    assert filled[ANG.name]["difference"] is None
    assert filled[TRIP.name]["difference"] is None


def test_the_best_of_a_group_is_bold_and_the_best_of_some_underlined() -> None:
    filled = rows(filled_tables.fill(SMALL, COLUMNS, VALUES, "politics", CHANCE))
    assert [name for name, cell in filled.items() if cell.get("bold")] == [OURS.name]
    assert [name for name, cell in filled.items() if cell.get("underline")] == [ANG.name]


def test_paper_values_stand_beside_its_own_datasets_only() -> None:
    assert filled_tables.fill(SMALL, COLUMNS, VALUES, "politics", CHANCE)["rows"][0]["paper"] == (0.6270, 0.6216)
    assert filled_tables.fill(SMALL, COLUMNS, VALUES, "openclipart", CHANCE)["rows"][0]["paper"] is None


def test_markdown_says_what_the_numbers_say() -> None:
    text = filled_tables.to_markdown(filled_tables.fill(SMALL, COLUMNS, VALUES, "politics", CHANCE), "heading")
    assert "|  | A texts | paper |" in text
    assert f"| {OURS.name} | **0.7167** ± 0.1607 | 0.6467 0.6492 |" in text
    assert f"| {ANG.name} | <u>0.6000</u> ± 0.1000 |" in text
    assert "| chance | 0.2000 |  |" in text
    low, high = stats.ttest_rel([0.6, 0.65, 0.9], [0.5, 0.6, 0.7]).confidence_interval(0.95)
    assert f"| {OURS.name} against {ANG.name} | +0.1167 [{low:+.4f}, {high:+.4f}], κ +0.146 |" in text
    assert "95 % intervals over seeds (paired t)." in text


def test_differences_have_intervals_over_seeds_and_images_too() -> None:
    resampled = {"a_texts": {OURS.name: np.linspace(0, 1, 1001), ANG.name: np.full(1001, 0.25)}}
    content = filled_tables.fill(SMALL, COLUMNS, VALUES, "politics", CHANCE, resampled | {"b": {}})
    difference = rows(content)[OURS.name]["difference"]
    assert difference["seeds_and_images"] == pytest.approx({"low": 0.025 - 0.25, "high": 0.975 - 0.25})
    interval = stats.ttest_rel([0.6, 0.65, 0.9], [0.5, 0.6, 0.7]).confidence_interval(0.95)
    assert [difference["low"], difference["high"]] == pytest.approx(list(interval))
    text = filled_tables.to_markdown(content, "")
    assert "over seeds and test images (hierarchical bootstrap)" in text
    assert "| +0.1167 [-0.2250, +0.7250], κ +0.146 |" in text


def test_p_values_are_adjusted_for_all_differences_of_a_table() -> None:
    values = {
        ANG.name: {"a_texts": [0.5, 0.6, 0.7], "b_texts": [0.1, 0.2, 0.3]},
        OURS.name: {"a_texts": [0.6, 0.701, 0.799], "b_texts": [0.3, 0.3, 0.1]},
        TRIP.name: {"a_texts": [0.3, 0.4, 0.5], "b_texts": [0.0, 0.0, 0.1]},
    }
    columns = [*COLUMNS, dataclasses.replace(COLUMNS[0], key="b", label="B")]
    table = dataclasses.replace(SMALL, contrasts=((OURS, TRIP),))
    content = filled_tables.fill(table, columns, values, "x", {"a_texts": 0.2, "b_texts": 0.0})
    assert content["comparisons"] == 4
    found = [
        *(row["figures"][name]["difference"] for name in ("a_texts", "b_texts") for row in content["rows"]),
        *content["contrasts"][0]["figures"].values(),
    ]
    found = sorted((each for each in found if each), key=lambda each: each["p"])
    assert [each["p_holm"] for each in found] == pytest.approx(holm([each["p"] for each in found]))
    assert found[0]["p"] == pytest.approx(
        stats.ttest_rel(*(values[m]["a_texts"] for m in (OURS.name, TRIP.name))).pvalue
    )
    text = filled_tables.to_markdown(content, "")
    assert f"| {OURS.name} against {ANG.name} | +0.1000 [+0.0975, +0.1025]\\*, κ +0.125 | +0.0333 [" in text
    assert "for all differences of the table, 4." in text
    spread = {"a_texts": {name: np.linspace(-1, 1, 9) * (name == OURS.name) for name in values}}
    marked = filled_tables.to_markdown(
        filled_tables.fill(table, columns, values, "x", {"a_texts": 0.2, "b_texts": 0.0}, spread), ""
    )
    assert "]\\*" not in marked  # the chance of test images alone may have made it


def test_titles_of_columns_are_short() -> None:
    titles = [filled_tables.short_title(metric) for metric in TABLES[8].columns(Settings().evaluation)]
    assert titles == ["5-way I→T", "5-way T→I", "20-way I→T", "20-way T→I", "R@1 I→T", "R@1 T→I"]


def test_the_best_is_the_lowest_where_lower_is_better() -> None:
    columns = [dataclasses.replace(COLUMNS[0], higher_is_better=False)]
    filled = rows(filled_tables.fill(SMALL, columns, VALUES, "politics", CHANCE))
    assert [name for name, cell in filled.items() if cell.get("bold")] == [ANG.name]
    assert [name for name, cell in filled.items() if cell.get("underline")] == [TRIP.name]


def test_columns_are_registered_metrics_and_stand_side_by_side() -> None:
    assert {table.family for table in TABLES.values() if isinstance(table.family, str)} <= METRICS.keys()
    evaluation = Settings().evaluation
    names = {number: [metric.name for metric in table.columns(evaluation)] for number, table in TABLES.items()}
    ways, modalities = ("image_to_text", "text_to_image"), ("images", "texts")
    assert names[1] == [f"{k}way_recall_at_1_{way}" for k in (5, 20) for way in ways]
    assert names[3] == [f"preservation_{k}_{modality}" for k in ("200", "1_percent") for modality in modalities]
    assert names[5] == [f"map_{way}" for way in ways]
    assert names[8] == [
        f"{key}_{way}" for key in ("5way_recall_at_1", "20way_recall_at_1", "recall_at_1") for way in ways
    ]


def test_contrasts_are_paired_differences_too() -> None:
    table = dataclasses.replace(SMALL, contrasts=((OURS, TRIP), (OURS, CONTROL)))
    (contrast,) = filled_tables.fill(table, COLUMNS, VALUES, "politics", CHANCE)["contrasts"]  # CONTROL has no values
    interval = stats.ttest_rel([0.6, 0.65, 0.9], [0.3, 0.4, 0.5]).confidence_interval(0.95)
    assert np.allclose([contrast["figures"]["a_texts"]["low"], contrast["figures"]["a_texts"]["high"]], interval)
    text = filled_tables.to_markdown(filled_tables.fill(table, COLUMNS, VALUES, "politics", CHANCE), "")
    assert f"| {OURS.name} against {TRIP.name} | +0.3167 [" in text


def test_groups_are_set_apart_and_absent_ones_leave_no_gap() -> None:
    blank = "| | |"
    both = filled_tables.to_markdown(filled_tables.fill(SMALL, COLUMNS, VALUES, "openclipart", CHANCE), "")
    assert both.count(f"\n{blank}\n") == 1
    second = filled_tables.to_markdown(
        filled_tables.fill(SMALL, COLUMNS, {TRIP.name: VALUES[TRIP.name]}, "openclipart", CHANCE), ""
    )
    assert blank not in second


def test_a_note_stands_below_the_rows() -> None:
    noted = Table(9, "Own", SMALL.groups, "toys", note="† says so")
    assert "\n\n† says so\n" in filled_tables.to_markdown(
        filled_tables.fill(noted, COLUMNS, VALUES, "openclipart", CHANCE), ""
    )
    assert "†" not in filled_tables.to_markdown(filled_tables.fill(SMALL, COLUMNS, VALUES, "openclipart", CHANCE), "")


def test_one_seed_has_neither_deviation_nor_interval() -> None:
    values = {name: {"a_texts": figures["a_texts"][:1]} for name, figures in VALUES.items()}
    content = filled_tables.fill(SMALL, COLUMNS, values, "openclipart", CHANCE)
    assert rows(content)[OURS.name]["sd"] is None
    assert rows(content)[OURS.name]["difference"] is None
    assert "±" not in filled_tables.to_markdown(content, "")


@pytest.mark.parametrize("number", sorted(TABLES))
def test_paper_values_are_those_of_rows_that_are_there(number: int) -> None:
    here = {method.name for group in TABLES[number].groups for method in group}
    for rows_of_paper in tables.PAPER.get(number, {}).values():
        assert set(rows_of_paper) <= here


def test_methods_have_names_of_their_own() -> None:
    methods: dict[str, Method] = {}
    for table in TABLES.values():
        for group in table.groups:
            for method in group:
                assert methods.setdefault(method.name, method) == method


def test_the_command_of_a_table_names_no_place_of_data() -> None:
    places = ["--dataset.root", "/there/images", "--dataset.manifest", "/there/pairs.csv", "--features", "/elsewhere"]
    request = read_request([*TINY, *places, "--tables", "3"])
    assert request.command == f"python reproduce_tables.py {' '.join([*TINY, '--tables', '3'])}"


def test_flags_are_taken_out_with_their_values() -> None:
    argv = ["--config", "c", "--seeds", "3", "--tables", "1", "3", "--out=x", "--seed", "4", "--loss.margin", "1"]
    kept = without(argv, ["--seeds", "--tables", "--out", "--seed", "--work"])
    assert kept == ["--config", "c", "--loss.margin", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--tables", "99"], "no table 99"),
        (["--loss.foo", "1"], "loss.foo"),
    ],
)
def test_wrong_calls_end_in_one_line(words: list[str], message: str) -> None:
    assert message in one_line_error(run_script("reproduce_tables.py", *TINY, *words, ok=False))


def test_evaluation_settings_survive_as_flags() -> None:
    words = ["--evaluation.kway", "[3]", "--evaluation.split", "val", "--evaluation.bootstrap", "7"]
    settings = parse_settings(make_parser(""), [*TINY, *words])[0]
    again = parse_settings(make_parser(""), evaluation_flags(settings.evaluation), base=Settings())[0]
    assert again.evaluation == settings.evaluation


def test_methods_that_share_a_table_of_neighbors_are_prepared_together() -> None:
    other_table = Method("Cosine", (1, 1, 1), {"neighbors.distance": "cosine"})
    other_space = Method("Images", (1, 1, 1), {"neighbors.space": "images", "loss.base": "triplet"})
    both = Method("Both", (1, 1, 1), {"neighbors.space": "images", "neighbors.distance": "cosine"})
    assert alike([ANG, other_table, OURS, other_space, both]) == [[ANG, OURS, other_space], [other_table, both]]


def test_each_seed_takes_the_evaluation_that_is_best_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = ({}, {"evaluation.expand": "0.5"}, {"evaluation.expand": "1", "evaluation.expand_neighbors": "3"})
    expanded = Method("expanded", (1, 0, 0), evaluations=evaluations)
    request = read_request([*TINY, "--work", str(tmp_path / "work"), "--tables", "1"])
    best_of_seed = {"run-0": "split=val", "run-1": "expand=1-expand_neighbors=3-split=val"}
    asked: list[str] = []

    def evaluate_all(request: Request, function: object, items: list[list[str]], unit: str) -> list[None]:
        for command in items:
            run, name = Path(command[1]), command[-1] if command[-2] == "--name" else ""
            asked.append(name)
            folder = run / "evaluations" / name if name else run
            folder.mkdir(parents=True, exist_ok=True)
            value = 0.9 if best_of_seed[run.name] == name else 0.1
            shown = {"2way_recall_at_1_image_to_text": {"value": value}, "2way_recall_at_1_text_to_image": {"value": 0}}
            write_json(folder / "metrics.json", {"figures": shown | {"5way_recall_at_1_text_to_image": {"value": 1}}})
        return []

    monkeypatch.setattr(reproduce_tables, "at_once", evaluate_all)
    runs = {(name, seed): tmp_path / f"run-{seed}" for seed in range(2) for name in (ANG.name, "expanded")}
    assert measured_runs(request, [ANG, expanded], runs) == {
        (ANG.name, 0): tmp_path / "run-0",
        ("expanded", 0): tmp_path / "run-0",
        (ANG.name, 1): tmp_path / "run-1",
        ("expanded", 1): tmp_path / "run-1" / "evaluations" / "expand=1-expand_neighbors=3",
    }
    on_val = ["split=val", "expand=0.5-split=val", "expand=1-expand_neighbors=3-split=val"]
    assert asked[:6] == on_val * 2
    assert asked[6:] == ["", "", "expand=1-expand_neighbors=3"]  # the same run only once


def test_a_figure_that_a_run_lacks_is_no_column() -> None:
    figures = {"one": [{"a": {}, "b": {}}, {"a": {}}], "two": [{"a": {}, "b": {}}], "three": [{}]}
    assert is_measured("a", ["one", "two"], figures)
    assert is_measured("b", ["two"], figures)
    assert not is_measured("b", ["one", "two"], figures)
    assert not is_measured("a", ["one", "three"], figures)


@pytest.mark.slow
def test_what_is_measured_can_change_between_calls(tmp_path: Path) -> None:
    words = [*TINY, "--seeds", "1", "--training.max_epochs", "1", "--work", tmp_path / "work", "--out", tmp_path]
    words += ["--tables", "3", "--methods", "OURS"]
    assert "| neighbors kept of nearest 3 images |" in run_script("reproduce_tables.py", *words).stdout
    shown = run_script("reproduce_tables.py", *words, "--evaluation.preservation_k", "16").stdout
    assert "table 3: preservation_16_texts is left out" in shown
    only = "neighbors kept of nearest 1 % images | neighbors kept of nearest 1 % texts"
    assert f"| | {only} |" in shown.replace("|  |", "| |")
    shown = run_script("reproduce_tables.py", *words, "--evaluation.preservation_k", "2").stdout
    assert "| neighbors kept of nearest 2 images |" in shown


@pytest.mark.slow
def test_a_call_that_was_stopped_goes_on_in_two_processes_and_ends_with_the_same_tables(tmp_path: Path) -> None:
    words = [*TINY, "--seeds", "2", "--tables", "4", "--training.max_epochs", "1"]
    one, two = ([*words, "--work", tmp_path / name / "work", "--out", tmp_path / name] for name in ("one", "two"))
    run_script("reproduce_tables.py", *one)
    # Stopped in the middle: one seed done, and one run of the other cut short.
    stopped = [*words[:-5], "1", *words[-4:], "--work", tmp_path / "two" / "work", "--out", tmp_path / "two"]
    run_script("reproduce_tables.py", *stopped)
    (cut, *_) = sorted((tmp_path / "two").glob("work-seed=0/runs/*"))
    (cut / "run.json").unlink()
    (cut / "evaluate.json").unlink()
    run_script("reproduce_tables.py", *two, "--jobs", "2")
    tables_of = [json.loads((tmp_path / name / "table4.json").read_text()) for name in ("one", "two")]
    assert tables_of[0]["rows"] == tables_of[1]["rows"]
    made = tables_of[0]
    assert made["seeds"] == [0, 1] and f"--work {tmp_path / 'one' / 'work'} --out {tmp_path / 'one'}" in made["command"]
    assert made["versions"]["torch"] and made["processor"] and made["threads"] == 1 and made["date"]
    assert made["rows"][1]["figures"]["2way_recall_at_1_image_to_text"]["difference"]["seeds_and_images"]
    assert (ROOT / "reproduce_tables.py").exists()


def test_a_row_takes_the_settings_of_the_best_trial_on_validation_and_the_table_states_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_all = {"training.max_epochs": "1"}
    kind = Method(
        "kind", (1, 0, 0), of_all, tables.grid("loss.temperature", ("0.05", "5"), {"loss.base": "infonce"})[2:6]
    )
    expand = tuple({"evaluation.expand": weight} for weight in ("0.5", "1"))
    row = Method("row", (1, 0.3, 0.2), of_all, trials=kind)
    rows = (row, dataclasses.replace(row, name="expanded", evaluations=expand))
    monkeypatch.setitem(TABLES, 9, Table(9, "Trials", (rows,), tables.RETRIEVAL))
    words = [*TINY, "--seeds", "1", "--tables", "9", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    reproduce_tables.main(words)
    trials = [path.parent for path in tmp_path.glob("work-seed=1000/runs/*/run.json")]
    assert len(trials) == 4
    best = max(trials, key=lambda run: json.loads((run / "run.json").read_text())["val_recall_at_1"])
    (run,) = (tmp_path / "work-seed=0" / "runs").iterdir()
    loss, training = read_run(best)[0].loss, read_run(best)[0].training
    assert (read_run(run)[0].loss, read_run(run)[0].training) == (loss, training)
    stated = (
        f"`loss.base infonce`, `loss.temperature {loss.temperature}`, `training.learning_rate {training.learning_rate}`"
    )
    assert f"kind, best of 4 trials on seed 1000: {stated}" in (tmp_path / "table9.md").read_text().splitlines()
