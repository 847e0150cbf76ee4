"""configs/paper.yaml and configs/authors_code.yaml, setting by setting, beside what the sources say."""

from typing import Any

import pytest
from conftest import ROOT

from pipeline.schema import Dataset, Settings
from pipeline.settings import flatten, get, load_settings, mistakes, read_yaml

PAPER: dict[str, tuple[Any, str]] = {
    "dataset.published_splits": (False, 'Sec. 3.3: "We use a train-val-test split of 80-10-10."'),
    "dataset.test_share": (0.1, 'Sec. 3.3: "80-10-10"; dataset.val_share null takes the same'),
    "text.max_sentences": (2, 'Sec. 4.1: "we only use the first two sentences of each"'),
    "doc2vec.vector_size": (200, 'Sec. 3.3: "we use [41] with d in R^200"'),
    "doc2vec.mode": ("pv_dm", 'Sec. 3.3: "train using distributed memory [23]"'),
    "doc2vec.hierarchical_softmax": (True, 'Sec. 3.3: "We use hierarchical softmax [33]"'),
    "doc2vec.negative": (0, "Sec. 3.3: hierarchical softmax, and no negative sampling is named"),
    "doc2vec.window": (20, 'Sec. 3.3: "with window k = 20"'),
    "doc2vec.min_count": (20, 'Sec. 3.3: "ignoring words that appear less than 20 times"'),
    "doc2vec.epochs": (20, 'Sec. 3.3: "for 20 epochs"'),
    "neighbors.k": (200, "Sec. 3.2, Eq. 5: k = 200"),
    "neighbors.method": ("hnsw", 'Sec. 3.3: "approximate nearest neighbors for Psi, we use [30]", which is HNSW'),
    "neighbors.library": ("auto", "nmslib, as the authors' code, where memory allows"),
    "neighbors.distance": ("euclidean", "the authors' code; the paper names no distance"),
    "neighbors.draw": ("neighbors", "Sec. 3.2, Eq. 5: drawn at random from the neighbors"),
    "model.dimensions": (256, 'Sec. 3.3: "R^{2048 x 256} for image, R^{512 x 256} for text"'),
    "model.image.backbone": ("resnet50", 'Sec. 3.3: "using a ResNet-50 [19] architecture"'),
    "model.image.weights": ("imagenet", 'Sec. 3.3: "initialized with ImageNet features"'),
    "model.image.trainable": (True, 'Sec. 3.3: "initialized with", not frozen'),
    "model.image.size": (224, 'Sec. 3.3: "image size 224x224"'),
    "model.initialisation": ("xavier", 'Sec. 3.3: "all non-pretrained learnable weights via Xavier init. [13]"'),
    "model.text.encoder": ("gru", 'Sec. 3.3: "Gated Recurrent Units [7]"'),
    "model.text.hidden_size": (512, 'Sec. 3.3: "with hidden state size 512"'),
    "model.text.dropout": (0.0, "none is named"),
    "model.text.word_vectors": ("doc2vec", 'Sec. 3.3: "word embeddings of size 200 learned on the target dataset"'),
    "loss.base": ("angular", "Sec. 3.1, Eq. 2"),
    "loss.form": ("logsumexp", "the authors' code; Eq. 2 and 3 to the letter are hinge"),
    "loss.tan_squared_alpha": (None, "the paper gives no angle"),
    "training.batch_size": (64, 'Sec. 3.3: "minibatch size 64"'),
    "training.learning_rate": (1e-4, 'Sec. 3.3: "learning rate 1.0e-4"'),
    "training.weight_decay": (1e-5, 'Sec. 3.3: "weight decay 1e-5"'),
    "training.decay_factor": (0.1, 'Sec. 3.3: "decay the learning rate by a factor of 0.1"'),
    "training.decay_patience": (5, 'Sec. 3.3: "after every 5 epochs of no decrease in val. loss"'),
    "training.stop_patience": (10, 'README of the authors: "validation loss fails to decrease after ~10 epochs"'),
    "training.horizontal_flip": (True, 'Sec. 3.3: "random horizontal flipping"'),
    "training.precision": ("float32", "none is named; PyTorch's default"),
    "evaluation.kway": ([5, 20], "Sec. 4.3: 5-way for Politics and GoodNews, 20-way for Conceptual Captions"),
    "evaluation.preservation_k": (200, "Sec. 4.3, Table 3: the k of Eq. 5"),
}
"""By setting of paper.yaml: its value, and where it comes from."""

AUTHORS: dict[str, tuple[Any, str]] = {
    "dataset.published_splits": (True, "train_test_paths.pickle of Politics; val as large as test"),
    "doc2vec.hierarchical_softmax": (False, "their Doc2Vec has gensim's default, negative sampling"),
    "doc2vec.negative": (5, "gensim's default of negative sampling"),
    "doc2vec.epochs": (50, 'README of the authors: "we trained Doc2Vec for 50 epochs on COCO"; their code everywhere'),
    "neighbors.k": (200, "knn_document_features.py"),
    "neighbors.library": ("nmslib", "knn_document_features.py"),
    "neighbors.draw_from": (10, "the positive is one of the first 10 neighbors"),
    "model.initialisation": ("authors", "xavier_normal_ and bias 0.1 on the projections; the GRU as PyTorch draws it"),
    "loss.tile_negatives": (True, "anchors are tiled B times"),
    "training.batch_size": (32, "batch size of the data loader"),
    "training.decay_patience": (6, "ReduceLROnPlateau(patience=5) decays in the sixth epoch"),
    "training.val_loss": ("i2t", "the validation loss is that of image to text"),
    "training.passes": ("two", "the model is called for the images, then for their neighbors"),
}
"""By setting of authors_code.yaml: its value, and what the authors' published code does."""


@pytest.mark.parametrize(("name", "table"), [("paper", PAPER), ("authors_code", AUTHORS)])
def test_every_setting_of_the_config_is_what_its_source_says(name: str, table: dict[str, tuple[Any, str]]) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    settings = load_settings(path)
    assert set(read_yaml(path)) == set(table)
    for setting, (value, source) in table.items():
        assert get(settings, setting) == value and source, f"{setting}: {source}"
    assert mistakes(settings) == []


def test_the_authors_code_differs_from_the_paper_in_these_settings_alone() -> None:
    paper, theirs = (flatten(load_settings(ROOT / "configs" / f"{name}.yaml")) for name in ("paper", "authors_code"))
    assert {name for name in paper if paper[name] != theirs[name]} == set(AUTHORS) - {"neighbors.k"}


def test_the_papers_values_are_the_defaults_but_for_the_splits() -> None:
    drawn = Settings(dataset=Dataset(published_splits=False))
    assert load_settings(ROOT / "configs" / "paper.yaml") == drawn


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("politics", {"evaluation.kway": [5], "text.max_sentences": 2, "dataset.near_duplicates": True}),
        ("goodnews", {"evaluation.kway": [5], "doc2vec.train_on": "texts"}),
        ("conceptual_captions", {"evaluation.kway": [20], "training.select_k": 20}),
        ("coco", {"evaluation.kway": [100], "training.select_k": 100, "doc2vec.epochs": 50}),
    ],
)
def test_configs_of_the_papers_datasets_change_only_what_the_paper_names(name: str, values: dict[str, Any]) -> None:
    settings = load_settings(ROOT / "configs" / f"{name}.yaml")
    assert {setting: get(settings, setting) for setting in values} == values
    paper = flatten(load_settings(ROOT / "configs" / "paper.yaml"))
    changed = {setting for setting, value in flatten(settings).items() if value != paper[setting]}
    more = {"evaluation.kway", "training.select_k", "doc2vec.epochs", "text.max_sentences"}
    assert {setting for setting in changed if not setting.startswith("dataset.")} <= more
