"""The paper's Tables 1 to 4 and ours: their methods, how each is trained, and the paper's values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.schema import ANGULAR, TRIPLET, Evaluation

if TYPE_CHECKING:
    from metrics import Metric


@dataclass(frozen=True, eq=False)
class Method:
    """A row of a table: the loss weights and settings of a method."""

    name: str
    weights: tuple[float, float, float]
    settings: Mapping[str, str] = field(default_factory=dict)
    choices: tuple[Mapping[str, str], ...] = ({},)
    """Alternatives; each seed takes the one with the highest Recall@1 on the validation split."""
    evaluations: tuple[Mapping[str, str], ...] = ({},)
    """Alternatives of evaluation settings, such as {"evaluation.expand": "0.5"}; each seed takes the one with the best
    k-way Recall@1 on the validation split. Rows that differ in nothing else share their training."""
    tuned: str | None = None
    """The search of tune_loss_weights.py whose weights each seed takes in place of `weights`."""
    several_texts: bool = False
    """Whether the method needs images with several texts. Without any it is left out."""
    trials: "Method | None" = None
    """A method whose `choices` are tried once, on a seed that no table has; the row takes the best one's settings."""


HINGE = {"loss.form": "hinge"}
HINGE_CHOICES = tuple({"loss.tan_squared_alpha": t} for t in ("0.05", "0.1", "0.2", "0.3"))

ANG = Method("ANG+NP+SYM", (1, 0, 0))
OURS = Method("OURS", ANGULAR)
IMG_NNS = Method("OURS (Img NNs)", ANGULAR, {"neighbors.space": "images"})
CONTROL = Method("OURS (random pairs, control)", ANGULAR, {"neighbors.draw": "anywhere"})
IN_BATCH = Method("OURS (neighborhood batches)", ANGULAR, {"training.batches": "neighborhoods"})
ANG_HINGE = Method("ANG+NP+SYM (hinge)", (1, 0, 0), HINGE, HINGE_CHOICES)
OURS_HINGE = Method("OURS (hinge)", ANGULAR, HINGE, HINGE_CHOICES)
TRIP = Method("TRIP+NP+SYM", (1, 0, 0), {"loss.base": "triplet"})
OURS_TRIP = Method("OURS (TRIP)", TRIPLET, {"loss.base": "triplet"})
STRUC, LAMBDA = {"loss.base": "struc"}, 0.1
STRUC_GT = Method("STRUC (GT, Text)", (1, 0, LAMBDA), STRUC | {"loss.structure": "ground_truth"}, several_texts=True)
STRUC_TEXT = Method("STRUC (NN, Text)", (1, 0, LAMBDA), STRUC)
STRUC_IMG = Method("STRUC (NN, Img)", (1, LAMBDA, 0), STRUC)
POLYSEMOUS = {"model.pvse.embeddings": "2"}
PVSE = Method("PVSE", (1, 0, 0), POLYSEMOUS)
PVSE_OURS = Method("PVSE + OURS", ANGULAR, POLYSEMOUS)
ANG_TUNED = Method("ANG+NP+SYM (tuned)", (1, 0, 0), tuned="baseline")
OURS_TUNED = Method("OURS (tuned)", ANGULAR, tuned="method")
WITHOUT_TEXT = Method("OURS (ANG) - L_text", (1, 0.3, 0))
WITHOUT_IMG = Method("OURS (ANG) - L_img", (1, 0, 0.2))

# Sentence encoders; `{sentences}` stands for the one that --sentences names. Every row has the same number of trials.
RATES = tuple({"training.learning_rate": rate} for rate in ("0.0003", "0.001", "0.003"))
WORDS = {"model.text.encoder": "bag_of_words"}
SENTENCES = {"model.text.encoder": "sentence_transformers:{sentences}"}
IN_SENTENCES = {"neighbors.space": "sentences:{sentences}"}
BY_WORDS = Method("words, ANG+NP+SYM", (1, 0, 0), WORDS, RATES)
BY_WORDS_OURS = Method("words, OURS (Doc2Vec)", ANGULAR, WORDS, RATES)
BY_WORDS_SENTENCES = Method("words, OURS (sentences)", ANGULAR, WORDS | IN_SENTENCES, RATES)
BY_SENTENCES = Method("sentences, ANG+NP+SYM", (1, 0, 0), SENTENCES, RATES)
BY_SENTENCES_OURS = Method("sentences, OURS (Doc2Vec)", ANGULAR, SENTENCES, RATES)
BY_SENTENCES_SENTENCES = Method("sentences, OURS (sentences)", ANGULAR, SENTENCES | IN_SENTENCES, RATES)

# Xu et al. (2019). Methods with a dagger are given the categories in training.
PAIRWISE = Method("Pairwise †", (0, 0, 0), {"loss.base": "fine_grained", "loss.labels": "equal"})
FINE_GRAINED = Method("Pairwise, fine-grained labels †", (0, 0, 0), {"loss.base": "fine_grained"})
FINE_GRAINED_OURS = Method(
    "Pairwise, fine-grained labels, L_img, L_text †", (0, *ANGULAR[1:]), {"loss.base": "fine_grained"}
)


# Beyond the paper. Rows of one kind and one rule of stopping share their optimisation: the best of eight trials.
EPOCHS = {"training.max_epochs": "60"}
BY_LOSS, BY_RECALL = EPOCHS | {"training.select": "val_loss"}, EPOCHS | {"training.select": "val_recall"}


def grid(name: str, values: tuple[str, str], fixed: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    """Two values of a setting, each with four learning rates."""
    rates = ("0.0001", "0.0003", "0.001", "0.003")
    return tuple({**fixed, name: value, "training.learning_rate": rate} for value in values for rate in rates)


NOT_REGULARISED = grid("model.text.dropout", ("0.0", "0.2"), {"model.image.dropout": "0.0"})
REGULARISED = grid("model.image.dropout", ("0.5", "0.7"), {"model.text.dropout": "0.5"})
DROPOUT = {"model.image.dropout": "0.7", "model.text.dropout": "0.5"}
WITH_INFONCE = grid("loss.temperature", ("0.05", "0.1"), DROPOUT)
BOTH, SOFT, INFONCE = {"neighbors.space": "both"}, {"loss.soft_targets": "0.5"}, {"loss.base": "infonce"}
EXPAND = tuple({"evaluation.expand": weight} for weight in ("0", "0.25", "0.5", "1"))


def beyond_the_paper(rule: Mapping[str, str], name: str) -> tuple[Method, ...]:
    """Twelve rows with one rule of stopping, which `name` names."""
    plain = Method(f"not regularised, {name}", (1, 0, 0), rule, NOT_REGULARISED)
    regular = Method(f"regularised, {name}", (1, 0, 0), rule, REGULARISED)
    infonce = Method(f"InfoNCE, {name}", (1, 0, 0), {**rule, **INFONCE}, WITH_INFONCE)

    def row(
        title: str,
        trials: Method,
        settings: Mapping[str, str],
        weights: tuple[float, float, float] = (1, 0, 0),
        evaluations: tuple[Mapping[str, str], ...] = ({},),
    ) -> Method:
        return Method(f"{title} ({name})", weights, {**trials.settings, **settings}, ({},), evaluations, trials=trials)

    return (
        row("ANG+NP+SYM", plain, {}),
        row("OURS", plain, {}, ANGULAR),
        row("OURS, both spaces", plain, BOTH, ANGULAR),
        row("soft targets, both spaces", plain, BOTH | SOFT),
        row("soft targets, random pairs", plain, {"neighbors.draw": "anywhere"} | SOFT),
        row("regularised", regular, {}),
        row("regularised + OURS", regular, {}, ANGULAR),
        row("regularised + soft targets", regular, BOTH | SOFT),
        row("regularised + expansion", regular, {}, evaluations=EXPAND),
        row("regularised + soft targets + expansion", regular, BOTH | SOFT, evaluations=EXPAND),
        row("regularised InfoNCE", infonce, {}),
        row("regularised InfoNCE + soft targets", infonce, BOTH | SOFT),
    )


LOSS_ROWS, RECALL_ROWS = beyond_the_paper(BY_LOSS, "loss"), beyond_the_paper(BY_RECALL, "recall")


@dataclass(frozen=True)
class Table:
    """A table: groups of rows. The first row of a group is the baseline of the others."""

    number: int
    title: str
    groups: tuple[tuple[Method, ...], ...]
    family: str | tuple[str, ...]
    """The columns: a line of metrics.METRICS, or some metrics by their names without the direction."""
    underlined: tuple[str, ...] = ()
    """Methods of which the best is underlined."""
    contrasts: tuple[tuple[Method, Method], ...] = ()
    """Further comparisons, of a method with another."""
    note: str = ""
    """What the reader must know of the rows."""

    def columns(self, evaluation: Evaluation) -> list["Metric"]:
        """The metrics of the columns, those of different directions side by side."""
        from metrics import registered  # late: it imports torch, which a mistake in a flag need not wait for

        if isinstance(self.family, str):
            columns = list(registered(evaluation, self.family).values())
        else:
            columns = [metric for metric in registered(evaluation).values() if metric.key in self.family]
        keys = list(dict.fromkeys(metric.key for metric in columns))
        return sorted(columns, key=lambda metric: keys.index(metric.key))


RETRIEVAL = "kway_recall_at_1"
TABLES = {
    1: Table(
        1,
        "Retrieval",
        ((ANG, IMG_NNS, OURS, CONTROL), (PVSE, PVSE_OURS), (ANG_HINGE, OURS_HINGE), (TRIP, OURS_TRIP)),
        RETRIEVAL,
        contrasts=((OURS, CONTROL), (OURS, IMG_NNS)),
    ),
    2: Table(
        2,
        "Structure",
        ((OURS_TRIP, STRUC_GT, STRUC_TEXT, STRUC_IMG),),
        RETRIEVAL,
        underlined=(OURS_TRIP.name, STRUC_TEXT.name, STRUC_IMG.name),  # those that need no images with several texts
    ),
    3: Table(
        3,
        "Neighborhood preservation",
        ((TRIP, OURS_TRIP), (ANG, OURS)),
        "preservation",
    ),
    4: Table(
        4,
        "Ablation",
        ((OURS, WITHOUT_TEXT, WITHOUT_IMG),),
        RETRIEVAL,
        underlined=(WITHOUT_TEXT.name, WITHOUT_IMG.name),
    ),
    5: Table(
        5,
        "Fine-grained labels (Xu et al. 2019)",
        ((PAIRWISE, FINE_GRAINED, FINE_GRAINED_OURS), (ANG, OURS)),
        "map",
        contrasts=((FINE_GRAINED_OURS, FINE_GRAINED),),
        note="† is trained with the categories of the train pairs, by which mAP judges; the others are not.",
    ),
    6: Table(
        6,
        "Tuned weights",
        ((ANG, OURS), (ANG_TUNED, OURS_TUNED)),
        RETRIEVAL,
        contrasts=((OURS_TUNED, OURS), (ANG_TUNED, ANG)),
    ),
    7: Table(7, "Neighborhood batches", ((ANG, OURS, IN_BATCH),), RETRIEVAL, contrasts=((IN_BATCH, OURS),)),
    8: Table(
        8,
        "Sentence encoders",
        (
            (BY_WORDS, BY_WORDS_OURS, BY_WORDS_SENTENCES),
            (BY_SENTENCES, BY_SENTENCES_OURS, BY_SENTENCES_SENTENCES),
        ),
        ("5way_recall_at_1", "20way_recall_at_1", "recall_at_1"),
        contrasts=(
            (BY_WORDS_SENTENCES, BY_WORDS_OURS),
            (BY_SENTENCES_SENTENCES, BY_SENTENCES_OURS),
            (BY_SENTENCES, BY_WORDS),
            (BY_SENTENCES_OURS, BY_WORDS_OURS),
            (BY_SENTENCES_SENTENCES, BY_WORDS_SENTENCES),
        ),
        note="The text stream, then the loss and the space of its neighbors. Each row and seed takes the learning rate "
        "of three with the highest Recall@1 on the validation split.",
    ),
    9: Table(
        9,
        "Beyond the paper",
        (LOSS_ROWS, RECALL_ROWS),
        ("5way_recall_at_1", "20way_recall_at_1", "preservation_1_percent"),
        contrasts=(
            (RECALL_ROWS[0], LOSS_ROWS[0]),
            (RECALL_ROWS[3], RECALL_ROWS[4]),
            *((RECALL_ROWS[number], RECALL_ROWS[5]) for number in (6, 7, 8, 9, 10)),
            (RECALL_ROWS[11], RECALL_ROWS[10]),
            (LOSS_ROWS[6], LOSS_ROWS[5]),
        ),
        note="In brackets: what chooses the epoch, the validation loss or the 5-way Recall@1 of the validation split. "
        "OURS has the paper's weights 1 0.3 0.2. Both spaces: neighbors by texts and images. Each row of a kind (not "
        "regularised, regularised, InfoNCE) and rule has the optimisation that is best for the kind's baseline, of "
        "eight trials on the validation split of a seed of its own.",
    ),
}
OF_THE_PAPER = [1, 2, 3, 4]

# The paper's values by table, dataset and method, in the order of the columns: image to text, text to image; in Table 3
# images, texts.
PAPER: dict[int, dict[str, dict[str, tuple[float, float]]]] = {
    1: {
        "politics": {
            "ANG+NP+SYM": (0.6270, 0.6216),
            "OURS (Img NNs)": (0.6370, 0.6378),
            "OURS": (0.6467, 0.6492),
            "PVSE": (0.6246, 0.6199),
            "PVSE + OURS": (0.6264, 0.6314),
            "TRIP+NP+SYM": (0.4742, 0.4801),
            "OURS (TRIP)": (0.4940, 0.4877),
        },
        "goodnews": {
            "ANG+NP+SYM": (0.8704, 0.8728),
            "OURS (Img NNs)": (0.8840, 0.8852),
            "OURS": (0.8849, 0.8865),
            "PVSE": (0.8724, 0.8709),
            "PVSE + OURS": (0.8867, 0.8864),
            "TRIP+NP+SYM": (0.7203, 0.7216),
            "OURS (TRIP)": (0.7390, 0.7378),
        },
        "conceptual_captions": {
            "ANG+NP+SYM": (0.7687, 0.7695),
            "OURS (Img NNs)": (0.7636, 0.7666),
            "OURS": (0.7760, 0.7835),
            "PVSE": (0.7746, 0.7809),
            "PVSE + OURS": (0.7865, 0.7924),
            "TRIP+NP+SYM": (0.5413, 0.5332),
            "OURS (TRIP)": (0.5386, 0.5394),
        },
        "coco": {
            "ANG+NP+SYM": (0.6976, 0.6964),
            "OURS (Img NNs)": (0.6819, 0.6876),
            "OURS": (0.6900, 0.6885),
            "PVSE": (0.6878, 0.6892),
            "PVSE + OURS": (0.6932, 0.6925),
            "TRIP+NP+SYM": (0.4957, 0.4746),
            "OURS (TRIP)": (0.4790, 0.4611),
        },
        "flickr30k": {  # Sec. 4.3: the k of these is not given
            "PVSE": (0.5539, 0.5405),
            "PVSE + OURS": (0.5559, 0.5419),
        },
    },
    2: {
        "coco": {
            "OURS (TRIP)": (0.4790, 0.4611),
            "STRUC (GT, Text)": (0.4817, 0.4867),
            "STRUC (NN, Text)": (0.4635, 0.4594),
            "STRUC (NN, Img)": (0.4752, 0.4604),
        },
    },
    3: {
        "goodnews": {
            "TRIP+NP+SYM": (0.1183, 0.1294),
            "OURS (TRIP)": (0.1327, 0.1426),
            "ANG+NP+SYM": (0.1032, 0.1131),
            "OURS": (0.1270, 0.1376),
        },
        "politics": {
            "TRIP+NP+SYM": (0.1135, 0.1311),
            "OURS (TRIP)": (0.1319, 0.1483),
            "ANG+NP+SYM": (0.1199, 0.1544),
            "OURS": (0.1386, 0.1703),
        },
    },
    4: {
        "goodnews": {
            "OURS": (0.8849, 0.8865),
            "OURS (ANG) - L_text": (0.8786, 0.8813),
            "OURS (ANG) - L_img": (0.8782, 0.8817),
        },
        "politics": {
            "OURS": (0.6467, 0.6492),
            "OURS (ANG) - L_text": (0.6387, 0.6467),
            "OURS (ANG) - L_img": (0.6390, 0.6413),
        },
    },
}
