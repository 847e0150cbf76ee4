"""How many words a second Doc2Vec is trained on, from a file and from an iterable of documents.

    python benchmarks/doc2vec.py --work work/web_news [--epochs 5]
    python benchmarks/doc2vec.py --lines FILE
    python benchmarks/doc2vec.py --texts 200000

The first takes the texts of a prepared WORK folder, the second a text a line, the third makes texts up, with words
of a Zipf vocabulary (benchmarks/scale.py). Measured is an epoch of training, with as many workers as cores: of
doc2vec.train on the file that step 1 writes (gensim's corpus_file), and of gensim's Doc2Vec.train on documents in
memory (TaggedDocument). Vocabulary and settings are the same: PV-DBOW with negative sampling as in
configs/web_news.yaml, and the paper's PV-DM with hierarchical softmax. Words are counted as they stand in the file,
those rarer than min_count too.
"""

import argparse
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gensim.models.doc2vec import TaggedDocument
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # before this folder, whose doc2vec.py is another one

from scale import made_up_texts  # noqa: E402
from timing import Timing, machine, print_table, spread  # noqa: E402

from pipeline.processes import cores  # noqa: E402
from pipeline.schema import Settings  # noqa: E402
from pipeline.settings import load_settings  # noqa: E402
from text_space import doc2vec  # noqa: E402
from text_space.tokenizer import Tokenizer  # noqa: E402

CONFIGS = {"PV-DBOW, negative sampling": "web_news.yaml", "PV-DM, hierarchical softmax": "paper.yaml"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--work", type=Path, help="a prepared WORK folder whose texts are trained on")
    source.add_argument("--lines", type=Path, help="a file of texts, one a line")
    source.add_argument("--texts", type=int, default=20_000, help="texts to make up")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each training, after one that is not")
    arguments = parser.parse_args()
    logging.getLogger("gensim").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        for title, name in CONFIGS.items():
            settings = load_settings(ROOT / "configs" / name)
            settings.deterministic = False
            settings.doc2vec.epochs = arguments.epochs + 1
            if not corpus.is_file():  # both kinds read the same words
                texts = texts_of(arguments)
                settings.text.max_sentences = None  # whole texts
                lines = doc2vec.write_corpus(
                    texts, Tokenizer(settings.text, settings.dataset.language, {"language": "en"}), corpus
                )
            words, from_file, from_documents = measure(corpus, settings)
            faster = f"{from_documents.median / from_file.median:.1f} x"
            rows.append([title, speed(words, from_file), speed(words, from_documents), faster])
    print_table(["", "from a file", "from documents", "faster"], rows)
    source = arguments.work or arguments.lines
    name = source.name if source else "made up"
    print(f"\nWords a second, median (lowest .. highest); {lines:,} texts of {words:,} words ({name}). {machine()}")


def texts_of(arguments: argparse.Namespace) -> Iterator[str]:
    """The texts to train on, one after the other."""
    if arguments.work:
        return itertools.chain.from_iterable(doc2vec.text_batches(arguments.work))
    if arguments.lines:
        return iter(arguments.lines.read_text().splitlines())
    return made_up_texts(arguments.texts)


def measure(corpus: Path, settings: Settings) -> tuple[int, Timing, Timing]:
    """Words of the corpus, and the seconds of an epoch from the file and from documents, the first left out."""
    workers = 1 if settings.deterministic else cores()
    documents = [TaggedDocument(line.split(), [row]) for row, line in enumerate(corpus.read_text().splitlines())]
    words = sum(len(document.words) for document in documents)
    with tqdm(total=2 * settings.doc2vec.epochs, desc="training", unit="epoch", leave=False, disable=None) as progress:
        ends = []

        def ended() -> None:
            ends.append(time.perf_counter())
            progress.update()

        doc2vec.train(corpus, settings.doc2vec, settings.seed, workers, ended)
        from_file, ends = np.diff(ends), []
        model = doc2vec.untrained(corpus, settings.doc2vec, settings.seed, workers)
        for _ in range(settings.doc2vec.epochs):
            model.train(documents, total_examples=len(documents), total_words=words, epochs=1)
            ended()
    return words, spread(from_file.tolist()), spread(np.diff(ends).tolist())


def speed(words: int, seconds: Timing) -> str:
    """Words a second."""
    median, slowest, fastest = (words / each for each in (seconds.median, seconds.highest, seconds.lowest))
    return f"{median:,.0f} ({slowest:,.0f} .. {fastest:,.0f})"


if __name__ == "__main__":
    main()
