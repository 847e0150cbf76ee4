"""Step 1: train Doc2Vec, the text space in which texts have neighbors, on the texts of the train split (Sec. 3.2, 3.3).

    python train_doc2vec.py [--config FILE.yaml] [--doc2vec.epochs 50] ...

Reads pairs.parquet, or articles.parquet, in WORK. Writes into WORK/doc2vec the sentence splitter's parameters
(punkt.json), gensim's model (model), the vocabulary in index order (vocabulary.txt) and word vectors aligned with it
(word_vectors.npy), from which step 4 starts its text encoder.
"""

import itertools
import time
from collections.abc import Iterable

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.errors import UserError
from pipeline.files import write_array, write_json, write_text, written_whole
from pipeline.processes import cores
from pipeline.progress import ProgressBar
from pipeline.steps import PREPARE, TRAIN_DOC2VEC, is_up_to_date, making, require


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__, "doc2vec", "text"), argv)
    # gensim takes a second to import: a wrong flag is reported first.
    from pipeline.pairs import read_pairs, rows_of_split
    from text_space.doc2vec import epochs_kept, save_model, start_word_vectors, text_batches, train, write_corpus
    from text_space.tokenizer import SPECIAL_WORDS, Tokenizer, stop_words, train_punkt
    from text_space.verdict import FEW_KNOWN_WORDS, better_min_count

    require(PREPARE, settings)
    if is_up_to_date(TRAIN_DOC2VEC, settings):
        return
    work = settings.work_folder
    table = "articles.parquet" if settings.doc2vec.train_on == "articles" else "pairs.parquet"
    count = len(rows_of_split(read_pairs(work, ["split"], table), "train"))
    if not count:
        raise UserError(f"{work / table} has no text of the train split; run prepare_dataset.py again")

    def train_texts(doing: str) -> ProgressBar:
        texts = itertools.chain.from_iterable(text_batches(work, "train", table=table))
        return ProgressBar(texts, desc=doing, total=count, unit="text")

    with making(TRAIN_DOC2VEC, settings) as figures:
        # Punkt learns from the texts: its published parameters would have to be downloaded.
        texts: Iterable[str] = train_texts("sentence ends") if settings.text.max_sentences else []
        punkt = train_punkt(texts, settings.dataset.language)
        write_json(figures.new.punkt, punkt)
        tokenizer = Tokenizer(settings.text, settings.dataset.language, punkt)
        if settings.text.stop_words and not stop_words(tokenizer.language):
            print(f"no stop words are known for language {tokenizer.language}: none are dropped")

        # gensim trains three times as fast from a file as from Python's objects.
        corpus = figures.unfinished / "corpus.txt"
        with_words = write_corpus(train_texts("words"), tokenizer, corpus, resume=True)
        with ProgressBar(total=settings.doc2vec.epochs, desc="Doc2Vec", unit="epoch") as progress:
            epochs, started = settings.doc2vec.epochs - epochs_kept(figures.unfinished), time.monotonic()
            workers, unfinished = 1 if settings.deterministic else cores(), figures.unfinished
            model = train(corpus, settings.doc2vec, settings.seed, workers, progress.update, unfinished)
            seconds = time.monotonic() - started

        with written_whole(figures.new.doc2vec_model) as temporary:
            save_model(model, temporary)
        write_text(figures.new.vocabulary, "\n".join([*SPECIAL_WORDS, *model.wv.index_to_key]) + "\n")
        write_array(figures.new.word_vectors, start_word_vectors(model, settings.seed))

        figures |= {"texts": count, "texts_without_words": count - with_words}
        figures["words"] = model.corpus_total_words
        figures["vocabulary"] = len(model.wv)
        known = sum(model.wv.get_vecattr(word, "count") for word in model.wv.index_to_key)
        figures["known_share"] = round(known / figures["words"], 4)
        figures["words_per_second"] = round(model.corpus_total_words * epochs / seconds)
        print(
            f"{count:,} texts ({count - with_words:,} without a word), {figures['words']:,} words, a vocabulary of "
            f"{figures['vocabulary']:,} that knows {figures['known_share']:.2f} of them; "
            f"{figures['words_per_second']:,} words a second"
        )
        if figures["known_share"] < FEW_KNOWN_WORDS:
            with corpus.open(encoding="utf-8") as texts_as_words:
                smaller, share = better_min_count(texts_as_words, settings.doc2vec.min_count)
            if smaller < settings.doc2vec.min_count:
                print(f"doc2vec.min_count {smaller} would know {share:.2f} of the words")


if __name__ == "__main__":
    run_script(main, then="extract_doc2vec_vectors.py")
