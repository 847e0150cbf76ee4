"""The siamese network, its step, and step 4 with its labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, one_line_error, run_script
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

import evaluate
import train_cross_modal_retrieval_model as step_4
import train_siamese_labels
from datasets import load_prepared
from models import build_model
from pipeline.command_line import make_parser, parse_settings
from pipeline.schema import Settings
from pipeline.settings import checked_tree, load_settings, mistakes, replaced, validated
from training.embedding import embed_texts
from training.fine_grained import Relevance, likeness, train_relevance
from training.image_sources import image_source
from training.runs import Weights
from training.siamese import (
    SiameseNetwork,
    balanced_accuracy,
    balanced_loss,
    best_threshold,
    build_network,
    cosines,
    held_out,
    measure,
)
from training.trainer import Trainer, build_trainer

LABELS, TRAIN = "train_siamese_labels.py", "train_cross_modal_retrieval_model.py"
FINE = ["--loss.base", "fine_grained"]
SMALL = ["--siamese.dimensions", "8", "--siamese.max_epochs", "2", "--siamese.batch_size", "32"]
WORDS = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
TOKENS = torch.tensor([[1, 4, 5, 2, 0], [1, 6, 2, 0, 0], [1, 7, 8, 9, 2]])
LENGTHS = torch.tensor([4, 3, 5])


def network(encoder: str = "graph") -> SiameseNetwork:
    settings = load_settings({"siamese": {"encoder": encoder, "dimensions": 6}})
    return build_network(settings.siamese, settings.model.text, WORDS, settings.seed).eval()


def likeness_of(siamese: SiameseNetwork, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    return likeness(siamese.encoder(*a), siamese.encoder(*b), siamese.comparison).sigmoid()


# The network


@pytest.mark.parametrize("encoder", ["graph", "bag_of_words", "gru"])
def test_similarities_lie_between_0_and_1_and_do_not_depend_on_the_side(encoder: str) -> None:
    siamese = network(encoder)
    torch.nn.init.normal_(siamese.comparison)
    a, b = (TOKENS, LENGTHS), (TOKENS[:2], LENGTHS[:2])
    similarities = likeness_of(siamese, a, b)
    assert similarities.shape == (3, 2)
    assert ((similarities > 0) & (similarities < 1)).all()
    torch.testing.assert_close(likeness_of(siamese, b, a), similarities.T)
    torch.testing.assert_close(siamese.encoder(*a).norm(dim=1), torch.ones(3))


def test_both_sides_share_their_weights() -> None:
    siamese = network()
    embeddings = siamese.encoder(TOKENS, LENGTHS)
    expected = torch.sigmoid((embeddings[0] * embeddings[2] * siamese.comparison[:-1]).sum() + siamese.comparison[-1])
    torch.testing.assert_close(
        likeness_of(siamese, (TOKENS[:1], LENGTHS[:1]), (TOKENS[2:], LENGTHS[2:]))[0, 0], expected
    )
    assert {name.split(".")[0] for name in siamese.state_dict()} == {"encoder", "comparison"}


def test_it_starts_as_a_multiple_of_the_cosine() -> None:
    siamese = network()
    embeddings = siamese.encoder(TOKENS, LENGTHS)
    expected = torch.sigmoid(10 * embeddings @ embeddings.T - 5)
    torch.testing.assert_close(likeness_of(siamese, (TOKENS, LENGTHS), (TOKENS, LENGTHS)), expected)


# Loss and accuracy of pairs


def masks(seed: int, n: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, (n, n))
    return rng.normal(size=(n, n)).round(1), kind == 0, kind == 1


def test_alike_and_unlike_pairs_are_half_of_the_loss_each() -> None:
    scores, alike, unlike = masks(0)
    logits = torch.from_numpy(scores).requires_grad_()

    def entropy(truth: float, pairs: np.ndarray) -> float:
        found = 1 / (1 + np.exp(-scores[pairs]))
        return -np.mean(np.log(found if truth else 1 - found))

    loss = balanced_loss(logits, torch.from_numpy(alike), torch.from_numpy(unlike))
    assert loss.item() == pytest.approx((entropy(1, alike) + entropy(0, unlike)) / 2)
    only = balanced_loss(logits, torch.from_numpy(alike), torch.zeros(12, 12, dtype=torch.bool))
    assert only.item() == pytest.approx(entropy(1, alike) / 2)
    assert torch.autograd.gradcheck(
        lambda x: balanced_loss(x, torch.from_numpy(alike), torch.from_numpy(unlike)), logits
    )


def test_accuracy_is_scikit_learns_balanced_accuracy() -> None:
    scores, alike, unlike = masks(1)
    judged = alike | unlike
    for threshold in (-0.5, 0.0, 0.3):
        expected = balanced_accuracy_score(alike[judged], scores[judged] > threshold)
        assert balanced_accuracy(scores, alike, unlike, threshold) == pytest.approx(expected)
    assert balanced_accuracy(np.ones_like(scores), alike, unlike, 0.0) == 0.5
    assert np.isnan(balanced_accuracy(scores, alike & False, unlike, 0.0))


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_is_better_than_the_best(seed: int) -> None:
    scores, alike, unlike = masks(seed)
    best = balanced_accuracy(scores, alike, unlike, best_threshold(scores, alike, unlike))
    every = [balanced_accuracy(scores, alike, unlike, threshold) for threshold in np.unique(scores)]
    assert best == max(every)


def test_cosines_are_scikit_learns() -> None:
    from sklearn.metrics.pairwise import cosine_similarity

    np.testing.assert_allclose(cosines(WORDS), cosine_similarity(WORDS), atol=1e-6)


# Against a prepared dataset


def settings_of(work: Path, *words: str) -> Settings:
    return parse_settings(make_parser(""), [*TINY, "--work", str(work), *SMALL, *words])[0]


def labels_of(work: Path, *words: str) -> dict:
    """Run the step, in this process, and return its figures."""
    train_siamese_labels.main([*TINY, "--work", str(work), *SMALL, *words])
    return json.loads((work / "siamese" / "train_siamese_labels.json").read_text())["figures"]


@pytest.mark.slow
def test_held_out_pairs_are_those_of_the_split(prepared: Path) -> None:
    settings = settings_of(prepared)
    data = load_prepared(settings.work_folder, settings.model.text.max_words)
    vectors = np.load(prepared / "doc2vec" / "vectors.npy")
    by_category = train_relevance(settings.work_folder, settings.siamese.relevance, settings.neighbors.space, data)
    pairs = held_out("test", data, by_category, vectors, settings)
    assert np.array_equal(pairs.rows, data.rows["test"])
    same = np.equal.outer(data.categories[pairs.rows], data.categories[pairs.rows])
    same_image = np.equal.outer(data.image_ids[pairs.rows], data.image_ids[pairs.rows])
    assert np.array_equal(pairs.alike, same & ~same_image)
    assert np.array_equal(pairs.unlike, ~same)

    few = replaced(settings, {"siamese.held_out_texts": 5})
    assert len(held_out("test", data, by_category, vectors, few).rows) == 5

    # 16 test texts of 128 train texts' 40 neighbors: their 5 nearest among themselves.
    settings = settings_of(prepared, "--siamese.relevance", "neighbors", "--neighbors.k", "40")
    table = Relevance(data.image_ids, data.categories, data.rows["train"], np.full((len(data.rows["train"]), 1), -1))
    pairs = held_out("test", data, table, vectors, settings)
    k = round(40 * len(pairs.rows) / len(data.rows["train"]))
    expected = np.zeros_like(pairs.alike)
    for i, row in enumerate(pairs.rows):
        distances = np.linalg.norm(vectors[pairs.rows].astype(float) - vectors[row], axis=1)
        distances[data.image_ids[pairs.rows] == data.image_ids[row]] = np.inf
        for j in np.argsort(distances)[:k]:
            expected[i, j] = expected[j, i] = True
    assert np.array_equal(pairs.alike, expected)


@pytest.mark.slow
@pytest.mark.parametrize("relevance", ["category", "neighbors"])
def test_the_step_leaves_vectors_that_compare_as_the_network_does(prepared: Path, relevance: str) -> None:
    figures = labels_of(prepared, "--siamese.relevance", relevance)
    settings = settings_of(prepared, "--siamese.relevance", relevance)
    data = load_prepared(settings.work_folder, settings.model.text.max_words)
    vectors = np.load(prepared / "siamese" / "vectors.npy")
    comparison = np.load(prepared / "siamese" / "comparison.npy")
    assert vectors.shape == (len(data.image_ids), 8) and vectors.dtype == np.float32
    known = np.diff(data.offsets) > 0
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), known, atol=1e-5)

    test = held_out(
        "test",
        data,
        train_relevance(settings.work_folder, settings.siamese.relevance, settings.neighbors.space, data),
        np.load(prepared / "doc2vec" / "vectors.npy"),
        settings,
    )
    of_test = torch.from_numpy(vectors[test.rows])
    logits = likeness(of_test, of_test, torch.from_numpy(comparison)).numpy()
    expected = measure(logits, 0.0, test, data.categories, data.category_names)
    assert figures["test"]["siamese"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert figures["test"]["siamese"]["accuracy_by_category"] == pytest.approx(expected["accuracy_by_category"])
    assert figures["test"]["texts"] == len(test.rows)
    assert figures["test"]["alike_pairs"] == test.alike[np.triu_indices(len(test.rows))].sum()


@pytest.mark.slow
def test_it_learns_what_words_a_category_has(prepared: Path) -> None:
    figures = labels_of(prepared, "--siamese.max_epochs", "20", "--siamese.learning_rate", "0.01")
    assert figures["test"]["siamese"]["accuracy"] > 0.8
    assert figures["test"]["chance"] == 0.5
    assert figures["best_epoch"] <= figures["epochs"] <= 20


@pytest.mark.slow
def test_the_same_command_gives_the_same_files_and_nothing_is_done_twice(prepared: Path) -> None:
    labels_of(prepared)
    files = [prepared / "siamese" / name for name in ("vectors.npy", "comparison.npy")]
    before = [path.read_bytes() for path in files]
    again = run_script(LABELS, *TINY, "--work", prepared, *SMALL).stdout
    *told, last = again.splitlines()
    assert told == [f"up to date {path}" for path in files] and last.startswith("next: python train_cross_modal")
    (prepared / "siamese" / "train_siamese_labels.json").unlink()
    labels_of(prepared)
    assert [path.read_bytes() for path in files] == before
    changed = run_script(LABELS, *TINY, "--work", prepared, *SMALL, "--siamese.dropout", "0.1").stdout
    assert "was made with siamese.dropout" in changed
    assert "wrote" in changed


@pytest.mark.slow
def test_what_stands_in_the_way_is_told(prepared: Path) -> None:
    words = [*TINY, "--work", prepared, *SMALL]
    missing = one_line_error(run_script(TRAIN, "0", "0", "0", *words, *FINE, ok=False))
    assert LABELS in missing
    labels_of(prepared)
    stale = one_line_error(run_script(TRAIN, "0", "0", "0", *words, *FINE, "--siamese.dropout", "0", ok=False))
    assert LABELS in stale and "siamese.dropout" in stale
    assert "SYM" in one_line_error(run_script(TRAIN, "1", "0", "0", *words, *FINE, ok=False))
    images = ["--siamese.relevance", "neighbors", "--neighbors.space", "images"]
    assert "neighbors.space" in one_line_error(run_script(LABELS, *words, *images, ok=False))
    (prepared / "neighbors" / "doc2vec" / "indices.npy").unlink()
    lost = run_script(LABELS, *words, "--siamese.relevance", "neighbors", ok=False)
    assert "knn_document_features.py" in one_line_error(lost)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "encoder"), [("0 0 0", "gru"), ("0 0.3 0.2", "graph")])
def test_step_4_trains_with_the_labels(
    prepared: Path, weights: str, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels_of(prepared)
    words = [*TINY, "--work", prepared, *SMALL, *FINE, "--model.text.encoder", encoder]
    run = step_4.main([*weights.split(), *map(str, words)])
    evaluate.main(["--run", str(run)])
    inputs = json.loads((run / "inputs.json").read_text())
    assert "siamese/vectors.npy" in inputs
    assert ("neighbors/doc2vec/indices.npy" in inputs) == (weights != "0 0 0")
    figures = json.loads((run / "metrics.json").read_text())["figures"]
    assert figures["map_image_to_text"]["value"] > 0
    assert step_4.main([*weights.split(), *map(str, words)]) == run
    assert f"up to date {run / 'best.pt'}" in capsys.readouterr().out


def trainer(work: Path, weights: Weights, *words: str) -> Trainer:
    settings = settings_of(work, *FINE, *words)
    data, device = load_prepared(settings.work_folder, settings.model.text.max_words), torch.device("cpu")
    model = build_model(settings.model, np.load(work / "doc2vec" / "word_vectors.npy"), settings.seed).eval()
    return build_trainer(settings, weights, data, model, image_source(settings, data, device), device)


def terms_of(one: Trainer) -> tuple[list, list[dict[str, torch.Tensor]]]:
    from datasets import plan_epoch

    plan = plan_epoch(one.data.rows["train"], one.objective.neighbors, 32, flip=False, seed=0, epoch=1)
    batches = one.images.batches([one.image_request(batch) for batch in plan])
    return plan, [one.terms(batch, images) for batch, images in zip(plan, batches, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("relevance", ["category", "neighbors"])
def test_the_loss_of_a_batch_is_a_loop_over_images_and_texts(prepared: Path, relevance: str) -> None:
    words = ["--siamese.relevance", relevance, "--loss.label_strength", "3", "--loss.mean_weight", "2"]
    labels_of(prepared, *words[:2])
    one = trainer(prepared, Weights(0, 0, 0), *words)
    plan, found = terms_of(one)
    siamese, comparison = (np.load(prepared / "siamese" / f"{name}.npy") for name in ("vectors", "comparison"))
    data, batch = one.data, plan[0]
    texts = batch.rows
    if relevance == "neighbors":
        texts = np.concatenate([batch.rows, np.where(batch.neighbors >= 0, batch.neighbors, batch.rows)])
        table = np.load(prepared / "neighbors" / "doc2vec" / "indices.npy")
        lists = dict(zip(data.rows["train"].tolist(), map(set, table.tolist()), strict=True))
    with torch.no_grad():
        (pixels,) = one.images.batches([(data.images.of_pair[batch.rows], batch.flips)])
        x, y = one.model(pixels, *data.texts(texts))
    examples: dict[bool, list[list[float]]] = {True: [], False: []}  # similarity, hardness; own ones apart
    own: list[float] = []
    for i, image in enumerate(batch.rows):
        for j, text in enumerate(texts):
            similarity = float(x[i] @ y[j])
            if data.image_ids[image] == data.image_ids[text]:
                own.append(similarity)
                continue
            if relevance == "category":
                positive = data.categories[image] == data.categories[text]
            else:
                positive = text in lists[image] or image in lists[text]
            logit = (siamese[image] * siamese[text] * comparison[:-1]).sum() + comparison[-1]
            alike = 1 / (1 + np.exp(-logit))
            examples[bool(positive)].append([similarity, 1 - alike if positive else alike])
    mean = np.mean([hardness for _, hardness in examples[True]])
    examples[True] += [[similarity, mean] for similarity in own]
    means, variances = {}, {}
    for kind, listed in examples.items():
        similarity, hardness = np.array(listed).T
        weight = (1 + 3 * hardness) / (1 + 3 * hardness).sum()
        means[kind] = (weight * similarity).sum()
        variances[kind] = (weight * (similarity - means[kind]) ** 2).sum()
    expected = sum(variances.values()) + 2 * max(
        0, one.objective.pairwise.settings.mean_margin - (means[True] - means[False])
    )
    assert found[0].keys() == {"l_i2t"}
    assert found[0]["l_i2t"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_several_embeddings_an_instance_are_as_similar_as_their_closest(prepared: Path) -> None:
    one = trainer(prepared, Weights(0, 0, 0), "--loss.labels", "equal", "--model.pvse.embeddings", "2")
    plan, found = terms_of(one)
    rows = plan[0].rows
    with torch.no_grad():
        (images,) = one.images.batches([(one.data.images.of_pair[rows], plan[0].flips)])
        x, y = one.model(images, *one.data.texts(rows))
    similarities = np.array([[(a @ b.T).max().item() for b in y] for a in x])
    same = np.equal.outer(one.data.categories[rows], one.data.categories[rows])
    positives, negatives = similarities[same], similarities[~same]
    margin = one.objective.pairwise.settings.mean_margin
    expected = positives.var() + negatives.var() + max(0, margin - (positives.mean() - negatives.mean()))
    assert found[0]["l_i2t"].item() == pytest.approx(expected, rel=1e-4)
    assert found[0].keys() == {"l_i2t", "l_diversity", "l_mmd"}


@pytest.mark.slow
def test_equal_labels_need_no_siamese_network_and_are_strength_zero(prepared: Path) -> None:
    _, equal = terms_of(trainer(prepared, Weights(0, 0, 0), "--loss.labels", "equal"))
    labels_of(prepared)
    _, none = terms_of(trainer(prepared, Weights(0, 0, 0), "--loss.label_strength", "0"))
    _, some = terms_of(trainer(prepared, Weights(0, 0, 0), "--loss.label_strength", "5"))
    for one, other, labelled in zip(equal, none, some, strict=True):
        torch.testing.assert_close(one["l_i2t"], other["l_i2t"])
        assert not torch.isclose(one["l_i2t"], labelled["l_i2t"])


@pytest.mark.slow
def test_l_img_and_l_text_are_those_of_the_angular_loss(prepared: Path) -> None:
    labels_of(prepared)
    weights = Weights(0, 0.3, 0.2)
    _, fine = terms_of(trainer(prepared, weights))
    _, angular = terms_of(trainer(prepared, weights, "--loss.base", "angular"))
    _, alone = terms_of(trainer(prepared, Weights(0, 0, 0)))
    for one, other, pairwise in zip(fine, angular, alone, strict=True):
        assert one.keys() == {"l_i2t", "l_img", "l_text"}
        torch.testing.assert_close(one["l_img"], other["l_img"])
        torch.testing.assert_close(one["l_text"], other["l_text"])
        torch.testing.assert_close(one["l_i2t"], pairwise["l_i2t"])


@pytest.mark.slow
def test_without_categories_neighbors_say_what_is_alike(tmp_path: Path, prepared_once: Path) -> None:
    import pyarrow.parquet as pq

    from pipeline.pairs import image_root

    root, table = image_root(prepared_once), pq.read_table(prepared_once / "pairs.parquet")
    manifest = tmp_path / "pairs.jsonl"
    records = [{"image": row["image_path"], "text": row["text"], "split": row["split"]} for row in table.to_pylist()]
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [*TINY, "--dataset.source", "manifest", "--dataset.manifest", manifest, "--dataset.root", root]
    words += ["--work", tmp_path / "work", *SMALL]
    for script in ("prepare_dataset.py", "train_doc2vec.py", "extract_doc2vec_vectors.py", "knn_document_features.py"):
        run_script(script, *words)
    demanded = run_script(LABELS, *words, "--siamese.relevance", "category", ok=False)
    assert "has no categories" in one_line_error(demanded)
    shown = run_script(LABELS, *words).stdout
    assert "alike being Doc2Vec neighbors" in shown
    run = step_4.main(["0", "0", "0", *map(str, words), *FINE])
    assert "neighbors/doc2vec/indices.npy" in json.loads((run / "inputs.json").read_text())
    evaluate.main(["--run", str(run)])
    assert "map_image_to_text" not in (run / "metrics.json").read_text()


@pytest.mark.slow
def test_embedding_leaves_the_order_of_the_rows(prepared: Path) -> None:
    settings = settings_of(prepared)
    data = load_prepared(settings.work_folder, settings.model.text.max_words)
    siamese = build_network(
        settings.siamese, settings.model.text, np.load(prepared / "doc2vec" / "word_vectors.npy"), settings.seed
    )
    rows = data.rows["test"][::-1]
    together = embed_texts(siamese.encoder, data, rows, 32, "float32", torch.device("cpu"))
    for place, row in enumerate(rows):
        torch.testing.assert_close(siamese.encoder(*data.texts(np.array([row])))[0], together[place])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"siamese": {"dropout": 1.0}}, "siamese.dropout"),
        ({"siamese": {"held_out_texts": 1}}, "siamese.held_out_texts"),
        ({"siamese": {"learning_rate": 0.0}}, "siamese.learning_rate"),
        ({"loss": {"label_strength": -1.0}}, "loss.label_strength"),
        ({"loss": {"mean_margin": 0.0}}, "loss.mean_margin"),
        ({"loss": {"base": "fine_grained", "tile_negatives": True}}, "loss.tile_negatives"),
    ],
)
def test_settings_that_make_no_sense(tree: dict, message: str) -> None:
    settings, wrong = validated(checked_tree(tree, "a tree"))
    (mistake,) = wrong + mistakes(settings)
    assert message in mistake
