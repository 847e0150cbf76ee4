"""Step 3: the k nearest neighbors of every train pair, from which step 4 draws Psi of Eq. 5 (Sec. 3.2).

    python knn_document_features.py [--config FILE.yaml] [--neighbors.k 200] ...

Reads pairs.parquet and step 2's outputs in WORK. Writes into WORK/neighbors/<space> rows.npy (int32, the train pairs
whose text has a known word), indices.npy (int32, rows x k, pair numbers, nearest first, -1 where there are fewer) and
distances.npy (float32, rows x k, inf where there is none). The neighbors of `neighbors.space both` have the highest
z_text + z_image, cosines in either space standardised by row, and their distance is minus that sum
(text_space/points.py). Left out are the pair itself, pairs of its image, and pairs whose text has the same words.
Prints whether the neighbors can help.
"""

from typing import TYPE_CHECKING

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.errors import UserError
from pipeline.schema import Settings
from pipeline.steps import (
    EXTRACT_DOC2VEC,
    EXTRACT_IMAGES,
    FIND_NEIGHBORS,
    IMAGE_SPACES,
    PREPARE,
    TRAIN_DOC2VEC,
    is_up_to_date,
    making,
    require,
    what_changed,
)
from pipeline.work import Work

if TYPE_CHECKING:
    import numpy as np

    from text_space.spaces import Space

LARGEST_K_FILLED_UP = 10_000
"""A k above this, and above the number of texts, is a mistake that would only fill memory with -1."""


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__, "neighbors"), argv)
    from text_space.spaces import space_of  # these take a second to import: a mistake in a flag is told before

    for step in (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC):
        require(step, settings)
    space = space_of(settings)
    if not is_up_to_date(FIND_NEIGHBORS, settings, space.made_from):
        find_and_write(settings, Work(settings.work_folder), space)


def find_and_write(settings: Settings, work: Work, space: "Space") -> None:
    """Look up the neighbors of every train text, print what they are like, and write the table."""
    import numpy as np

    from pipeline.files import read_array
    from pipeline.pairs import SPLITS, distinct, numbered, read_pairs, rows_of_split
    from text_space.neighbors import find_neighbors
    from text_space.table import rows_of, same_words, show_texts, write_table
    from text_space.verdict import better_k

    k = settings.neighbors.k
    pairs = read_pairs(work.folder, ["image_id", "category", "split"])
    offsets, train = read_array(work.offsets), rows_of_split(pairs, "train")
    rows = train[np.diff(offsets)[train] > 0]
    demand_enough(len(rows), k, work)
    groups = (numbered(pairs["image_id"])[rows], same_words(read_array(work.tokens), offsets, rows))
    vectors, images = space.vectors(), space.images and space.images()

    with making(FIND_NEIGHBORS, settings, space.made_from) as figures:
        folder = figures.unfinished
        of_texts = rows_of(vectors, rows, folder / "train.npy")
        of_images = None if images is None else rows_of(images, rows, folder / "train_images.npy")
        chosen = settings.neighbors
        found, how = find_neighbors(of_texts, groups, chosen, settings.seed, settings.deterministic, folder, of_images)
        figures.update(rows=len(rows), train_pairs=len(train), **how)
        print(in_words(how, len(rows)))
        numbers, names = distinct(pairs["category"].fill_null(""))
        categories = np.where(np.array([name != "" for name in names])[numbers], numbers, -1)[rows]
        figures.update(verdict(settings, found.positions, categories, rows, groups[0]))
        lengths = np.diff(offsets)
        left = ", ".join(f"{(lengths[rows_of_split(pairs, split)] > 0).sum():,} of {split}" for split in SPLITS)
        print(f"pairs whose text has a known word: {left}")
        if smaller := better_k(k, len(rows)):
            print(f"neighbors.k is {k}, above a twentieth of the train texts; {smaller} would suit")
        show_texts(read_pairs(work.folder, ["text"])["text"], rows, found, settings.seed)
        write_table(figures.new.neighbors(settings.neighbors.space), rows, found)


def verdict(
    settings: Settings, positions: "np.ndarray", categories: "np.ndarray", rows: "np.ndarray", images: "np.ndarray"
) -> dict[str, float]:
    """Print whether the neighbors can help, and return the figures: by category, else by features of the images.

    positions: (R, k) of the neighbors. categories: (R,) numbers, -1 for none. rows: (R,) pair numbers. images: (R,)
    image numbers.
    """
    from pipeline.files import read_array
    from text_space.verdict import NEAR_IMAGES, agreement, by_category, by_images, category_share

    work, first, seed = Work(settings.work_folder), min(settings.neighbors.k, 20), settings.seed
    if found := agreement(positions[:, :first], by_category(categories), seed):
        share, chance = category_share(positions, categories)
        found = found._replace(share=share, chance=chance)
        name, said = "category", f"{share:.3f} of the {first} nearest texts have the text's category"
    elif settings.neighbors.space in IMAGE_SPACES:
        print("whether the neighbors can help is not known: images chose them, and the pairs have no categories")
        return {}
    elif what_changed(EXTRACT_IMAGES, settings) is None:
        found = agreement(positions[:, :2], by_images(read_array(work.image_vectors)[rows], images, seed), seed)
        if not found:
            return {}
        name, said = "images", f"{found.share:.3f} of the 2 nearest texts have an image among the nearest"
        said += f" {NEAR_IMAGES:.0%} of the text's own image"
    else:
        print("whether the neighbors can help is not known; extract_image_features.py, run before this step, tells it")
        return {}
    print(f"{said}; {found}")
    if not found.is_above_chance:
        print(
            "warning: that is no more than chance gives, so L_img and L_text cannot help; see the texts below, and "
            "change doc2vec.mode, doc2vec.epochs, doc2vec.min_count or neighbors.space"
        )
    interval = {f"{name}_chance_low": round(found.low, 4), f"{name}_chance_high": round(found.high, 4)}
    return {f"{name}_share": round(found.share, 4), f"{name}_chance": round(found.chance, 4), **interval}


def demand_enough(texts: int, k: int, work: Work) -> None:
    """Raise UserError where there are too few texts to have neighbors, or far fewer than k."""
    if texts < 2:
        raise UserError(
            f"{work.folder} has {texts} train texts with a known word, and neighbors take two; get more pairs"
        )
    if k > max(texts, LARGEST_K_FILLED_UP):
        raise UserError(f"neighbors.k is {k} and there are {texts} train texts; lower it")
    if k >= texts:
        print(f"neighbors.k is {k} and there are {texts} train texts: the table is filled up with -1")


def in_words(how: dict, texts: int) -> str:
    """How the neighbors were found."""
    if how["method"] == "exact":
        why = f": HNSW is no faster here, and found {how['recall']:.4f} of the neighbors" if "recall" in how else ""
        return f"exact search among {texts:,} texts{why}"
    return (
        f"HNSW by {how['library']} among {texts:,} texts, efSearch {how['ef_search']}\n"
        f"recall {how['recall']:.4f} against exact search, on {how['recall_sample']:,} of the texts"
    )


if __name__ == "__main__":
    run_script(main, then="train_cross_modal_retrieval_model.py 1 0.3 0.2")
