"""Step 0: turn a dataset as its owners publish it into the table of image-text pairs that all other steps read.

    python prepare_dataset.py [--config FILE.yaml] [--dataset.source openclipart|coco|manifest|...] ...

In: the published files. dataset.source names their format, dataset.root their folder.
Out, in WORK:

- pairs.parquet: one row a pair with its split, in the published order,
- rejected.jsonl: every published row that is left out, and why,
- articles.parquet: articles to train Doc2Vec on, where the dataset has some,
- prepare_dataset.json: the counts.

Left out are

- broken rows, and rows whose image is missing or unreadable,
- repeated rows,
- texts that nearly repeat another one, where splits are drawn (dataset.near_duplicates).

Splits are drawn by image, 80/10/10 of what is left, or taken as published (dataset.published_splits).
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.errors import UserError
from pipeline.pairs import SPLITS, distinct, write_articles, write_pairs
from pipeline.progress import ProgressBar
from pipeline.registry import READERS
from pipeline.steps import PREPARE, is_up_to_date, making
from pipeline.work import Work
from readers.rejections import Rejection
from readers.selection import (
    FEWEST_IMAGES,
    FEWEST_TO_SPLIT,
    assign_splits,
    conflicting_images,
    held_out_images,
    is_in_split,
    near_duplicate_texts,
    read_table,
    remaining,
    repeated_rows,
    unusable_images,
    with_splits,
    without_splits,
    write_rejected,
)


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__, "dataset"), argv)
    dataset, work = settings.dataset, Work(settings.work_folder)
    published = READERS.load(dataset.source)(dataset, work.published, settings.seed)
    fingerprints = published.fingerprints()
    if is_up_to_date(PREPARE, settings, fingerprints):
        return

    with making(PREPARE, settings, fingerprints) as figures:
        table, rejected = read_table(published.rows(), dataset.min_characters or 0, dataset.follow_links)
        if not dataset.published_splits:
            table = without_splits(table)

        rejected |= unusable_images(table, rejected, published.root, dataset, figures.unfinished)
        rejected |= conflicting_images(table, rejected)
        rejected |= repeated_rows(table, rejected)
        has_splits = bool(is_in_split(table, SPLITS)[remaining(table, rejected)].any())
        if dataset.near_duplicates or (dataset.near_duplicates is None and not has_splits):
            rejected |= near_duplicate_texts(table, rejected, dataset, figures.unfinished)
        write_rejected(work.rejected, table, rejected)

        kept = table.filter(pa.array(remaining(table, rejected)))
        image_numbers, image_ids = distinct(kept["image_id"])
        published_splits = pc.index_in(kept["split"], pa.array(SPLITS)).to_numpy() if has_splits else None
        shares = dataset.val_share, dataset.test_share
        splits = assign_splits(image_numbers, image_ids, published_splits, settings.seed, *shares)
        figures |= summary(table, rejected, splits, image_numbers)
        print(as_text(figures), flush=True)
        for line in remedies(figures):
            print(line, flush=True)
        images_of = {name: len(np.unique(image_numbers[splits == number])) for number, name in enumerate(SPLITS)}
        demand_all_splits(figures, images_of, work.rejected)

        write_pairs(figures.new.pairs, with_splits(kept, splits), published.root)
        if published.articles:
            held_out = held_out_images(table, kept, splits)
            articles = ProgressBar(published.articles(held_out), desc="articles", unit="article")
            figures["articles"] = write_articles(figures.new.articles, articles)
            print(f"{figures['articles']:,} articles of train to train Doc2Vec on (doc2vec.train_on articles)")


# What is printed


def summary(
    table: pa.Table, rejected: dict[int, Rejection], splits: np.ndarray, images: np.ndarray
) -> dict[str, int | dict[str, int]]:
    """Counts: published rows, rejected ones by kind, kept ones, their images, and rows by split."""
    return {
        "published": len(table),
        "rejected": dict(Counter(why.kind for why in rejected.values()).most_common()),
        "kept": len(splits),
        "images": len(np.unique(images)),
        "splits": {name: int((splits == number).sum()) for number, name in enumerate(SPLITS)},
    }


def as_text(figures: dict) -> str:
    """The counts as a table to read."""
    lines = [("published rows", figures["published"])]
    lines += [(f"  {kind}", -count) for kind, count in figures["rejected"].items()]
    lines += [("kept rows", figures["kept"])]
    lines += [(f"  {name}", count) for name, count in figures["splits"].items()]
    lines += [("images of these", figures["images"])]
    return "\n".join(f"{name:28}{count:>12,}" for name, count in lines)


def remedies(figures: dict) -> list[str]:
    """What to do about each kind of rejected row that is more than a tenth of all, a line each."""
    several = [kind for kind, count in figures["rejected"].items() if 10 * count > figures["published"]]
    return [f"{kind}: {Rejection(kind, '').remedy}" for kind in several if not kind.endswith("duplicate")]


def demand_all_splits(figures: dict, images: dict[str, int], rejected: Path) -> None:
    """Raise UserError where a split has too little to train, validate or test on, and say where the rows went.

    `images` counts the images of each split.
    """
    empty = [name for name, count in figures["splits"].items() if not count]
    if not figures["published"]:
        raise UserError("the published files hold no rows; check --dataset.root and --dataset.manifest")
    lonely = [name for name in SPLITS if images[name] < FEWEST_IMAGES]
    if empty or lonely:
        what = f"no rows for {' and '.join(empty)}"
        if not empty:
            what = f"fewer than {FEWEST_IMAGES} images for {' and '.join(lonely)}"
        counts = ", ".join(f"{count} {kind}" for kind, count in figures["rejected"].items())
        left = f"of {figures['published']} published rows {figures['kept']} are left"
        where = f" ({rejected} names each, and what to do)" if counts else ""
        needed = (
            f"needed are {FEWEST_TO_SPLIT} images, {FEWEST_IMAGES} a split; for figures that mean something, hundreds"
        )
        raise UserError(f"{what}: {left}, rejected were: {counts or 'none'}{where}; {needed}")


if __name__ == "__main__":
    run_script(main, then="train_doc2vec.py")
