"""The settings of every script: one dataclass a section, read from a YAML file and from flags.

`--config FILE.yaml` sets what the file names, `--section.setting VALUE` sets one thing more, and what neither names
keeps the default below. The defaults are the paper's (Thomas & Kovashka 2020, Sec. 3.3) wherever it gives a value.
"""

import copy
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from pipeline.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "openclipart.yaml"


@dataclass
class Synthetic:
    """The made-up dataset (source `synthetic`)."""

    pairs: int = 2000
    """Image-text pairs to make."""
    topics: int = 12
    """Topics; a pair's topic is its category."""
    motifs: int = 24
    """Different drawings there are, at most 60; each serves several topics."""
    motifs_per_topic: int = 6
    """Visually different drawings that illustrate one topic."""
    literalness: float = 0.2
    """From 0 (picture and text share only the topic) to 1 (every text names what is drawn)."""


@dataclass
class Dataset:
    """Where the pairs come from and which of them are kept (step 0)."""

    source: Literal[
        "openclipart",
        "wikipedia",
        "tvgraz",
        "politics",
        "goodnews",
        "conceptual_captions",
        "coco",
        "flickr30k",
        "manifest",
        "synthetic",
    ] = "openclipart"
    """Reader of the published files."""
    name: str | None = None
    """Name of the dataset; null takes the source's. Names the folder under work/."""
    root: str | None = None
    """Folder of the published files. Null is allowed for openclipart (fetched with apt-get) and synthetic (drawn)."""
    manifest: str | None = None
    """File with one's own pairs (source manifest): CSV, TSV, JSONL or Parquet with columns image and text."""
    min_characters: int | None = None
    """Shorter texts are rejected (Politics: 501); null keeps them."""
    karpathy_split: bool | None = None
    """Sources coco and flickr30k: take Karpathy's splits. Null: where their file lies in root."""
    language: str = "en"
    """Language of the texts, ISO 639-1: decides word and sentence segmentation and stop words."""
    new_splits: bool = False
    """Draw all three splits by seed, also where the dataset publishes its own."""
    near_duplicates: bool | None = None
    """Drop near-duplicate texts with MinHash. Null: yes, except where published splits are kept."""
    near_duplicate_threshold: float = 0.8
    """Estimated Jaccard similarity of two texts' word 3-grams from which the later one is dropped."""
    val_share: float = 0.1
    """Share of the images in val where no split is published, or of the train images where only train and test are."""
    test_share: float = 0.1
    """Share of the images in test where no split is published."""
    follow_links: bool = False
    """Take images to which symbolic links in root lead out of it; absolute paths and `..` are rejected all the same."""
    check_images: Literal["decode", "header"] = "decode"
    """Decode every image once at preparation, or read only its header."""
    max_pixels: int = 400_000_000
    """Images with more pixels are rejected."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """Settings of the made-up dataset."""


@dataclass
class Text:
    """From text to words (steps 1 and 2)."""

    max_sentences: int | None = 2
    """Sentences of a text that are used, from its beginning; null uses all."""
    min_word_length: int | None = None
    """Shorter words are dropped; null means 3, and 1 for Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese."""
    stop_words: bool = True
    """Drop the language's stop words."""


@dataclass
class Doc2Vec:
    """The text space Omega in which neighbors are looked up (steps 1 and 2)."""

    vector_size: int = 200
    """Dimensions of document and word vectors."""
    mode: Literal["pv_dm", "pv_dbow"] = "pv_dm"
    """Distributed memory as in the paper, or distributed bag of words (better on small corpora)."""
    dbow_words: bool = True
    """With pv_dbow: train word vectors too, which the text encoder starts from."""
    hierarchical_softmax: bool = True
    """Hierarchical softmax as in the paper."""
    negative: int = 0
    """Noise words of negative sampling; 0 is none."""
    window: int = 20
    """Words looked at on each side."""
    min_count: int = 20
    """Words seen less often in the train texts are ignored."""
    epochs: int = 20
    """Passes over the train texts."""
    train_on: Literal["texts", "articles"] = "texts"
    """The pairs' texts, or the whole articles that they come with (source goodnews)."""
    learning_rate: float = 0.025
    """First learning rate, falling linearly."""
    inference_epochs: int | None = None
    """Steps of inference for one text; null takes epochs."""


@dataclass
class Neighbors:
    """Semantic neighbors of the train pairs (step 3), and how training draws one (step 4)."""

    space: Literal["doc2vec", "images"] = "doc2vec"
    """Space of the neighbors: Doc2Vec's, or pretrained image features' (OURS (Img NNs))."""
    k: int = 200
    """Nearest neighbors kept for each pair."""
    method: Literal["auto", "exact", "hnsw"] = "auto"
    """Exact search, HNSW through Faiss, or whichever is faster at this size."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """Distance in the space."""
    min_recall: float = 0.95
    """HNSW's query effort is raised until this share of the true neighbors is found."""
    recall_sample: int = 1000
    """Rows on which that share is measured against exact search."""
    hnsw_m: int = 16
    """HNSW: links a node."""
    hnsw_ef_construction: int = 200
    """HNSW: candidate list while building."""
    draw: Literal["neighbors", "anywhere"] = "neighbors"
    """Positive of L_img and L_text: from the neighbors, or, as a control, from the whole train split."""
    draw_from: int | None = None
    """Draw only from the first so many neighbors (authors' code: 10); null draws from all k."""


@dataclass
class ImageEncoder:
    """The image stream."""

    backbone: str = "resnet50"
    """A torchvision classification model by name, or efficientnet_lite0."""
    weights: str = "imagenet"
    """imagenet (downloaded by torchvision, in its package for efficientnet_lite0), none (Xavier), or a file's path."""
    trainable: bool = True
    """Fine-tune the backbone; false freezes it in eval mode."""
    cache_features: bool = True
    """With a frozen backbone: compute its features once, of each image and its mirror image."""
    size: int = 224
    """Images are resized to size x size, without cropping."""


@dataclass
class TextEncoder:
    """The text stream."""

    encoder: Literal["gru", "bag_of_words", "graph"] = "gru"
    """A GRU over the words, the mean of their embeddings, or a convolution over the graph of all words."""
    hidden_size: int = 512
    """GRU's hidden state."""
    dropout: float = 0.0
    """Dropout on the word embeddings (gru), on their mean (bag_of_words), or on the graph's last signals (graph)."""
    word_vectors: Literal["doc2vec", "random"] = "doc2vec"
    """What the word embeddings start from."""
    max_words: int | None = None
    """Words of a text that are read, from its beginning; null reads all."""
    graph_neighbors: int = 8
    """graph: nearest word vectors that a word is linked with."""
    graph_channels: list[int] = field(default_factory=lambda: [8, 1])
    """graph: channels of the two convolutions; a fully connected layer reads words x the second of them."""


@dataclass
class PVSE:
    """Polysemous embeddings (Song & Soleymani, CVPR 2019): both streams add what they attend to of local features."""

    embeddings: int = 0
    """Embeddings an image and a text (theirs: 2 on COCO); 0 is the plain two-stream model."""
    dropout: float = 0.0
    """Dropout on the global features and on the residuals."""
    diversity_weight: float = 0.1
    """Weight of the term that keeps an instance's residuals apart (with 2 embeddings or more)."""
    mmd_weight: float = 0.01
    """Weight of the maximum mean discrepancy of images and texts (with 2 embeddings or more)."""


@dataclass
class Model:
    """The two-stream model."""

    dimensions: int = 256
    """Dimensions of the joint space."""
    image: ImageEncoder = field(default_factory=ImageEncoder)
    """Image stream."""
    text: TextEncoder = field(default_factory=TextEncoder)
    """Text stream."""
    pvse: PVSE = field(default_factory=PVSE)
    """Several embeddings an instance."""


@dataclass
class Loss:
    """The loss that the terms are made of."""

    base: Literal["angular", "triplet", "struc", "fine_grained"] = "angular"
    """Eq. 2 or Eq. 1 of the paper in N-pairs; the structure-preserving loss of Wang et al. 2016 (STRUC); or the
    pairwise loss of Xu et al. 2019 for the pairs, with Eq. 2 for L_img and L_text."""
    form: Literal["logsumexp", "hinge"] = "logsumexp"
    """Angular N-pairs as in Wang et al. 2017, or the paper's Eq. 2 and 3 to the letter."""
    tan_squared_alpha: float | None = None
    """tan^2 of the angle; null takes 1 for logsumexp and 0.2 for hinge (which has no gradient from 1/3 on)."""
    margin: float | None = None
    """Margin of triplet and struc; null takes 0.2 for triplet and 0.1 for struc (whose distances are not squared)."""
    structure: Literal["estimated", "ground_truth"] = "estimated"
    """Neighbors of struc: those of step 3, or the other texts of a pair's own image."""
    tile_negatives: bool = False
    """Count every negative B times, as the authors' published code does by tiling (logsumexp only)."""
    labels: Literal["siamese", "equal"] = "siamese"
    """fine_grained: labels by hardness from train_siamese_labels.py, or all equal, the pairwise loss of 2018."""
    label_strength: float = 1.0
    """fine_grained: a label is 1 + this x hardness, which lies between 0 and 1."""
    mean_margin: float = 0.4
    """fine_grained: how far the mean similarities of positives and negatives are to be apart."""
    mean_weight: float = 1.0
    """fine_grained: weight of that margin against the variances."""


@dataclass
class Siamese:
    """The siamese text network that measures how alike two texts are (train_siamese_labels.py)."""

    relevance: Literal["auto", "category", "neighbors"] = "auto"
    """What makes two texts alike, here and in loss.base fine_grained: one category, or being Doc2Vec neighbors; auto
    takes categories where there are some."""
    encoder: Literal["gru", "bag_of_words", "graph"] = "graph"
    """Text encoder that both sides share; its other settings are those of model.text."""
    dimensions: int = 64
    """Dimensions of a text's vector."""
    dropout: float = 0.2
    """Dropout in the encoder, as model.text.dropout."""
    batch_size: int = 128
    """Texts in a minibatch; all pairs of them are compared."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    weight_decay: float = 1e-5
    """Adam's L2 penalty."""
    max_epochs: int = 30
    """Epochs at most."""
    stop_patience: int = 5
    """Epochs without lower validation loss after which training stops."""
    held_out_texts: int = 2000
    """Texts of the val and of the test split, at most, all pairs of which are compared: to stop early, to measure."""


@dataclass
class Training:
    """The training loop (step 4)."""

    batch_size: int = 64
    """Pairs in a minibatch, however many processes share it."""
    batches: Literal["random", "neighborhoods"] = "random"
    """Batches at random, with a neighbor of each pair drawn and encoded beside them; or of pairs with a neighbor each,
    who is then L_img's and L_text's positive: half the images and texts, and known neighbors are no negatives."""
    learning_rate: float = 1e-4
    """Adam's learning rate."""
    weight_decay: float = 1e-5
    """Adam's L2 penalty."""
    max_epochs: int = 100
    """Epochs at most."""
    decay_patience: int = 5
    """Epochs without lower validation loss after which the learning rate is decayed."""
    decay_factor: float = 0.1
    """Factor of that decay."""
    stop_patience: int = 10
    """Epochs without lower validation loss after which training stops."""
    horizontal_flip: bool = True
    """Mirror each train image with probability 1/2."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """tf32 rounds the factors of products on a GPU to 10 bits (on a CPU it is float32); bf16 runs the model under
    autocast, and the losses stay in float32."""
    compile: bool = False
    """Compile the image backbone with torch.compile, which takes minutes and a C++ compiler, and then a step less time.
    Results agree within rounding only, and with dropout in the backbone within the draw of it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    workers: int | None = None
    """Processes that read images; null takes one a core."""
    pixel_cache: Literal["auto", "raw", "jpeg", "none"] = "auto"
    """Decode images once: into an array of pixels, the same to the last bit, into JPEG shards, which take a fifth to a
    tenth of the room, or never; auto takes the first of these for which there is room."""
    pixel_cache_gb: float = 20.0
    """Gigabytes that a cache may take, if the disk has them (auto)."""
    log_every: int = 10
    """Steps between two points of the training curves."""
    show_results_every: int = 5
    """Epochs between two panels of retrieval results in TensorBoard, of val queries; 0 shows none, and no distances."""
    checkpoint_minutes: float = 10.0
    """Minutes from one checkpoint to the next within an epoch; every epoch ends with one."""
    max_unreadable_share: float = 0.01
    """Share of the images that may have become unreadable since step 0: others take their place. Above it, stop."""


@dataclass
class Evaluation:
    """What is measured on the test split (step 5)."""

    split: Literal["test", "val"] = "test"
    """Split to measure on."""
    kway: list[int] = field(default_factory=lambda: [5, 20])
    """k of the k-way Recall@1."""
    sampled_repeats: int = 10
    """Draws a query of the paper's sampled k-way task, kept as a check on the exact expectation; 0 leaves it out."""
    recall_at: list[int] = field(default_factory=lambda: [1, 5, 10])
    """K of the full-gallery Recall@K."""
    preservation_k: int = 200
    """Neighbors compared by neighborhood preservation, beside 1 % of the gallery."""
    bootstrap: int = 1000
    """Resamples of the 95 % intervals."""
    projector_pairs: int = 200
    """Pairs whose images and texts TensorBoard's projector shows; 0 writes nothing for it."""
    batch_size: int = 256
    """Images or texts embedded at a time."""


@dataclass
class Tuning:
    """The search for the loss weights."""

    trials: int = 30
    """Trainings for the baseline's weight, and as many for the method's three."""


@dataclass
class Settings:
    """All settings."""

    seed: int = 0
    """Seeds all that is random."""
    deterministic: bool = False
    """The same files bit for bit from the same command on the same machine; costs cores in steps 1 and 3."""
    work: str | None = None
    """Folder of everything written; null is work/<dataset.name>."""
    features: str | None = None
    """Folder of cached image features; null is <work>/features. Splits of a dataset can share it that keep the same
    images: others would compute theirs in turns."""
    dataset: Dataset = field(default_factory=Dataset)
    """Step 0."""
    text: Text = field(default_factory=Text)
    """Steps 1 and 2."""
    doc2vec: Doc2Vec = field(default_factory=Doc2Vec)
    """Steps 1 and 2."""
    neighbors: Neighbors = field(default_factory=Neighbors)
    """Steps 3 and 4."""
    model: Model = field(default_factory=Model)
    """Step 4."""
    loss: Loss = field(default_factory=Loss)
    """Step 4."""
    siamese: Siamese = field(default_factory=Siamese)
    """Fine-grained labels, for step 4 with loss.base fine_grained."""
    training: Training = field(default_factory=Training)
    """Step 4."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Step 5."""
    tuning: Tuning = field(default_factory=Tuning)
    """tune_loss_weights.py."""

    @property
    def work_folder(self) -> Path:
        """WORK, the folder that every step reads from and writes to."""
        return Path(self.work) if self.work else Path("work") / (self.dataset.name or self.dataset.source)

    @property
    def features_folder(self) -> Path:
        """Folder of cached image features."""
        return Path(self.features) if self.features else self.work_folder / "features"


# Mistakes

NEEDED_IN_ROOT = {
    "wikipedia": "texts/, images/ and the .list files",
    "tvgraz": "a folder for each category",
    "politics": "complete_db.pickle, train_test_paths.pickle and imgs/",
    "goodnews": "captioning_dataset.json, img_splits.json and images/",
    "conceptual_captions": "the two TSVs, train/ and val/",
    "coco": "annotations/ (or dataset_coco.json) and train2017/ and val2017/",
    "flickr30k": "the captions (or dataset_flickr30k.json) and the images",
}
"""Sources that are read from a folder which the user names, and what they look for in it."""


LARGEST = 2**31 - 1
"""Whole numbers go into the C code of gensim, Faiss and Pillow, which takes no larger ones."""


def mistakes(settings: Settings) -> list[str]:
    """What is wrong with the values of `settings`, a sentence each; empty where nothing is."""
    found = []
    wrong: set[str] = set()
    kinds = setting_types()

    def demand(name: str, fine: Callable[[Any], bool], wanted: str) -> None:
        value = get(settings, name)
        if value is not None and name not in wrong and not fine(value):
            found.append(f"{name} is {value!r} and must be {wanted}")
            wrong.add(name)

    for name, value in flatten(settings).items():
        demand(name, lambda value, kind=kinds[name]: _is_of_type(value, kind), _in_words(kinds[name]))
        if value is None and not _may_be_null(kinds[name]):
            found.append(f"{name} is null and must be {_in_words(kinds[name])}")
            wrong.add(name)
        elif isinstance(value, str):
            demand(name, lambda text: "\0" not in text and is_unicode(text), "text that a file can hold")
        elif name != "seed":
            numbers = value if isinstance(value, list) else [value]
            whole = [number for number in numbers if isinstance(number, int)]
            real = [number for number in numbers if isinstance(number, float)]
            demand(name, lambda _, real=real: all(map(math.isfinite, real)), "a finite number")
            demand(name, lambda _, whole=whole: max(whole, default=0) <= LARGEST, f"at most {LARGEST}")
    if wrong:  # what follows compares values, which have to be of the right kind
        settings, defaults = copy.deepcopy(settings), Settings()
        for name in wrong:
            _set(settings, name, get(defaults, name))

    for name in [
        "dataset.max_pixels",
        "dataset.min_characters",
        "dataset.synthetic.topics",
        "dataset.synthetic.motifs",
        "dataset.synthetic.motifs_per_topic",
        "text.max_sentences",
        "text.min_word_length",
        "model.text.max_words",
        "doc2vec.vector_size",
        "doc2vec.window",
        "doc2vec.min_count",
        "doc2vec.epochs",
        "doc2vec.inference_epochs",
        "neighbors.k",
        "neighbors.recall_sample",
        "neighbors.hnsw_ef_construction",
        "neighbors.draw_from",
        "model.dimensions",
        "model.image.size",
        "model.text.hidden_size",
        "model.text.graph_neighbors",
        "siamese.dimensions",
        "siamese.batch_size",
        "siamese.max_epochs",
        "siamese.stop_patience",
        "training.batch_size",
        "training.max_epochs",
        "training.decay_patience",
        "training.stop_patience",
        "training.log_every",
        "evaluation.preservation_k",
        "evaluation.bootstrap",
        "evaluation.batch_size",
        "tuning.trials",
    ]:
        demand(name, lambda value: value >= 1, "at least 1")
    demand("neighbors.hnsw_m", lambda value: value >= 2, "at least 2")
    for name in (
        "doc2vec.negative",
        "model.pvse.embeddings",
        "model.pvse.diversity_weight",
        "model.pvse.mmd_weight",
        "training.workers",
        "training.weight_decay",
        "training.show_results_every",
        "evaluation.sampled_repeats",
        "evaluation.projector_pairs",
        "seed",
    ):
        demand(name, lambda value: value >= 0, "at least 0")
    demand("seed", lambda seed: seed < 2**32, "below 2^32, as gensim takes no more")
    for name in ("siamese.weight_decay", "loss.label_strength"):
        demand(name, lambda value: value >= 0, "at least 0")
    for name in ("doc2vec.learning_rate", "loss.tan_squared_alpha", "loss.margin", "training.learning_rate"):
        demand(name, lambda value: value > 0, "above 0")
    for name in ("siamese.learning_rate", "loss.mean_margin", "loss.mean_weight"):
        demand(name, lambda value: value > 0, "above 0")
    for name in ("dataset.near_duplicate_threshold", "neighbors.min_recall"):
        demand(name, lambda value: 0 < value <= 1, "above 0 and at most 1")
    demand("training.pixel_cache_gb", lambda value: value > 0, "above 0")
    demand("training.checkpoint_minutes", lambda value: value > 0, "above 0")
    demand("training.max_unreadable_share", lambda value: 0 <= value < 1, "at least 0 and below 1")
    for name in ("dataset.val_share", "dataset.test_share", "training.decay_factor"):
        demand(name, lambda value: 0 < value < 1, "between 0 and 1")
    demand("dataset.synthetic.literalness", lambda value: 0 <= value <= 1, "from 0 to 1")
    demand("dataset.synthetic.pairs", lambda value: value >= 10, "at least 10")
    demand("dataset.synthetic.motifs", lambda value: value <= 60, "at most 60, as many as there are different drawings")
    for name in ("model.text.dropout", "model.pvse.dropout", "siamese.dropout"):
        demand(name, lambda value: 0 <= value < 1, "at least 0 and below 1")
    demand(
        "evaluation.projector_pairs", lambda value: value <= 4000, "at most 4000, as many as its sprite has room for"
    )
    demand("siamese.held_out_texts", lambda value: value >= 2, "at least 2")
    demand(
        "model.text.graph_channels", lambda channels: len(channels) == 2 and min(channels) >= 1, "two numbers from 1 on"
    )
    demand("evaluation.kway", lambda ks: ks and all(k >= 2 for k in ks), "one or more numbers from 2 on")
    demand("evaluation.recall_at", lambda ks: ks and all(k >= 1 for k in ks), "one or more numbers from 1 on")
    demand("dataset.name", lambda name: name and "/" not in name and name[0] != ".", "a folder's name, without / in it")
    demand("dataset.language", lambda code: code[:2].isalpha(), "a language's code, such as en")

    if settings.dataset.val_share + settings.dataset.test_share >= 1:
        found.append("dataset.val_share and dataset.test_share leave nothing to train on")
    if settings.dataset.synthetic.motifs_per_topic > settings.dataset.synthetic.motifs:
        found.append("dataset.synthetic.motifs_per_topic is larger than dataset.synthetic.motifs")
    if not settings.doc2vec.hierarchical_softmax and settings.doc2vec.negative == 0:
        found.append("doc2vec needs hierarchical_softmax: true or negative above 0")
    if settings.model.text.encoder == "graph" and settings.model.text.word_vectors == "random":
        found.append(
            "model.text.encoder graph links words by Doc2Vec's vectors; let model.text.word_vectors be doc2vec"
        )
    if settings.model.text.encoder == "graph" and settings.model.pvse.embeddings:
        found.append("model.pvse attends to word embeddings, which model.text.encoder graph has none of; take gru")
    if settings.loss.tile_negatives and (settings.loss.base, settings.loss.form) != ("angular", "logsumexp"):
        found.append("loss.tile_negatives goes with loss.base angular and loss.form logsumexp")
    if settings.loss.structure == "ground_truth" and settings.loss.base != "struc":
        found.append("loss.structure ground_truth goes with loss.base struc")
    if settings.training.compile and settings.model.pvse.embeddings:
        found.append("training.compile goes with model.pvse.embeddings 0: what is compiled gives PVSE no feature map")
    if settings.training.batches == "neighborhoods":
        if settings.loss.base not in ("angular", "triplet"):
            found.append("training.batches neighborhoods goes with loss.base angular and triplet")
        if settings.neighbors.draw != "neighbors":
            found.append("training.batches neighborhoods goes with neighbors.draw neighbors")
        if settings.training.batch_size < 4:
            found.append("training.batches neighborhoods needs a training.batch_size of 4 or more, for two couples")
    if settings.dataset.source == "manifest" and not settings.dataset.manifest:
        found.append("dataset.source manifest needs dataset.manifest, the file with the pairs")
    for source, files in NEEDED_IN_ROOT.items():
        if settings.dataset.source == source and not settings.dataset.root:
            found.append(f"dataset.source {source} needs dataset.root, the folder with {files}")
    if settings.doc2vec.train_on == "articles" and settings.dataset.source != "goodnews":
        found.append("doc2vec.train_on articles goes with dataset.source goodnews")
    if settings.doc2vec.train_on == "articles" and settings.dataset.new_splits:
        found.append("doc2vec.train_on articles goes with the published splits, not with dataset.new_splits")
    if (settings.neighbors.draw_from or 0) > settings.neighbors.k:
        found.append(
            f"neighbors.draw_from is {settings.neighbors.draw_from}, more than neighbors.k {settings.neighbors.k}"
        )
    if settings.dataset.karpathy_split is not None and settings.dataset.source not in ("coco", "flickr30k"):
        found.append("dataset.karpathy_split goes with dataset.source coco and flickr30k")
    return found


READ_WITH: list[tuple[tuple[str, ...], Callable[[Settings], bool], str]] = [
    (("dataset.synthetic.",), lambda s: s.dataset.source == "synthetic", "dataset.source synthetic"),
    (("dataset.manifest",), lambda s: s.dataset.source == "manifest", "dataset.source manifest"),
    (("dataset.root",), lambda s: s.dataset.source != "synthetic", "a dataset.source that is read from a folder"),
    (("dataset.near_duplicate_threshold",), lambda s: s.dataset.near_duplicates is not False, "near_duplicates: true"),
    (("doc2vec.dbow_words",), lambda s: s.doc2vec.mode == "pv_dbow", "doc2vec.mode pv_dbow"),
    (
        ("neighbors.hnsw_m", "neighbors.hnsw_ef_construction", "neighbors.min_recall"),
        lambda s: s.neighbors.method != "exact",
        "neighbors.method auto and hnsw",
    ),
    (("neighbors.draw_from",), lambda s: s.neighbors.draw == "neighbors", "neighbors.draw neighbors"),
    (("model.image.cache_features",), lambda s: not s.model.image.trainable, "model.image.trainable: false"),
    (
        ("training.pixel_cache", "training.compile"),
        lambda s: s.model.image.trainable or not s.model.image.cache_features,
        "model.image.trainable: true or model.image.cache_features: false",
    ),
    (("training.pixel_cache_gb",), lambda s: s.training.pixel_cache == "auto", "training.pixel_cache auto"),
    (
        ("model.text.hidden_size",),
        lambda s: "gru" in (s.model.text.encoder, s.siamese.encoder),
        "model.text.encoder gru or siamese.encoder gru",
    ),
    (
        ("model.text.graph_neighbors", "model.text.graph_channels"),
        lambda s: "graph" in (s.model.text.encoder, s.siamese.encoder),
        "model.text.encoder graph or siamese.encoder graph",
    ),
    (("model.pvse.dropout",), lambda s: s.model.pvse.embeddings >= 1, "model.pvse.embeddings from 1 on"),
    (
        ("model.pvse.diversity_weight", "model.pvse.mmd_weight"),
        lambda s: s.model.pvse.embeddings >= 2,
        "model.pvse.embeddings from 2 on",
    ),
    (
        ("loss.form", "loss.tan_squared_alpha"),
        lambda s: s.loss.base in ("angular", "fine_grained"),
        "loss.base angular and fine_grained",
    ),
    (("loss.margin",), lambda s: s.loss.base in ("triplet", "struc"), "loss.base triplet and struc"),
    (
        ("loss.labels", "loss.mean_margin", "loss.mean_weight"),
        lambda s: s.loss.base == "fine_grained",
        "loss.base fine_grained",
    ),
    (
        ("loss.label_strength",),
        lambda s: s.loss.base == "fine_grained" and s.loss.labels == "siamese",
        "loss.base fine_grained and loss.labels siamese",
    ),
]
"""Settings (or, with a dot at the end, sections) that only some settings give a meaning to, and which these are."""


def not_read(settings: Settings, names: Collection[str]) -> list[str]:
    """Those of the settings `names` that differ from their default and that nothing reads, a sentence each."""
    values, defaults = flatten(settings), flatten(Settings())
    return [
        f"{name} is {values[name]!r}, which nothing reads: it goes with {wanted}"
        for prefixes, is_read, wanted in READ_WITH
        for name in values
        if name in names and name.startswith(prefixes) and values[name] != defaults[name] and not is_read(settings)
    ]


# Types


@functools.cache
def setting_types() -> dict[str, Any]:
    """The type of every setting by dotted name."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for item in dataclasses.fields(kind):
            if dataclasses.is_dataclass(item.type):
                yield from walk(item.type, f"{prefix}{item.name}.")
            else:
                yield prefix + item.name, item.type

    return dict(walk(Settings, ""))


def _may_be_null(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


def _is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a setting's type; a whole number is a number too, and true is no number."""
    if isinstance(kind, types.UnionType):
        return any(_is_of_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(item, typing.get_args(kind)[0]) for item in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(kind: Any) -> str:
    """A setting's type as a user would call it."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if one is type(None) else _in_words(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is list:
        return "a list of whole numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def is_unicode(text: str) -> bool:
    """Whether a text can be written: a lone surrogate, as which bytes that are not UTF-8 are read, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Reading and writing


def get(settings: Settings, name: str) -> Any:
    """The setting of a dotted name, such as `training.batch_size`."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """All settings by dotted name, in the order in which they are declared."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def select(settings: Settings, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The settings that are named by, or lie in a section named by, one of `prefixes`."""
    return {
        name: value
        for name, value in flatten(settings).items()
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
    }


def _nearest(name: str, known: dict[str, Any]) -> str:
    """A hint at the known setting that looks most like `name`: in its own section first, then by its last part."""
    section, _, last = name.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    by_last = {other.rpartition(".")[2]: other for other in reversed(known)}
    for candidates in (siblings, by_last):
        if close := difflib.get_close_matches(last, candidates, n=1, cutoff=0.6):
            return f"; did you mean {candidates[close[0]]}?"
    return "; --help lists all settings"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings tree in a YAML file.

    Raises UserError where there is no such file, it is no YAML mapping, or it names a setting that does not exist.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the config {path}: {error.strerror}; name a file such as {DEFAULT_CONFIG}"
        ) from None
    except Exception as error:  # YAML's constructors raise anything: a date of the 99th month, a thousand brackets
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the config {path} is no valid YAML: {why}") from None
    return checked_tree(tree, str(path))


def checked_tree(tree: Any, path: str) -> dict[str, Any]:
    """A settings tree whose names all exist and whose sections are sections; raises UserError, which names `path`."""
    if not isinstance(tree, dict):
        raise UserError(f"the config {path} must hold settings by name, such as `seed: 0`")
    known, leaves = flatten(Settings()), _leaves(tree)
    unknown = [name for name in leaves if name not in known]
    sections = [name for name in unknown if _is_section(name)]
    if wrong := [f"{name}{_nearest(name, known)}" for name in unknown if name not in sections]:
        raise UserError(f"{path} names no setting with {' and '.join(wrong)}")
    if sections:
        raise UserError(f"{path}: {' and '.join(sections)} is a section and needs settings below it")
    # An alias in YAML may stand for a list of lists of lists, which would fill the memory where it is shown.
    if wrong := [name for name, value in leaves.items() if not _is_plain(value)]:
        raise UserError(f"{path}: {' and '.join(wrong)} must be a single value or a list of such")
    return tree


def _is_plain(value: Any) -> bool:
    """Whether a value out of a YAML file is a scalar or a list of scalars."""
    scalars = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in scalars)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted name; those that are no sections where one is expected are among them."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and _is_section(name):
            found |= _leaves(value, name + ".")
        else:
            found[name] = value
    return found


def _is_section(name: str) -> bool:
    return any(setting.startswith(name + ".") for setting in setting_types())


def _set(settings: Settings, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    section: Any = settings
    for part in sections:
        section = getattr(section, part)
    setattr(section, last, value)


def to_settings(arguments: Any) -> Settings:
    """The Settings among parsed arguments."""

    def build(kind: type, values: Any) -> Any:
        return kind(
            **{
                item.name: build(item.type, values[item.name])
                if dataclasses.is_dataclass(item.type)
                else values[item.name]
                for item in dataclasses.fields(kind)
            }
        )

    return build(Settings, arguments)


@functools.cache
def _settings_parser() -> ArgumentParser:
    from pipeline.command_line import _Parser

    parser = _Parser()
    parser.add_class_arguments(Settings, None)
    return parser


def load_settings(*sources: str | Path | dict[str, Any]) -> Settings:
    """Settings from YAML files, or trees already read, over the defaults; later ones win.

    Raises UserError as `read_yaml` does.
    """
    parser = _settings_parser()
    values = parser.get_defaults()
    for source in sources:
        tree = checked_tree(source, "the run's config.yaml") if isinstance(source, dict) else read_yaml(source)
        values = parser.parse_object(tree, cfg_base=values)
    return to_settings(values)
