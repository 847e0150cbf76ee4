"""The made-up dataset: what it promises about topics, pictures and words."""

import itertools
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.schema import Synthetic
from pipeline.settings import load_settings, mistakes
from readers import synthetic

SMALL = Synthetic(pairs=400, topics=6, motifs=12, motifs_per_topic=4, literalness=0.0)


def drawn(folder: Path, seed: int = 0, **changes: Any) -> list[dict[str, str]]:
    settings = Synthetic(**{**vars(SMALL), **changes})
    lines = synthetic.draw(settings, seed, folder).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def words(text: str) -> list[str]:
    return text.lower().replace(".", "").split()


def test_same_settings_and_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        drawn(tmp_path / name, seed, pairs=20)
    one, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert set(one) == set(other)
    assert one["pairs.jsonl"] != other["pairs.jsonl"]
    assert one["images/000000.png"] != other["images/000000.png"]


def test_a_topic_has_its_words_and_shares_the_common_ones(tmp_path: Path) -> None:
    pairs = drawn(tmp_path / "drawn")
    assert len({pair["category"] for pair in pairs}) == SMALL.topics
    topics_of = defaultdict(set)
    for pair in pairs:
        for word in words(pair["text"]):
            topics_of[word].add(pair["category"])
    own = {word for word, topics in topics_of.items() if len(topics) == 1}
    counts = [sum(word in own for word in words(pair["text"])) for pair in pairs]
    assert sum(counts) / len(counts) == pytest.approx(synthetic.TOPIC_SHARE * 18, abs=2)
    assert sum(len(topics) == SMALL.topics for topics in topics_of.values()) > 20


@pytest.mark.parametrize(("motifs_per_topic", "topics_a_motif"), [(4, {2}), (5, {2, 3}), (12, {6})])
def test_a_motif_serves_several_topics_and_a_topic_has_several_motifs(
    motifs_per_topic: int, topics_a_motif: set[int]
) -> None:
    settings = Synthetic(**{**vars(SMALL), "motifs_per_topic": motifs_per_topic})
    for seed in range(10):
        world = synthetic.World(settings, synthetic.random.Random(seed))
        assert all(len(hand) == len(set(hand)) == motifs_per_topic for hand in world.motifs_of)
        assert {sum(motif in hand for hand in world.motifs_of) for motif in range(SMALL.motifs)} == topics_a_motif
    assert len(set(world.shapes)) == SMALL.motifs
    all_words = [*itertools.chain(world.topics, world.motif_words, world.common_words, *world.topic_words)]
    assert len(set(all_words)) == len(all_words)


@pytest.mark.parametrize("literalness", [0.0, 0.5, 1.0])
def test_literalness_is_the_share_of_texts_that_name_what_is_drawn(literalness: float) -> None:
    settings = Synthetic(**{**vars(SMALL), "literalness": literalness})
    world = synthetic.World(settings, synthetic.random.Random(0))
    naming = 0
    for number in range(400):
        motif = number % SMALL.motifs
        text = words(world._text(0, motif, "blue"))
        named = "blue" in text
        assert named == (world.motif_words[motif] in text)
        assert not set(text) & (set(world.motif_words) - {world.motif_words[motif]})
        assert len(text) == synthetic.SENTENCES * synthetic.WORDS
        naming += named
    assert naming / 400 == pytest.approx(literalness, abs=0.1)


def test_pictures_show_their_motif_in_its_colour() -> None:
    world = synthetic.World(SMALL, synthetic.random.Random(0))
    for motif in range(SMALL.motifs):
        for colour, ink in synthetic.COLOURS.items():
            picture = world._picture(motif, colour)
            assert picture.size == (synthetic.SIZE, synthetic.SIZE)
            assert ink in {pixel for _, pixel in picture.getcolors(5000)}


def test_it_is_drawn_once_and_anew_for_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "published" / "synthetic"
    drawn(folder, pairs=20)
    before = (folder / "pairs.jsonl").stat().st_ino
    drawn(folder, pairs=20)
    assert (folder / "pairs.jsonl").stat().st_ino == before
    (folder / "images" / "000003.png").unlink()
    assert len(drawn(folder, pairs=20)) == 20
    assert (folder / "images" / "000003.png").exists()
    assert drawn(folder, pairs=20, literalness=1.0) != drawn(folder, pairs=20)
    assert len(drawn(folder, pairs=21)) == 21
    assert len(list((folder / "images").iterdir())) == 21
    assert [path.name for path in folder.parent.iterdir()] == ["synthetic"]


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "published" / "synthetic"
    drawn(folder, pairs=20)
    before = contents(folder)
    monkeypatch.setattr(synthetic, "write_json", fail)
    with pytest.raises(UserError, match="No space left"):
        drawn(folder, pairs=30)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["synthetic"]


def test_a_folder_that_is_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        drawn(tmp_path / "synthetic")
    assert (tmp_path / "synthetic" / "thesis.txt").read_text() == "mine"


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match=r"^dataset\.synthetic\.motifs is 70 and must be at most 60$"):
        load_settings({"dataset.synthetic.motifs": 70})
    (mistake,) = mistakes(load_settings({"dataset": {"synthetic": {"motifs": 7, "motifs_per_topic": 8}}}))
    assert mistake.startswith("dataset.synthetic.motifs_per_topic is larger")


def test_a_process_killed_at_any_operation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each of its operations on files: the next call ends with the files of an undisturbed one."""
    drawn(tmp_path / "undisturbed", 1, pairs=10)
    wanted = contents(tmp_path / "undisturbed")

    class Killed(BaseException):
        pass

    for begun_with in (None, 0):
        for operation in range(40):
            work = tmp_path / f"{begun_with} {operation}"
            work.mkdir()
            if begun_with is not None:
                drawn(work / "drawn", begun_with, pairs=11)
            done = 0

            def stop(event: str, operation: int = operation, work: Path = work) -> None:
                nonlocal done
                done += 1
                if done > operation:
                    raise Killed

            with monkeypatch.context() as patch:
                for module, name in ((os, "mkdir"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "replace")):
                    real = getattr(module, name)

                    def operate(*words: Any, real: Any = real, name: str = name, **options: Any) -> Any:
                        stop(name)
                        return real(*words, **options)

                    patch.setattr(module, name, operate)
                try:
                    drawn(work / "drawn", 1, pairs=10)
                    is_killed = False
                except Killed:
                    is_killed = True
            drawn(work / "drawn", 1, pairs=10)
            assert contents(work / "drawn") == wanted
            assert os.listdir(work) == ["drawn"]
            if not is_killed:
                break
        assert not is_killed and operation >= 4


def test_system_files_beside_the_pictures_are_not_counted(tmp_path: Path) -> None:
    drawn(tmp_path / "drawn", pairs=10)
    before = (tmp_path / "drawn").stat().st_mtime_ns, (tmp_path / "drawn").stat().st_ino
    (tmp_path / "drawn" / "images" / ".DS_Store").write_bytes(b"x")
    drawn(tmp_path / "drawn", pairs=10)
    assert before == ((tmp_path / "drawn").stat().st_mtime_ns, (tmp_path / "drawn").stat().st_ino)
    (tmp_path / "drawn" / "images" / "000001.png").unlink()
    drawn(tmp_path / "drawn", pairs=10)
    assert before[1] != (tmp_path / "drawn").stat().st_ino
