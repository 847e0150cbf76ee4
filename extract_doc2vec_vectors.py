"""Step 2: a Doc2Vec vector and a sequence of word numbers for every text of every split (Sec. 3.2).

    python extract_doc2vec_vectors.py [--config FILE.yaml] [--doc2vec.inference_epochs 50] ...

Reads pairs.parquet and step 1's outputs in WORK. Writes into WORK/doc2vec vectors.npy (float32, pairs x dimensions),
and tokens.npy (int32, the words of all texts one after the other) with offsets.npy (int64, pairs + 1: where each text
begins in it). A text without a known word has a zero vector and no tokens; later steps pass over it.
"""

import numpy as np
from tqdm import tqdm

from artifacts import (
    EXTRACT_DOC2VEC,
    PREPARE,
    TRAIN_DOC2VEC,
    is_up_to_date,
    making,
    require,
    write_array,
    written_whole,
)
from config import make_parser, parse_settings, run_script
from doc2vec import cores, embed_batches, text_batches
from pairs import SPLITS, read_pairs, rows_of_split

TEXTS_WORTH_A_PROCESS = 5000
"""A process takes two seconds to start, and places some 2,000 texts a second."""


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
        tokens = []
        offsets = np.zeros(len(pairs) + 1, dtype=np.int64)
        with (
            written_whole(folder / "vectors.npy") as beside,
            tqdm(total=len(pairs), desc="vectors", unit="text", disable=None) as progress,
        ):
            shape = (len(pairs), settings.doc2vec.vector_size)
            vectors = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=shape)
            start = 0
            for batch in embed_batches(settings, text_batches(work), processes):
                end = start + len(batch.vectors)
                vectors[start:end] = batch.vectors
                offsets[start + 1 : end + 1] = batch.lengths
                tokens.append(batch.tokens)
                start = end
                progress.update(len(batch.vectors))
            vectors.flush()
        np.cumsum(offsets, out=offsets)
        write_array(folder / "tokens.npy", np.concatenate(tokens))
        write_array(folder / "offsets.npy", offsets)

        lengths = np.diff(offsets)
        figures["texts"] = len(pairs)
        figures["texts_without_known_word"] = {
            split: int((lengths[rows_of_split(pairs, split)] == 0).sum()) for split in SPLITS
        }
        figures["mean_words"] = round(float((lengths[lengths > 0] - 2).mean()), 2)  # less <start> and <end>
        unknown = ", ".join(f"{count:,} of {split}" for split, count in figures["texts_without_known_word"].items())
        print(f"{len(pairs):,} texts of {figures['mean_words']} known words; without any: {unknown}")


if __name__ == "__main__":
    run_script(main)
