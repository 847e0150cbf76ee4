"""Step 2: a Doc2Vec vector and a sequence of word numbers for every text of every split (Sec. 3.2).

    python extract_doc2vec_vectors.py [--config FILE.yaml] [--doc2vec.inference_epochs 50] ...

Reads pairs.parquet and step 1's outputs in WORK. Writes into WORK/doc2vec vectors.npy (float32, pairs x dimensions),
and tokens.npy (int32, the words of all texts one after the other) with offsets.npy (int64, pairs + 1: where each text
begins in it). A text without a known word has a zero vector and no tokens; later steps pass over it.
"""

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.steps import EXTRACT_DOC2VEC, PREPARE, TRAIN_DOC2VEC, is_up_to_date, making, require


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__, "doc2vec", "text"), argv)
    require(PREPARE, settings)
    require(TRAIN_DOC2VEC, settings)
    if is_up_to_date(EXTRACT_DOC2VEC, settings):
        return
    import numpy as np  # these and gensim take a second to import: a wrong flag is reported first

    from pipeline.files import read_array, write_array
    from pipeline.pairs import SPLITS, read_pairs, rows_of_split
    from text_space.inference import embed_all

    pairs = read_pairs(settings.work_folder, ["split"])

    with making(EXTRACT_DOC2VEC, settings) as figures:
        embed_all(settings, len(pairs), figures.unfinished, figures.new.vectors)
        tokens = np.fromfile(figures.unfinished / "tokens.bin", np.int32)
        write_array(figures.new.tokens, tokens)
        lengths = read_array(figures.unfinished / "lengths.npy")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        write_array(figures.new.offsets, offsets)

        figures["texts"] = len(pairs)
        figures["texts_without_known_word"] = {
            split: int((lengths[rows_of_split(pairs, split)] == 0).sum()) for split in SPLITS
        }
        figures["mean_words"] = round(float((lengths[lengths > 0] - 2).mean()), 2)  # less <start> and <end>
        unknown = ", ".join(f"{count:,} of {split}" for split, count in figures["texts_without_known_word"].items())
        print(f"{len(pairs):,} texts of {figures['mean_words']} known words; without any: {unknown}")


if __name__ == "__main__":
    run_script(main, then="knn_document_features.py")
