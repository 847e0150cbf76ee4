"""The settings of every script: a field is a setting's type, default, meaning, range, and the steps that it shapes.

`--config FILE.yaml` sets what the file names, `--section.setting VALUE` sets one thing more, and what neither names
keeps the default below. The defaults are the paper's (Thomas & Kovashka 2020, Sec. 3.3) where it gives a value, except
`dataset.published_splits`. The command line, its help, the mistakes it lists, the stamps of the steps, the names of
runs and TensorBoard's HParams are derived from this schema. To add a setting, add its field.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.fields import (
    LARGEST,
    Backbone,
    Count,
    FromTwo,
    Name,
    Natural,
    NotNegative,
    PathText,
    Positive,
    Rate,
    ReadWhen,
    Shapes,
    Share,
)
from pipeline.registry import LOSSES, READERS, SPACES, TEXT_ENCODERS, Registry

PREPARE, DOC2VEC, VECTORS, IMAGE_FEATURES, NEIGHBORS, SIAMESE, RUN, EVALUATION = (
    "prepare doc2vec vectors image_features neighbors siamese run evaluation".split()
)
"""The steps whose outputs a setting may shape."""

ANGULAR, TRIPLET = (1.0, 0.3, 0.2), (1.0, 0.1, 0.3)
"""SYM, IMG and TEXT of Sec. 3.3. The paper's beta is IMG, its alpha TEXT."""

WITH_GRU = ReadWhen("model.text.encoder", "gru") | ReadWhen("siamese.encoder", "gru")
WITH_GRAPH = ReadWhen("model.text.encoder", "graph") | ReadWhen("siamese.encoder", "graph")
WITH_PIXELS = ReadWhen("model.image.trainable", True) | ReadWhen("model.image.cache_features", False)
WITH_HNSW = ReadWhen("neighbors.method", "auto", "hnsw")
WITH_ANGLE = ReadWhen("loss.base", "angular", "fine_grained")


class Section(BaseModel):
    """A section of the settings. A setting with a registry in its type takes one of its names."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_assignment=True
    )

    @field_validator("*")
    @classmethod
    def _is_registered(cls, value: Any, field: ValidationInfo) -> Any:
        for names in cls.model_fields[str(field.field_name)].metadata:
            if isinstance(names, Registry) and names.key(value) is None:
                raise ValueError(f"one of {', '.join(names)}")
        return value


class Synthetic(Section):
    """The made-up dataset (source `synthetic`)."""

    pairs: Annotated[int, Field(ge=10, le=LARGEST)] = 2000
    """Image-text pairs to make."""
    topics: Count = 12
    """Topics; a pair's topic is its category."""
    motifs: Annotated[int, Field(ge=1, le=60)] = 24
    """Different drawings there are, at most 60; each serves several topics."""
    motifs_per_topic: Count = 6
    """Visually different drawings that illustrate one topic."""
    literalness: Annotated[float, Field(ge=0, le=1)] = 0.2
    """From 0 (picture and text share only the topic) to 1 (every text names what is drawn)."""


class Columns(Section):
    """Columns of one's own table; null takes the usual names (docs/data.md). A dot leads into a field: meta.caption."""

    image: str | None = None
    """Paths of the images (source huggingface: the images)."""
    text: str | None = None
    """Texts; a list gives a pair each."""
    image_id: str | None = None
    """What all texts of an image share; without such a column its path."""
    category: str | None = None
    """Topics."""
    split: str | None = None
    """train, val or test, in every row."""

    def named(self) -> dict[str, str]:
        """The columns that are named, by our names."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class Dataset(Section):
    """Where the pairs come from and which of them are kept (step 0)."""

    source: Annotated[str, READERS] = "openclipart"
    """Reader of the published files."""
    name: Name | None = None
    """Name of the dataset; null takes the source's. Names the folder under work/."""
    root: Annotated[PathText | None, ReadWhen("dataset.source", unless=("synthetic",))] = None
    """Folder of the published files. Null is allowed for openclipart (fetched with apt-get) and synthetic (drawn)."""
    manifest: Annotated[PathText | None, ReadWhen("dataset.source", "manifest")] = None
    """File with one's own pairs (source manifest): CSV, TSV, JSON, JSONL or Parquet with an image and a text a row."""
    columns: Annotated[Columns, ReadWhen("dataset.source", "manifest", "webdataset", "huggingface")] = Columns()
    min_characters: Count | None = None
    """Shorter texts are rejected (Politics: 501); null keeps them."""
    karpathy_split: bool | None = None
    """Sources coco and flickr30k: take Karpathy's splits. Null: where their file lies in root."""
    language: Annotated[Name, Shapes(PREPARE, DOC2VEC, VECTORS)] = "en"
    """Language of the texts, ISO 639-1: decides word and sentence segmentation and stop words."""
    published_splits: bool = True
    """Take the owners' splits where there are some; false draws all three by seed, as the paper (Sec. 3.3)."""
    near_duplicates: bool | None = None
    """Drop near-duplicate texts with MinHash. Null: yes, except where published splits are taken."""
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1), ReadWhen("dataset.near_duplicates", True, None)] = 0.8
    """Estimated Jaccard similarity of two texts' word 3-grams from which the later one is dropped."""
    val_share: Share | None = None
    """Share of the images in val, or of the train images where no val is published; null: as many as test has."""
    test_share: Share = 0.1
    """Share of the images in test where splits are drawn."""
    follow_links: bool = False
    """Take images to which symbolic links in root lead out of it; absolute paths and `..` are rejected all the same."""
    check_images: Literal["decode", "header"] = "decode"
    """Decode every image once at preparation, or read only its header."""
    max_pixels: Count = 400_000_000
    """Images with more pixels are rejected."""
    synthetic: Annotated[Synthetic, ReadWhen("dataset.source", "synthetic")] = Synthetic()


class Text(Section):
    """From text to words (steps 1 and 2)."""

    max_sentences: Count | None = 2
    """Sentences of a text that are used, from its beginning; null uses all."""
    min_word_length: Count | None = None
    """Shorter words are dropped; null means 3, and 1 for Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese."""
    stop_words: bool = True
    """Drop the language's stop words."""


class Doc2Vec(Section):
    """The text space Omega in which neighbors are looked up (steps 1 and 2)."""

    vector_size: Count = 200
    """Dimensions of document and word vectors."""
    mode: Literal["pv_dm", "pv_dbow"] = "pv_dm"
    """Distributed memory as in the paper, or distributed bag of words (better on small corpora)."""
    dbow_words: Annotated[bool, ReadWhen("doc2vec.mode", "pv_dbow")] = True
    """With pv_dbow: train word vectors too, which the text encoder starts from."""
    hierarchical_softmax: bool = True
    """Hierarchical softmax as in the paper."""
    negative: Natural = 0
    """Noise words of negative sampling; 0 is none."""
    window: Count = 20
    """Words looked at on each side."""
    min_count: Count = 20
    """Words seen less often in the train texts are ignored."""
    epochs: Count = 20
    """Passes over the train texts."""
    train_on: Literal["texts", "articles"] = "texts"
    """The pairs' texts, or the whole articles that they come with (source goodnews)."""
    learning_rate: Positive = 0.025
    """First learning rate, falling linearly."""
    inference_epochs: Count | None = None
    """Steps of inference for one text; null takes epochs."""


class Neighbors(Section):
    """Semantic neighbors of the train pairs (step 3), and how training draws one (step 4)."""

    space: Annotated[str, SPACES] = "doc2vec"
    """Space of the neighbors: Doc2Vec's; pretrained image features' (OURS (Img NNs)); both, by the sum of each row's
    standardised cosines; a sentence encoder's, that of model.text.encoder unless one is named; or the vectors in a
    file, a row a pair, or a row a line of texts.txt beside it."""
    k: Count = 200
    """Nearest neighbors kept for each pair."""
    method: Literal["auto", "exact", "hnsw"] = "hnsw"
    """HNSW as the paper, exact search, or whichever is faster at this size."""
    library: Annotated[Literal["auto", "nmslib", "faiss"], WITH_HNSW] = "auto"
    """Library of HNSW; auto takes nmslib, as the authors, unless its two copies of the vectors take too much memory."""
    distance: Annotated[Literal["euclidean", "cosine"], ReadWhen("neighbors.space", unless=("both",))] = "euclidean"
    """Distance in the space. Both spaces together are compared by cosine."""
    min_recall: Annotated[float, Field(gt=0, le=1), WITH_HNSW] = 0.95
    """HNSW's query effort is raised until this share of the true neighbors is found."""
    recall_sample: Count = 1000
    """Rows on which that share is measured against exact search."""
    hnsw_m: Annotated[int, Field(ge=2, le=LARGEST), WITH_HNSW] = 16
    """HNSW: links a node."""
    hnsw_ef_construction: Annotated[Count, WITH_HNSW] = 200
    """HNSW: candidate list while building."""
    draw: Annotated[Literal["neighbors", "anywhere"], Shapes(RUN)] = "neighbors"
    """Positive of L_img and L_text: from the neighbors, or, as a control, from the whole train split."""
    draw_from: Annotated[Count | None, Shapes(RUN), ReadWhen("neighbors.draw", "neighbors")] = None
    """Draw only from the first so many neighbors (authors' code: 10); null draws from all k."""


class ImageEncoder(Section):
    """The image stream."""

    backbone: Annotated[Backbone, Shapes(RUN, IMAGE_FEATURES)] = "resnet50"
    """A torchvision classification model by name; efficientnet_lite0; timm:NAME; open_clip:NAME/PRETRAINED;
    or features:FILE.npy, a row for each line of images.txt beside it."""
    weights: Annotated[PathText, Shapes(RUN, IMAGE_FEATURES)] = "imagenet"
    """imagenet (pretrained, as the backbone's library downloads them, in its package for efficientnet_lite0), none
    (Xavier), or a file's path."""
    trainable: bool = True
    """Fine-tune the backbone; false freezes it in eval mode."""
    cache_features: Annotated[bool, ReadWhen("model.image.trainable", False)] = True
    """With a frozen backbone: compute its features once, of each image and its mirror image."""
    size: Annotated[Count | None, Shapes(RUN, IMAGE_FEATURES)] = 224
    """Images are resized to size x size, without cropping; null takes the size that timm or open_clip states."""
    dropout: Annotated[Rate, ReadWhen("model.pvse.embeddings", 0)] = 0.0
    """Dropout on the backbone's features (ours; the paper has none)."""


class TextEncoder(Section):
    """The text stream."""

    encoder: Annotated[str, TEXT_ENCODERS] = "gru"
    """A GRU over the words, the mean of their embeddings, or a convolution over the graph of all words; a linear layer
    on the vectors of a sentence encoder, or of a file: a row a pair, or a row a line of texts.txt beside it."""
    trainable: Annotated[bool, ReadWhen("model.text.encoder", "sentence_transformers:NAME_OR_FOLDER")] = False
    """Fine-tune the sentence encoder; false computes its vectors once."""
    hidden_size: Annotated[Count, Shapes(RUN, SIAMESE), WITH_GRU] = 512
    """GRU's hidden state."""
    dropout: Rate = 0.0
    """Dropout on the word embeddings (gru), on their mean (bag_of_words), on the graph's last signals (graph), or on
    the vectors of texts."""
    word_vectors: Annotated[Literal["doc2vec", "random"], Shapes(RUN, SIAMESE)] = "doc2vec"
    """What the word embeddings start from."""
    max_words: Count | None = None
    """Words of a text that are read, from its beginning; null reads all."""
    graph_neighbors: Annotated[Count, Shapes(RUN, SIAMESE), WITH_GRAPH] = 8
    """graph: nearest word vectors that a word is linked with."""
    graph_channels: Annotated[list[Count], Field(min_length=2, max_length=2), Shapes(RUN, SIAMESE), WITH_GRAPH] = Field(
        default_factory=lambda: [8, 1]
    )
    """graph: channels of the two convolutions; a fully connected layer reads words x the second of them."""


class PVSE(Section):
    """Polysemous embeddings (Song & Soleymani, CVPR 2019): both streams add what they attend to of local features."""

    embeddings: Natural = 0
    """Embeddings an image and a text (theirs: 2 on COCO); 0 is the plain two-stream model."""
    dropout: Annotated[Rate, ReadWhen("model.pvse.embeddings", unless=(0,))] = 0.0
    """Dropout on the global features and on the residuals."""
    diversity_weight: Annotated[NotNegative, ReadWhen("model.pvse.embeddings", unless=(0, 1))] = 0.1
    """Weight of the term that keeps an instance's residuals apart (with 2 embeddings or more)."""
    mmd_weight: Annotated[NotNegative, ReadWhen("model.pvse.embeddings", unless=(0, 1))] = 0.01
    """Weight of the maximum mean discrepancy of images and texts (with 2 embeddings or more)."""


class Model(Section):
    """The two-stream model."""

    dimensions: Count = 256
    """Dimensions of the joint space."""
    initialisation: Literal["xavier", "authors"] = "xavier"
    """Weights that are not pretrained: Xavier for all as in the paper, each gate of a GRU by itself; or as the authors'
    code: normal Xavier and biases of 0.1 for the projections, PyTorch's default for the GRU."""
    image: ImageEncoder = ImageEncoder()
    text: TextEncoder = TextEncoder()
    pvse: PVSE = PVSE()


class Loss(Section):
    """The loss that the terms are made of."""

    base: Annotated[str, LOSSES] = "angular"
    """Eq. 2 or Eq. 1 of the paper in N-pairs; InfoNCE, the loss of CLIP (ours); the structure-preserving loss of Wang
    et al. 2016 (STRUC); or the pairwise loss of Xu et al. 2019 for the pairs, with Eq. 2 for L_img and L_text."""
    form: Annotated[Literal["logsumexp", "hinge"], WITH_ANGLE] = "logsumexp"
    """Angular N-pairs as in Wang et al. 2017, or the paper's Eq. 2 and 3 to the letter."""
    tan_squared_alpha: Annotated[Positive | None, WITH_ANGLE] = None
    """tan^2 of the angle; null: 1 for logsumexp, 0.2 for hinge (from 1/3 on unrelated vectors have no gradient)."""
    margin: Annotated[Positive | None, ReadWhen("loss.base", "triplet", "struc")] = None
    """Margin of triplet and struc; null takes 0.2 for triplet and 0.1 for struc (whose distances are not squared)."""
    temperature: Annotated[Positive, ReadWhen("loss.base", "infonce")] = 0.1
    """infonce: what similarities are divided by; a constant, not learned."""
    soft_targets: Annotated[float, Field(ge=0, le=1), ReadWhen("loss.base", "angular", "infonce")] = 0.0
    """Share of the positive that a pair's neighbors in the batch take, together, from the pair itself (ours; 0.5 is a
    good value). They are then no negatives, and cost no further pass; weights IMG and TEXT may be 0."""
    structure: Literal["estimated", "ground_truth"] = "estimated"
    """Neighbors of struc: those of step 3, or the other texts of a pair's own image."""
    tile_negatives: bool = False
    """Count every negative B times, as the authors' published code does by tiling (logsumexp only)."""
    labels: Annotated[Literal["siamese", "equal"], ReadWhen("loss.base", "fine_grained")] = "siamese"
    """fine_grained: labels by hardness from train_siamese_labels.py, or all equal, the pairwise loss of 2018."""
    label_strength: Annotated[NotNegative, ReadWhen("loss.labels", "siamese")] = 1.0
    """fine_grained: a label is 1 + this x hardness, which lies between 0 and 1."""
    mean_margin: Annotated[Positive, ReadWhen("loss.base", "fine_grained")] = 0.4
    """fine_grained: how far the mean similarities of positives and negatives are to be apart."""
    mean_weight: Annotated[Positive, ReadWhen("loss.base", "fine_grained")] = 1.0
    """fine_grained: weight of that margin against the variances."""


class Siamese(Section):
    """The siamese text network that measures how alike two texts are (train_siamese_labels.py)."""

    relevance: Literal["auto", "category", "neighbors"] = "auto"
    """What makes texts alike, here and in loss.base fine_grained: category (auto: where there are any) or neighbors."""
    encoder: Annotated[str, TEXT_ENCODERS] = "graph"
    """Text encoder that both sides share; its other settings are those of model.text."""
    dimensions: Count = 64
    """Dimensions of a text's vector."""
    dropout: Rate = 0.2
    """Dropout in the encoder, as model.text.dropout."""
    batch_size: Count = 128
    """Texts in a minibatch; all pairs of them are compared."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate."""
    weight_decay: NotNegative = 1e-5
    """Adam's L2 penalty."""
    max_epochs: Count = 30
    """Epochs at most."""
    stop_patience: Count = 5
    """Epochs without lower validation loss after which training stops."""
    held_out_texts: FromTwo = 2000
    """Texts of the val and of the test split, at most, all pairs of which are compared: to stop early, to measure."""


class Training(Section):
    """The training loop (step 4)."""

    batch_size: Count = 64
    """Pairs in a minibatch, however many processes share it."""
    batches: Literal["random", "neighborhoods"] = "random"
    """Batches at random, with a neighbor of each pair drawn and encoded beside them; or of pairs with a neighbor each,
    who is then L_img's and L_text's positive: half the images and texts, and known neighbors are no negatives."""
    learning_rate: Positive = 1e-4
    """Adam's learning rate."""
    weight_decay: NotNegative = 1e-5
    """Adam's L2 penalty."""
    max_epochs: Count = 100
    """Epochs at most."""
    decay_patience: Count = 5
    """Epochs without a better validation figure (`select`) after which the learning rate is decayed."""
    decay_factor: Share = 0.1
    """Factor of that decay."""
    stop_patience: Count = 10
    """Epochs without a better validation figure (`select`) after which training stops."""
    select: Literal["val_loss", "val_recall"] = "val_loss"
    """The figure of the val split that chooses best.pt and drives schedule and early stop: the loss, as the paper, or
    the k-way Recall@1 of both ways."""
    select_k: FromTwo = 5
    """k of that Recall@1, by which searches and tables choose as well."""
    val_loss: Annotated[Literal["i2t_sym", "i2t"], ReadWhen("loss.base", unless=("fine_grained",))] = "i2t_sym"
    """The validation loss, each term with weight 1: image to text and text to image, or (authors' code) the first."""
    passes: Annotated[Literal["one", "two"], ReadWhen("model.image.trainable", True)] = "one"
    """The images of a batch and of its drawn neighbors go through the backbone together, or (authors' code) one after
    the other, so that batch normalisation takes the statistics of each."""
    horizontal_flip: bool = True
    """Mirror each train image with probability 1/2."""
    precision: Annotated[Literal["float32", "tf32", "bf16"], Shapes(RUN, IMAGE_FEATURES)] = "float32"
    """tf32 (GPU only) rounds the factors of products to 10 bits; bf16 runs the model, not the loss, in autocast: on a
    CPU twice as fast where it has AVX-512 BF16 or AMX, and several times slower where not."""
    compile: Annotated[bool, Shapes(), WITH_PIXELS] = False
    """Compile the image backbone with torch.compile, which takes minutes and a C++ compiler, and then a step less time.
    Results agree within rounding only, and with dropout in the backbone within the draw of it."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Shapes()] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    workers: Annotated[Natural | None, Shapes()] = None
    """Processes that read images; null takes one a core."""
    pixel_cache: Annotated[Literal["auto", "raw", "jpeg", "none"], WITH_PIXELS] = "auto"
    """Decode images once: into an array of pixels, the same to the last bit, into JPEG shards, which take a fifth to a
    tenth of the room, or never; auto takes the first of these for which there is room."""
    pixel_cache_gb: Annotated[Positive, Shapes(), ReadWhen("training.pixel_cache", "auto")] = 20.0
    """Gigabytes that a cache may take, if the disk has them (auto)."""
    log_every: Annotated[Count, Shapes()] = 10
    """Steps between two points of the training curves."""
    show_results_every: Annotated[Natural, Shapes()] = 5
    """Epochs between two panels of retrieval results in TensorBoard, of val queries; 0 shows none, and no distances."""
    checkpoint_minutes: Annotated[Positive, Shapes()] = 2.0
    """Minutes from one checkpoint to the next. The end of training, Ctrl-C and SIGTERM write one too."""
    max_unreadable_share: Annotated[Rate, Shapes()] = 0.01
    """Share of the images that may have become unreadable since step 0: Above it, training stops."""


class Evaluation(Section):
    """What is measured on the test split (step 5)."""

    split: Literal["test", "val"] = "test"
    """Split to measure on."""
    kway: Annotated[list[FromTwo], Field(min_length=1)] = Field(default_factory=lambda: [5, 20])
    """k of the k-way Recall@1."""
    recall_at: Annotated[list[Count], Field(min_length=1)] = Field(default_factory=lambda: [1, 5, 10])
    """K of the full-gallery Recall@K."""
    preservation_k: Count = 200
    """Neighbors compared by neighborhood preservation, beside 1 % of the gallery."""
    bootstrap: Count = 1000
    """Resamples of the 95 % intervals."""
    expand: NotNegative = 0.0
    """Move embeddings towards the texts, or images, of their nearest train pairs, with this weight; 0 does not."""
    expand_neighbors: Annotated[Count, ReadWhen("evaluation.expand", unless=(0,))] = 10
    """Nearest train pairs of an item whose mean it moves towards."""
    projector_pairs: Annotated[int, Field(ge=0, le=4000)] = 200
    """Pairs whose images and texts TensorBoard's projector shows; 0 writes nothing for it."""
    batch_size: Annotated[Count, Shapes()] = 256
    """Images or texts embedded at a time."""


class Tuning(Section):
    """The search for the loss weights."""

    trials: Count = 30
    """Trainings for the baseline's weight, and as many for the method's three."""


class Settings(Section):
    """All settings."""

    seed: Annotated[int, Field(ge=0, lt=2**32), Shapes(PREPARE, DOC2VEC, VECTORS, NEIGHBORS, SIAMESE, RUN)] = 0
    """Seeds all that is random."""
    deterministic: Annotated[bool, Shapes(DOC2VEC, NEIGHBORS, SIAMESE, RUN)] = False
    """The same files bit for bit from the same command on the same machine; costs cores in steps 1 and 3."""
    work: PathText | None = None
    """Folder of everything written; null is work/<dataset.name>."""
    features: PathText | None = None
    """Folder of cached image features; null is <work>/features. Splits that keep the same images can share it."""
    dataset: Annotated[Dataset, Shapes(PREPARE)] = Dataset()
    text: Annotated[Text, Shapes(DOC2VEC, VECTORS, RUN)] = Text()
    doc2vec: Annotated[Doc2Vec, Shapes(DOC2VEC, VECTORS, RUN)] = Doc2Vec()
    neighbors: Annotated[Neighbors, Shapes(NEIGHBORS, RUN)] = Neighbors()
    model: Annotated[Model, Shapes(RUN)] = Model()
    loss: Annotated[Loss, Shapes(RUN)] = Loss()
    siamese: Annotated[Siamese, Shapes(SIAMESE, RUN)] = Siamese()
    training: Annotated[Training, Shapes(RUN)] = Training()
    evaluation: Annotated[Evaluation, Shapes(EVALUATION)] = Evaluation()
    tuning: Tuning = Tuning()

    @property
    def work_folder(self) -> Path:
        """WORK, the folder that every step reads from and writes to."""
        return Path(self.work) if self.work else Path("work") / (self.dataset.name or self.dataset.source)

    @property
    def features_folder(self) -> Path:
        """Folder of cached features."""
        return Path(self.features) if self.features else self.work_folder / "features"
