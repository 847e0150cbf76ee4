"""Step 2: a Doc2Vec vector and a sequence of word numbers for every text of every split (Sec. 3.2).

    python extract_doc2vec_vectors.py [--config FILE.yaml] [--doc2vec.inference_epochs 50] ...

Reads pairs.parquet and step 1's outputs in WORK. Writes into WORK/doc2vec vectors.npy (float32, pairs x dimensions),
and tokens.npy (int32, the words of all texts one after the other) with offsets.npy (int64, pairs + 1: where each text
begins in it). A text without a known word has a zero vector and no tokens; later steps pass over it.
"""

import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.files import move_into_place, open_array, read_array, read_json, write_array, write_json
from pipeline.pairs import SPLITS, read_pairs, rows_of_split
from pipeline.processes import cores
from pipeline.settings import Settings
from pipeline.steps import EXTRACT_DOC2VEC, PREPARE, TRAIN_DOC2VEC, is_up_to_date, making, require
from text_space.doc2vec import embed_batches, text_batches

TEXTS_WORTH_A_PROCESS = 5000
"""A process takes two seconds to start, and places some 2,000 texts a second."""


SAVE_EVERY = 20.0
"""Seconds after which what is done counts as done, should the step be stopped."""


def embed_all(settings: Settings, count: int, processes: int, unfinished: Path) -> None:
    """Vectors and words of WORK's `count` texts into files in `unfinished`, going on from what is there.

    `vectors.npy` (float32, count x d), `lengths.npy` (int64, count), `tokens.bin` (int32, bare), and in `done.json` how
    many texts and tokens of these are valid.
    """
    done_file, tokens_file = unfinished / "done.json", unfinished / "tokens.bin"
    resumed = done_file.is_file()
    done = read_json(done_file) if resumed else {"texts": 0, "tokens": 0}
    vectors = open_array(unfinished / "vectors.npy", (count, settings.doc2vec.vector_size), np.float32, resumed)
    lengths = open_array(unfinished / "lengths.npy", (count,), np.int64, resumed)
    texts = text_batches(settings.work_folder, skip=done["texts"])
    batches = embed_batches(settings, texts, processes, folder=unfinished)  # where a kill leaves nothing for long
    saved = time.monotonic()
    with (
        tokens_file.open("r+b" if resumed else "wb") as tokens,
        tqdm(total=count, initial=done["texts"], desc="vectors", unit="text", disable=None) as progress,
    ):
        tokens.truncate(done["tokens"] * np.dtype(np.int32).itemsize)
        tokens.seek(0, os.SEEK_END)
        for batch in batches:
            start, end = done["texts"], done["texts"] + len(batch.vectors)
            vectors[start:end], lengths[start:end] = batch.vectors, batch.lengths
            batch.tokens.tofile(tokens)
            done = {"texts": end, "tokens": done["tokens"] + len(batch.tokens)}
            if end == count or time.monotonic() - saved >= SAVE_EVERY:
                for part in (vectors, lengths, tokens):
                    part.flush()
                write_json(done_file, done)
                saved = time.monotonic()
            progress.update(len(batch.vectors))


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__), argv)
    require(PREPARE, settings)
    require(TRAIN_DOC2VEC, settings)
    if is_up_to_date(EXTRACT_DOC2VEC, settings):
        return
    work, folder = settings.work_folder, settings.work_folder / "doc2vec"
    pairs = read_pairs(work, ["split"])
    processes = min(cores(), 1 + len(pairs) // TEXTS_WORTH_A_PROCESS)

    with making(EXTRACT_DOC2VEC, settings) as figures:
        embed_all(settings, len(pairs), processes, figures.unfinished)
        tokens = np.fromfile(figures.unfinished / "tokens.bin", np.int32)
        write_array(folder / "tokens.npy", tokens)
        lengths = read_array(figures.unfinished / "lengths.npy")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        write_array(folder / "offsets.npy", offsets)
        move_into_place(figures.unfinished / "vectors.npy", folder / "vectors.npy")

        figures["texts"] = len(pairs)
        figures["texts_without_known_word"] = {
            split: int((lengths[rows_of_split(pairs, split)] == 0).sum()) for split in SPLITS
        }
        figures["mean_words"] = round(float((lengths[lengths > 0] - 2).mean()), 2)  # less <start> and <end>
        unknown = ", ".join(f"{count:,} of {split}" for split, count in figures["texts_without_known_word"].items())
        print(f"{len(pairs):,} texts of {figures['mean_words']} known words; without any: {unknown}")


if __name__ == "__main__":
    run_script(main, then="knn_document_features.py")
