"""Batches: every pair once an epoch, neighbors drawn uniformly, flips and features that agree with pixels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from scipy import stats

from datasets import NeighborTable, OtherTexts, Prepared, load_prepared, plan_epoch
from images.loading import FeatureSource, ImageFiles, PixelSource, demand_readable, prefetch
from pipeline.errors import UserError
from pipeline.pairs import SCHEMA, Images, write_pairs
from pipeline.schema import Settings


def prepared(pairs: int = 12) -> Prepared:
    rng = np.random.default_rng(0)
    lengths = np.array([0, *rng.integers(2, 6, pairs - 1)])
    return Prepared(
        images=Images([f"{number}.png" for number in range(pairs)], np.arange(pairs), Path()),
        image_ids=np.arange(pairs) // 2,
        categories=np.zeros(pairs, dtype=np.int64),
        category_names=["all"],
        tokens=rng.integers(3, 50, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        rows={"train": np.arange(2, 10), "val": np.array([10]), "test": np.array([11])},
        unused={"train": 2, "val": 0, "test": 0},
    )


def neighbors(indices: list[list[int]], anywhere: bool = False) -> NeighborTable:
    data = prepared()
    return NeighborTable(data.rows["train"], np.array(indices, dtype=np.int32), data.image_ids, anywhere)


def test_texts_are_padded_with_zeros() -> None:
    data = prepared()
    rows = np.array([3, 0, 5])
    tokens, lengths = data.texts(rows)
    assert tokens.dtype == torch.int64
    for line, row in enumerate(rows):
        words = data.tokens[data.offsets[row] : data.offsets[row + 1]]
        assert lengths[line] == len(words)
        assert tokens[line, : len(words)].tolist() == words.tolist()
        assert not tokens[line, len(words) :].any()


def test_members_of_neighbor_lists_by_hand() -> None:
    table = neighbors([[4, 5], [8, -1], [3, 2], *[[-1, -1]] * 5])  # of the pairs 2, 3, 4, 5 ... 9
    members = table.is_listed(np.array([4, 2, 9]), np.array([2, 3, 4, 5, 8]))
    assert members.tolist() == [
        [True, True, False, False, False],
        [False, False, True, True, False],
        [False] * 5,
    ]


def test_other_texts_of_the_same_image_are_drawn_uniformly_and_never_the_text_itself() -> None:
    data = prepared()
    data.image_ids = np.array([9, 9, 5, 7, 5, 5, 7, 1, 5, 7, 2, 3])  # train pairs are 2 to 9
    texts = OtherTexts(data)
    positions = np.repeat(np.arange(8), 3000)
    drawn = texts.draw(positions, np.random.default_rng(0))
    of_image = {5: {2, 4, 5, 8}, 7: {3, 6, 9}, 1: {7}}
    for position, row in enumerate(data.rows["train"]):
        values = drawn[positions == position]
        others = sorted(of_image[data.image_ids[row]] - {row})
        if not others:
            assert (values == -1).all()
            continue
        counts = [(values == other).sum() for other in others]
        assert sum(counts) == 3000
        assert stats.chisquare(counts).pvalue > 1e-4


def test_other_texts_need_an_image_with_several() -> None:
    data = prepared()
    data.image_ids = np.arange(12)
    with pytest.raises(UserError, match="several texts an image"):
        OtherTexts(data)


def test_neighbors_are_drawn_uniformly() -> None:
    table = neighbors([[4, 5, 6, 7], [8, 9, -1, -1], [-1, -1, -1, -1]])
    drawn = table.draw(np.repeat([0, 1, 2], 4000), np.random.default_rng(0))
    assert (drawn[8000:] == -1).all()
    for values, possible in ((drawn[:4000], [4, 5, 6, 7]), (drawn[4000:8000], [8, 9])):
        counts = [(values == number).sum() for number in possible]
        assert sum(counts) == 4000
        assert stats.chisquare(counts).pvalue > 1e-4


def test_the_control_draws_from_anywhere_but_the_own_image() -> None:
    table = neighbors([[3]] * 8, anywhere=True)
    drawn = table.draw(np.zeros(6000, dtype=np.int64), np.random.default_rng(0))
    counts = [(drawn == number).sum() for number in range(4, 10)]  # pairs 2 and 3 show the own image
    assert sum(counts) == 6000
    assert stats.chisquare(counts).pvalue > 1e-4


def test_an_epoch_takes_every_pair_once_and_depends_on_seed_and_epoch_alone() -> None:
    rows = np.arange(100, 137)
    plan = plan_epoch(rows, None, 8, flip=True, seed=1, epoch=3)
    assert [len(batch.rows) for batch in plan] == [8, 8, 8, 8, 5]
    assert sorted(np.concatenate([batch.rows for batch in plan])) == rows.tolist()
    assert all((batch.neighbors == -1).all() for batch in plan)
    again = plan_epoch(rows, None, 8, flip=True, seed=1, epoch=3)
    other = plan_epoch(rows, None, 8, flip=True, seed=1, epoch=4)
    for left, right in zip(plan, again, strict=True):
        assert np.array_equal(left.rows, right.rows)
        assert np.array_equal(left.flips, right.flips)
    assert not all(np.array_equal(left.rows, right.rows) for left, right in zip(plan, other, strict=True))


@pytest.mark.parametrize(
    ("pairs", "batch_size", "sizes"),
    [
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (3, 1, [1, 1, 1]),
        (1, 4, [1]),
        (3, 2, [3]),
        (128, 127, [128]),
    ],
)
def test_a_pair_is_never_left_alone(pairs: int, batch_size: int, sizes: list[int]) -> None:
    plan = plan_epoch(np.arange(pairs), None, batch_size, flip=True, seed=0, epoch=1)
    assert [len(batch.rows) for batch in plan] == sizes
    assert [len(batch.neighbor_flips) for batch in plan] == sizes
    whole = plan_epoch(np.arange(pairs), None, pairs, flip=True, seed=0, epoch=1)[0]
    assert np.concatenate([batch.rows for batch in plan]).tolist() == whole.rows.tolist()
    assert np.concatenate([batch.flips for batch in plan]).tolist() == whole.flips.tolist()


def test_flips_are_fair_and_can_be_turned_off() -> None:
    rows = np.arange(4000)
    plan = plan_epoch(rows, None, 4000, flip=True, seed=0, epoch=1)[0]
    for flips in (plan.flips, plan.neighbor_flips):
        assert 0.45 < flips.mean() < 0.55
    assert not plan_epoch(rows, None, 4000, flip=False, seed=0, epoch=1)[0].flips.any()


def test_a_pair_goes_with_its_own_neighbor() -> None:
    rows = np.arange(2, 10)
    table = neighbors([[row + 100] for row in rows])
    for batch in plan_epoch(rows, table, 3, flip=False, seed=0, epoch=1):
        assert (batch.neighbors == batch.rows + 100).all()


# Neighborhood batches


def table_of(pairs: int, k: int, seed: int = 0) -> NeighborTable:
    """Lists of up to k neighbors each, drawn at random, of every other pair; a tenth of them empty."""
    rng = np.random.default_rng(seed)
    table = NeighborTable(np.arange(pairs) * 2, np.full((pairs, k), -1, dtype=np.int32), np.arange(2 * pairs))
    for position in np.flatnonzero(rng.random(pairs) > 0.1):
        others = rng.choice(np.delete(table.rows, position), rng.integers(1, k + 1), replace=False)
        table.indices[position, : len(others)] = others
    return table


@pytest.mark.parametrize(("pairs", "k"), [(2, 1), (40, 1), (137, 5), (20_000, 3)])
def test_pairs_are_matched_with_neighbors_and_none_is_left_that_has_a_free_one(pairs: int, k: int) -> None:
    table = table_of(pairs, k)
    partner = table.match(np.random.default_rng(1))
    assert np.array_equal(partner[partner], np.arange(pairs))
    lists = [set(line[line >= 0].tolist()) for line in table.indices]
    for position, other in enumerate(partner):
        if other == position:
            assert all(partner[number // 2] != number // 2 for number in lists[position])
        else:
            assert table.rows[other] in lists[position] or table.rows[position] in lists[other]
    assert (partner == table.match(np.random.default_rng(1))).all()
    assert pairs == 2 or (partner != table.match(np.random.default_rng(2))).any()


def test_partners_are_drawn_uniformly() -> None:
    table = neighbors([[4, 5, 6, 7], *[[-1] * 4] * 7])
    partners = [table.match(np.random.default_rng(seed))[0] for seed in range(2000)]
    counts = [partners.count(position) for position in range(2, 6)]
    assert sum(counts) == 2000
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("pairs", "batch_size"), [(137, 8), (137, 9), (500, 64), (5, 4), (6, 4), (9, 64), (9, 4), (10, 4)]
)
def test_neighborhood_batches_hold_every_pair_once_its_partner_and_a_neighbor_of_its_own(
    pairs: int, batch_size: int
) -> None:
    table = table_of(pairs, 5)
    plan, again, other = (
        plan_epoch(table.rows, table, batch_size, flip=True, seed=1, epoch=epoch, neighborhoods=True)
        for epoch in (3, 3, 4)
    )
    assert sorted(np.concatenate([batch.rows for batch in plan])) == table.rows.tolist()
    partner = table.rows[table.match(np.random.default_rng([1, 3]))]
    for number, batch in enumerate(plan):
        last = number == len(plan) - 1
        assert len(batch.rows) in (batch_size, batch_size - 1) or (last and 3 <= len(batch.rows) <= batch_size + 2)
        assert np.isin(partner[batch.rows // 2], batch.rows).all()
        for row, drawn in zip(batch.rows, batch.neighbors, strict=True):
            possible = np.intersect1d(table.indices[row // 2], batch.rows)
            assert drawn in possible if len(possible) else drawn == -1
    for left, right in zip(plan, again, strict=True):
        assert all(np.array_equal(vars(left)[name], vars(right)[name]) for name in vars(left))
    assert [batch.rows.tolist() for batch in plan] != [batch.rows.tolist() for batch in other]


def test_the_neighbor_in_the_batch_is_drawn_uniformly_and_from_no_other_batch() -> None:
    table = neighbors([[4, 5, 6, 7], [8, 9, -1, -1], *[[-1] * 4] * 6])
    batches = np.array([0, 1, 0, 0, 1, 0, 1, 0])
    rng = np.random.default_rng(0)
    drawn = np.stack([table.draw_within(np.arange(8), batches, rng) for _ in range(3000)])
    assert (drawn[:, 1] == 8).all() and (drawn[:, 2:] == -1).all()
    counts = [(drawn[:, 0] == number).sum() for number in (4, 5, 7)]
    assert sum(counts) == 3000
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("split", ["val", "test"])
def test_val_and_test_need_two_images(tmp_path: Path, split: str) -> None:
    splits = ["train", "val", "val", "test", "test"]
    rows = [
        {"image_id": str(n), "image_path": f"{n}.png", "text": "a word", "category": None, "split": name}
        for n, name in enumerate(splits)
    ]
    settings = Settings(work=str(tmp_path))
    (tmp_path / "doc2vec").mkdir()
    np.save(tmp_path / "doc2vec" / "tokens.npy", np.full(20, 3, dtype=np.int32))
    np.save(tmp_path / "doc2vec" / "offsets.npy", np.arange(0, 24, 4))
    write_pairs(tmp_path / "pairs.parquet", [pa.RecordBatch.from_pylist(rows, SCHEMA)], tmp_path)
    assert len(load_prepared(settings.work_folder, settings.model.text.max_words).rows[split]) == 2
    first, second = [n for n, name in enumerate(splits) if name == split]
    rows[second] |= {"image_id": str(first), "image_path": f"{first}.png"}
    write_pairs(tmp_path / "pairs.parquet", [pa.RecordBatch.from_pylist(rows, SCHEMA)], tmp_path)
    with pytest.raises(UserError, match=f"one image only of split {split}"):
        load_prepared(settings.work_folder, settings.model.text.max_words)


# Images


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return ImageFiles(Images([f"{number}.png" for number in range(5)], np.arange(5), tmp_path), 8, 10**6)


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_come_in_the_order_asked_for_and_mirrored_where_asked(files: ImageFiles, workers: int) -> None:
    requests = [(np.array([4, 0, 4]), np.array([False, True, True])), (np.array([1]), np.array([False]))]
    first, second = PixelSource(files, workers, torch.device("cpu")).batches(requests)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 3, 8, 8)
    image = np.array(Image.open(files.images.root / "4.png"))
    assert np.array_equal(first[0].permute(1, 2, 0), image)
    assert np.array_equal(first[2].permute(1, 2, 0), image[:, ::-1])
    assert torch.equal(second[0], pixels_of(files, 1))


def test_features_of_an_image_and_of_its_mirror_image() -> None:
    features = np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3)
    requests = [(np.array([1, 0]), np.array([True, False]))]
    (batch,) = FeatureSource(features, torch.device("cpu")).batches(requests)
    assert batch.tolist() == [features[1, 1].tolist(), features[0, 0].tolist()]


def pixels_of(files: ImageFiles, number: int) -> torch.Tensor:
    return files.__getitems__([number])[0][0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_black_and_noted_by_workers_too(files: ImageFiles, workers: int) -> None:
    path = files.images.root / "2.png"
    path.write_bytes(b"")
    source = PixelSource(files, workers, torch.device("cpu"))
    _, batch = source.batches([(np.array([0, 1]), np.zeros(2, bool)), (np.array([3, 2]), np.zeros(2, bool))])
    assert torch.equal(batch[0], pixels_of(files, 3)) and not batch[1].any()
    assert source.unreadable == {2: f"{path} was readable when it was prepared and now is not: the file is empty"}
    with pytest.raises(UserError, match=r"2\.png .* run prepare_dataset.py again"):
        demand_readable(source.unreadable, 5)
    demand_readable(source.unreadable, 5, share=0.2)
    with pytest.raises(UserError, match="1 of 5 images, 20.00%; training.max_unreadable_share allows 19.00%"):
        demand_readable(source.unreadable, 5, share=0.19)


def test_batches_that_a_thread_takes_ahead_come_in_order_and_with_their_error() -> None:
    taken: list[int] = []

    def batches() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield number
        raise UserError("the seventh cannot be read")

    ahead = prefetch(batches(), count=2)
    assert next(ahead) == 0
    ahead.close()  # the batches that nobody wants any more are not waited for
    assert len(taken) <= 4
    assert list(prefetch([])) == []
    together = []
    with pytest.raises(UserError, match="the seventh"):
        together.extend(prefetch(batches(), count=2))
    assert taken[-6:] == list(range(6))


def test_loading_draws_nothing_from_the_generator_of_dropout(files: ImageFiles) -> None:
    torch.manual_seed(0)
    list(PixelSource(files, 1, torch.device("cpu")).batches([(np.array([0, 1]), np.zeros(2, bool))]))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_max_words_cuts_a_text_after_so_many() -> None:
    data = prepared()
    data.max_words = 2
    tokens, lengths = data.texts(np.array([0, 3]))
    start, end = data.offsets[3:5]
    assert lengths.tolist() == [0, min(3, end - start)]
    assert tokens[1].tolist() == data.tokens[start : min(end, start + 3)].tolist()
