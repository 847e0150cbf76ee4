"""WORK, the folder of one dataset: the path of every file in it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

OUTPUTS: dict[str, tuple[str, ...]] = {
    "prepare_dataset.py": ("pairs.parquet", "rejected.jsonl", "articles.parquet"),
    "train_doc2vec.py": ("doc2vec/model", "doc2vec/vocabulary.txt", "doc2vec/word_vectors.npy", "doc2vec/punkt.json"),
    "extract_doc2vec_vectors.py": ("doc2vec/vectors.npy", "doc2vec/tokens.npy", "doc2vec/offsets.npy"),
    "extract_image_features.py": ("image_features/vectors.npy",),
    "knn_document_features.py": tuple(f"neighbors/{{space}}/{name}.npy" for name in ("rows", "indices", "distances")),
    "train_siamese_labels.py": ("siamese/vectors.npy", "siamese/comparison.npy"),
    "evaluate.py": tuple(
        f"{folder}/*/{name}"
        for folder in ("runs", "evaluations")
        for name in ("metrics.json", "queries.parquet", "scores.parquet")
    ),
}
"""Which script writes which files in WORK. `{space}` stands for the `space_folder` of `neighbors.space`."""


def space_folder(space: str) -> str:
    """The name of a space's folder: that of the space or, where it names a file or an encoder, with a digest of it."""
    kind, _, named = space.partition(":")
    if not named:
        return space
    return f"{kind}-{Path(named).stem}-{hashlib.sha256(named.encode()).hexdigest()[:8]}"


EVALUATIONS = "evaluations"
"""The folder in a run's with evaluations that have a name of their own."""
UNFINISHED = ".unfinished"
"""The folder in WORK with what steps that were stopped have done."""


def run_of(evaluation: Path) -> Path:
    """The run whose figures are in a folder: the folder itself, or the run that a named evaluation is of."""
    return evaluation.parents[1] if evaluation.parent.name == EVALUATIONS else evaluation


def _script_of(path: Path) -> str | None:
    """Which script writes a file in WORK, or has it as its stamp."""
    for script, names in OUTPUTS.items():
        stamp = f"{script.removesuffix('.py')}.json"
        if path.name == stamp or any(path.match(name.replace("{space}", "*")) for name in names):
            return script
    return None


def stamp_of(path: Path) -> Path | None:
    """The stamp beside a file in WORK, which says how the file was written; None where the file has none."""
    script = _script_of(path)
    return None if script is None else path.with_name(f"{script.removesuffix('.py')}.json")


def remedy(path: Path) -> str:
    """How to get a broken file of WORK anew, as the end of a message. What has no fingerprint has to be removed."""
    if UNFINISHED in path.parts:
        folder = next(parent for parent in path.parents if parent.parent.name == UNFINISHED)
        return f"; remove {folder} to start anew"
    if script := _script_of(path):
        return f"; remove it and run {script} again"
    return "; remove it and train the run with --overwrite again" if path.parent.parent.name == "runs" else ""


@dataclass(frozen=True)
class NeighborFiles:
    """The neighbor table of one space: `rows`, `indices` and `distances`."""

    folder: Path

    @property
    def rows(self) -> Path:
        """(R,) int32, the train pairs."""
        return self.folder / "rows.npy"

    @property
    def indices(self) -> Path:
        """(R, k) int32, pair numbers, the nearest first, -1 where there are fewer."""
        return self.folder / "indices.npy"

    @property
    def distances(self) -> Path:
        """(R, k) float32."""
        return self.folder / "distances.npy"


@dataclass(frozen=True)
class Work:
    """Every path in WORK. N pairs, d dimensions of Omega."""

    folder: Path

    @property
    def pairs(self) -> Path:
        """The pair table, a row a pair."""
        return self.folder / "pairs.parquet"

    @property
    def rejected(self) -> Path:
        """Published rows that were left out, and why."""
        return self.folder / "rejected.jsonl"

    @property
    def articles(self) -> Path:
        """Articles to train Doc2Vec on, where the dataset has some."""
        return self.folder / "articles.parquet"

    @property
    def published(self) -> Path:
        """Published files that step 0 fetches or draws."""
        return self.folder / "published"

    @property
    def doc2vec_model(self) -> Path:
        """gensim's model."""
        return self.folder / "doc2vec" / "model"

    @property
    def punkt(self) -> Path:
        """Parameters of the sentence splitter."""
        return self.folder / "doc2vec" / "punkt.json"

    @property
    def vocabulary(self) -> Path:
        """A word a line, in index order."""
        return self.folder / "doc2vec" / "vocabulary.txt"

    @property
    def word_vectors(self) -> Path:
        """(V, d) float32, aligned with the vocabulary."""
        return self.folder / "doc2vec" / "word_vectors.npy"

    @property
    def vectors(self) -> Path:
        """(N, d) float32, Omega of every text."""
        return self.folder / "doc2vec" / "vectors.npy"

    @property
    def tokens(self) -> Path:
        """(T,) int32, the words of all texts, one after the other."""
        return self.folder / "doc2vec" / "tokens.npy"

    @property
    def offsets(self) -> Path:
        """(N + 1,) int64, where each text begins in the tokens."""
        return self.folder / "doc2vec" / "offsets.npy"

    @property
    def image_vectors(self) -> Path:
        """(N, F) float32, pretrained features of each pair's image."""
        return self.folder / "image_features" / "vectors.npy"

    def neighbors(self, space: str) -> NeighborFiles:
        """The neighbor table in a space, such as `doc2vec`."""
        return NeighborFiles(self.folder / "neighbors" / space_folder(space))

    @property
    def siamese_vectors(self) -> Path:
        """(N, D) float32, the siamese network's vector of every text."""
        return self.folder / "siamese" / "vectors.npy"

    @property
    def siamese_comparison(self) -> Path:
        """(D + 1,) float32, weights and bias of the siamese comparison."""
        return self.folder / "siamese" / "comparison.npy"

    @property
    def runs(self) -> Path:
        """Trained runs, a folder each."""
        return self.folder / "runs"

    @property
    def tuning(self) -> Path:
        """Searches for loss weights."""
        return self.folder / "tuning"

    @property
    def reports(self) -> Path:
        """Reports about runs."""
        return self.folder / "reports"

    def unfinished(self, step: str) -> Path:
        """What a step that was stopped has done so far."""
        return self.folder / UNFINISHED / step
