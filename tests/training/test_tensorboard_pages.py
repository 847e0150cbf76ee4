"""What TensorBoard is given beside curves, read with its own reader and asked of a running TensorBoard."""

import functools
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, run_script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

import evaluate
import metrics
import train_cross_modal_retrieval_model as training
from datasets import Prepared
from pipeline.pairs import Images
from pipeline.schema import Evaluation, Settings
from training import tensorboard_pages as pages
from training.described_scalars import Board
from training.runs import Weights

WEIGHTS = ("1", "0.3", "0.2")


def unit(*shape: int, seed: int) -> torch.Tensor:
    drawn = torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    return torch.nn.functional.normalize(drawn, dim=-1)


def made_up(image_ids: list[int], folder: Path) -> tuple[Prepared, Settings]:
    """Pairs of these images with random Doc2Vec vectors; the images are plain squares."""
    settings = Settings(work=str(folder))
    (folder / "doc2vec").mkdir(parents=True)
    np.save(folder / "doc2vec" / "vectors.npy", np.random.default_rng(5).normal(size=(len(image_ids), 4)))
    for number in sorted(set(image_ids)):
        Image.new("RGB", (90, 60), "blue").save(folder / f"{number}.png")
    data = Prepared(
        images=Images([f"{number}.png" for number in sorted(set(image_ids))], np.array(image_ids), folder),
        image_ids=np.array(image_ids),
        categories=np.full(len(image_ids), -1),
        category_names=[],
        tokens=np.zeros(0, dtype=np.int32),
        offsets=np.zeros(len(image_ids) + 1, dtype=np.int64),
        rows={},
        unused={},
    )
    return data, settings


# What is computed


@pytest.mark.parametrize("shape", [(8,), (2, 8)])
def test_results_have_the_ranks_of_the_metrics(shape: tuple[int, ...], tmp_path: Path) -> None:
    ids = [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    data, _ = made_up(ids, tmp_path)
    rows = np.random.default_rng(0).permutation(len(ids))
    groups = data.image_ids[rows]
    x, y = unit(10, *shape, seed=1)[torch.from_numpy(groups)], unit(len(ids), *shape, seed=2)
    found = pages.results(groups, x.numpy(), y.numpy())
    for way, (queries, targets) in {"text_to_image": (y, x), "image_to_text": (x, y)}.items():
        closer = metrics.rank_pairs(queries, targets, groups).closer
        assert len(found[way]) == pages.QUERIES
        for query, shown in found[way].items():
            assert [one.rank for one in shown[: pages.RESULTS]] == [1, 2, 3, 4, 5]
            assert len({int(groups[one.position]) for one in shown}) == len(shown) or way == "image_to_text"
            (own, *_) = [one for one in shown if one.is_own]
            assert groups[own.position] == groups[query]
            best = min(closer[groups == groups[query]]) if way == "image_to_text" else closer[query]
            assert own.rank == best + 1
            scores = [one.score for one in shown]
            assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("shape", [(8,), (2, 8)])
def test_distances_are_those_of_every_pair(shape: tuple[int, ...], tmp_path: Path) -> None:
    ids = [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    data, _ = made_up(ids, tmp_path)
    rows = np.arange(len(ids))[::-1].copy()
    x, y = unit(10, *shape, seed=3).reshape(10, -1, 8), unit(10, *shape, seed=4).reshape(10, -1, 8)
    reference = np.load(tmp_path / "doc2vec" / "vectors.npy")[rows]
    x_shaped, y_shaped = x.reshape(10, *shape).numpy(), y.reshape(10, *shape).numpy()
    found = pages.distances(data.image_ids[rows], x_shaped, y_shaped, reference)

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return min(float(torch.dist(one, other)) for one in a for other in b)

    np.testing.assert_allclose(found["pairs"], [apart(a, b) for a, b in zip(x, y, strict=True)], atol=1e-5)
    assert len(found["unrelated_pairs"]) == 9  # not that of the two pairs of one image
    distance = np.linalg.norm(reference[:, None] - reference, axis=2)
    distance[data.image_ids[rows][:, None] == data.image_ids[rows]] = np.inf
    nearest = distance.argmin(axis=1)  # 1 % of ten pairs: one
    for name, vectors in (("neighbor_images", x), ("neighbor_texts", y)):
        expected = [apart(vectors[row], vectors[near]) for row, near in enumerate(nearest)]
        np.testing.assert_allclose(found[name], expected, atol=1e-5)


def rendered(figure: Figure) -> np.ndarray:
    """Pixels (H, W, 3), the first row at the bottom, as matplotlib counts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_panel_frames_the_true_image_in_green(tmp_path: Path) -> None:
    data, _ = made_up([0, 1, 2], tmp_path)
    rows, texts = np.array([2, 0, 1]), {0: "first", 1: "a $5 and 边境墙 second", 2: "third"}
    found = {
        0: [pages.Result(1, 1, 0.5, False), pages.Result(2, 0, 0.4, True)],
        1: [pages.Result(1, 1, 0.9, True), pages.Result(2, 2, 0.1, False)],
    }
    (tmp_path / "2.png").write_bytes(b"no image any more")
    pictures = functools.partial(pages.square_thumbnail, data, max_pixels=10**6)
    figure = pages.image_panel(rows, found, texts, pictures)
    pixels = rendered(figure)
    for band, shown in zip(figure.subfigs, found.values(), strict=True):
        for cell, one in zip(band.axes, shown, strict=False):
            box = cell.get_window_extent()
            frame, middle = (pixels[int(y), int(box.x0 + box.width / 2)] for y in (box.y0, box.y0 + box.height / 2))
            assert (tuple(frame) == (0x1A, 0x98, 0x50)) == one.is_own
            assert tuple(middle) == ((0xC8, 0xCC, 0xD2) if rows[one.position] == 2 else (0, 0, 255))
            assert cell.get_xlabel() == f"{one.rank}. {rows[one.position]}: {one.score:.3f}"
        assert all(not cell.axison for cell in band.axes[len(shown) :])


def test_a_panel_writes_the_true_text_in_green(tmp_path: Path) -> None:
    data, _ = made_up([0, 1], tmp_path)
    found = {0: [pages.Result(1, 1, 0.5, False), pages.Result(2, 0, 0.4, True)]}
    pictures = functools.partial(pages.square_thumbnail, data, max_pixels=10**6)
    figure = pages.text_panel(np.array([0, 1]), found, {0: "costs $5 or $6", 1: "wide " * 99}, pictures)
    assert rendered(figure).shape[2] == 3
    other, own = figure.axes[1].texts
    assert own.get_text() == "2. 0.400  costs $5 or $6"
    assert (own.get_color(), other.get_color()) == (pages.OWN_COLOUR, pages.TEXT_COLOUR)


def test_without_matplotlib_panels_are_left_out_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data, settings = made_up([0, 1, 2], tmp_path)
    table = pa.table({"text": ["first", "second", "third"], "image_path": ["0.png", "1.png", "2.png"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    given = {"data": data, "work": settings.work_folder, "every": 5, "max_pixels": settings.dataset.max_pixels}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pages._has_matplotlib.cache_clear()
    try:
        with SummaryWriter(str(tmp_path / "run")) as board:
            for epoch in (5, 10):
                x, y = unit(3, 8, seed=1), unit(3, 8, seed=2)
                pages.show_validation(board, np.arange(3), x, y, **given, epoch=epoch, step=epoch)
    finally:
        pages._has_matplotlib.cache_clear()
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert not events.Tags()["images"]
    assert len(events.Tensors("results/image_to_text/text_summary")) == 2


def test_texts_cannot_break_out_of_the_table() -> None:
    found = {0: [pages.Result(1, 0, 0.5, True), pages.Result(2, 1, 0.25, False)]}
    table = pages.as_markdown(np.array([7, 9]), found, {0: "a | <b>b</b> *c*", 1: "边境墙"})
    first, second = table.splitlines()[2:]
    assert first == "| 7 | 1 | 0.500 | **a &#124; &lt;b&gt;b&lt;/b&gt; &#42;c&#42;** |"
    assert second == "| 7 | 2 | 0.250 | 边境墙 |"


def test_hparams_are_written_once(tmp_path: Path) -> None:
    for loss in (3.0, 2.0):
        pages.write_hparams(tmp_path, Weights(1, 0.3, 0.2), Settings(), Settings(), {"val_loss": loss}, step=12)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("hparam/val_loss")] == [(12, 2.0)]
    assert set(events.PluginTagToContent("hparams")) == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }


def test_the_first_columns_of_hparams_are_what_differs(tmp_path: Path) -> None:
    settings = Settings(seed=3)
    settings.training.batch_size = 8
    pages.write_hparams(tmp_path, Weights(1, 0.3, 0.2), settings, Settings(), {"val_loss": 1.0}, step=12)
    events = EventAccumulator(str(tmp_path)).Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    columns = list(HParamsPluginData.FromString(content).session_start_info.hparams)
    experiment = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/experiment"]).experiment
    names = [info.name for info in experiment.hparam_infos] or columns
    assert set(names[:5]) == {"weights.sym", "weights.img", "weights.text", "seed", "training.batch_size"}


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("data/l_img", "Eq. 7"),
        ("val/7way_recall_at_1_text_to_image", "7-way Recall@1, text to image, of the val split; higher is better"),
        ("test/median_rank_image_to_text", "median rank, image to text, of the test split; lower is better"),
    ],
)
def test_a_scalar_says_what_it_is(tmp_path: Path, tag: str, words: str) -> None:
    split = tag.partition("/")[0]
    with Board(tmp_path, metrics.registered(Evaluation(kway=[7])).values(), split) as board:
        board.add_scalar(tag, 0.5, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars(tag)] == [(7, 0.5)]
    assert words in events.SummaryMetadata(tag).summary_description


# A run


@pytest.fixture(scope="module")
def run(prepared_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The method trained with panels after every epoch, and evaluated; not to be changed."""
    work = tmp_path_factory.mktemp("boards") / "work"
    shutil.copytree(prepared_once, work, ignore=shutil.ignore_patterns("*.png"))
    words = [*WEIGHTS, *TINY, "--work", str(work), "--training.show_results_every", "1"]
    shown = run_script("train_cross_modal_retrieval_model.py", *words).stdout
    (folder,) = (work / "runs").iterdir()
    assert str(folder / "best.pt") in shown
    evaluate.main(["--run", str(folder), "--evaluation.projector_pairs", "9"])
    return folder


@pytest.mark.slow
def test_every_tag_is_there_once_an_epoch(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance=dict.fromkeys(("images", "histograms", "tensors"), 0)).Reload()
    tags = events.Tags()
    steps = [event.step for event in events.Scalars("data/val_loss")]
    assert len(steps) == 3
    for tag in ("results/text_to_image", "results/image_to_text"):
        assert [event.step for event in events.Images(tag)] == steps
    for name in ("pairs", "unrelated_pairs", "neighbor_images", "neighbor_texts"):
        assert [event.step for event in events.Histograms(f"distances/{name}")] == steps
    assert [event.step for event in events.Tensors("results/image_to_text/text_summary")] == steps
    for tag in ("hparam/val_loss", "hparam/val_recall_at_1", "hparam/best_epoch"):
        assert len(events.Scalars(tag)) == 1
    assert "test/5way_recall_at_1_image_to_text" in tags["scalars"]
    lines = next(run.glob("*/embeddings/metadata.tsv")).read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == ["label", "kind", "pair", "category", "text"]
    assert [line.split("\t")[1] for line in lines[1:]] == ["image"] * 9 + ["text"] * 9
    vectors = np.loadtxt(next(run.glob("*/embeddings/tensors.tsv")), delimiter="\t")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert Image.open(next(run.glob("*/embeddings/sprite.png"))).size == (5 * pages.PROJECTOR_IMAGE_SIDE,) * 2


@pytest.mark.slow
def test_weights_are_the_same_without_any_of_it(run: Path, prepared: Path) -> None:
    bare = training.main([*WEIGHTS, *TINY, "--work", str(prepared), "--training.show_results_every", "0"])
    for name in ("best.pt", "last.pt"):
        before, after = (torch.load(folder / name, weights_only=True)["model"] for folder in (run, bare))
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert not EventAccumulator(str(bare)).Reload().Tags()["images"]


@pytest.mark.slow
def test_the_projector_is_written_anew_or_left_out(run: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(run.parents[1], work)
    copy = work / "runs" / run.name
    evaluate.main(["--run", str(copy), "--evaluation.projector_pairs", "3"])
    assert len(next(copy.glob("*/embeddings/metadata.tsv")).read_text().splitlines()) == 7
    assert (copy / "projector_config.pbtxt").read_text().count("embeddings {") == 1
    evaluate.main(["--run", str(copy), "--name", "embeddings"])
    evaluate.main(["--run", str(copy), "--evaluation.projector_pairs", "0"])
    assert list(copy.glob("*/embeddings")) == [copy / "evaluations" / "embeddings"]
    assert not (copy / "projector_config.pbtxt").exists()


@pytest.mark.slow
def test_tensorboard_shows_every_page(run: Path) -> None:
    name = run.name
    flags = ["--port", "0", "--load_fast", "false", "--reload_task", "blocking", "--reload_interval", "0"]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.parent), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            (address,) = next(
                found for line in server.stderr if (found := re.findall(r"TensorBoard .* at (http://\S+)", line))
            )

            def ask(path: str, sent: dict | None = None) -> bytes:
                body = None if sent is None else json.dumps(sent).encode()
                asked = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    return answer.read()

            active = {plugin for plugin, listed in json.loads(ask("data/plugins_listing")).items() if listed["enabled"]}
            assert {"scalars", "images", "histograms", "text", "hparams"} <= active
            images = json.loads(ask("data/plugin/images/tags"))[name]
            assert {"results/text_to_image", "results/image_to_text"} <= set(images)
            assert "distances/pairs" in json.loads(ask("data/plugin/histograms/tags"))[name]
            experiment = json.loads(ask("data/plugin/hparams/experiment", {"experimentName": ""}))
            assert "weights.img" in {item["name"] for item in experiment["hparamInfos"]}
            assert name in json.loads(ask("data/plugin/projector/runs"))
            (embedding,) = json.loads(ask(f"data/plugin/projector/info?run={name}"))["embeddings"]
            assert embedding["tensorShape"] == [18, 16]
            sprite = ask(f"data/plugin/projector/sprite_image?run={name}&name={embedding['tensorName']}")
            assert sprite.startswith(b"\x89PNG")
        finally:
            server.terminate()
