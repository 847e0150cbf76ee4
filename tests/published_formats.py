"""Small datasets in the exact formats in which their owners publish them. Each function writes one below `root`."""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TOPICS = {
    "pets": "cat dog hamster parrot rabbit kitten puppy whiskers".split(),
    "stars": "planet comet telescope galaxy orbit asteroid nebula saturn".split(),
    "court": "judge gavel lawyer verdict jury trial appeal justice".split(),
}


def sentence(number: int, words: int = 7) -> str:
    """A made-up sentence on topic number modulo 3."""
    chance = np.random.default_rng(number)
    topic = list(TOPICS.values())[number % len(TOPICS)]
    return "The " + " ".join(chance.choice(topic, size=words)) + "."


def draw(path: Path, number: int, **options: object) -> None:
    """A photo: noise in the colour of its topic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 100, (24, 32, 3), np.uint8)
    pixels[..., number % len(TOPICS)] += 120
    Image.fromarray(pixels).save(path, **options)


def write_coco(root: Path, train: int = 30, val: int = 12, karpathy: bool = False) -> None:
    """COCO 2017: annotations/ and folders of images named by 12 digits; four to seven captions an image.

    With `karpathy` dataset_coco.json too, whose entries name the same images as of 2014.
    """
    entries, caption_id, first = [], 37, 0
    (root / "annotations").mkdir(parents=True)
    for name, count in (("train2017", train), ("val2017", val)):
        images, annotations = [], []
        for number in range(first, first + count):
            coco_id = 9 + 16 * number
            images.append({"license": 3, "file_name": f"{coco_id:012d}.jpg", "height": 24, "width": 32, "id": coco_id})
            draw(root / name / images[-1]["file_name"], number)
            sentences = []
            for caption in range(4 + number % 4):
                text = sentence(1000 * caption * len(TOPICS) + number) + ("\n" if caption == 3 else "")
                annotations.append({"image_id": coco_id, "id": caption_id, "caption": text})
                sentences.append(
                    {"tokens": text.lower().strip(" .\n").split(), "raw": text, "imgid": number, "sentid": caption_id}
                )
                caption_id += 1
            in_val = name == "val2017" or number % 5 == 0  # val2014 was larger than val2017
            folder = "val2014" if in_val else "train2014"
            entries.append(
                {
                    "filepath": folder,
                    "sentids": [each["sentid"] for each in sentences],
                    "filename": f"COCO_{folder}_{coco_id:012d}.jpg",
                    "imgid": number,
                    "split": ("restval", "val", "test")[number % 3] if in_val else "train",
                    "sentences": sentences,
                    "cocoid": coco_id,
                }
            )
        first += count
        content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
        (root / "annotations" / f"captions_{name}.json").write_text(json.dumps(content))
    if karpathy:
        (root / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))


def write_flickr30k(root: Path, images: int = 40, captions: str = "results.csv", karpathy: bool = False) -> None:
    """Flickr30K with the captions in one of the files in which they are passed on, five an image."""
    folder = root / "flickr30k_images"
    entries, lines = [], []
    for number in range(images):
        name = f"{1000092795 + 7 * number}.jpg"
        draw(folder / name, number)
        texts = [sentence(1000 * caption * len(TOPICS) + number) for caption in range(5)]
        texts[1] = texts[1].replace(" ", ", ", 1).replace(".", ' , " says so " .')
        lines += [(name, caption, text) for caption, text in enumerate(texts)]
        entries.append(
            {
                "sentids": list(range(5 * number, 5 * number + 5)),
                "imgid": number,
                "sentences": [
                    {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 5 * number + caption}
                    for caption, text in enumerate(texts)
                ],
                "split": "test" if number % 4 == 0 else "val" if number % 4 == 1 else "train",
                "filename": name,
            }
        )
    path = root / captions
    if captions == "results.csv":
        rows = [f"{name}| {caption}| {text}" for name, caption, text in lines]
        rows[9] = rows[9].replace("| 4|", "| 4  ")  # as in the line of 2199200615.jpg
        path.write_text("\n".join(["image_name| comment_number| comment", *rows]) + "\n")
    elif captions.endswith((".token", ".token.txt")):
        path.write_text("".join(f"{name}#{caption}\t{text}\n" for name, caption, text in lines))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "caption"])
            writer.writerows((name, text) for name, _, text in lines)
    if karpathy:
        (root / "dataset_flickr30k.json").write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))


def write_politics(root: Path, train: int = 36, test: int = 9, small: bool = False) -> None:
    """Politics: pickles of sides, issues and items, and imgs/SIDE/ISSUE/SOURCE; the last image is in no split.

    With `small` the texts lie in db.pickle, without issues, and not in complete_db.pickle.
    """
    complete: dict[str, dict[str, list[dict[str, object]]]] = {"LEFT": {}, "RIGHT": {}}
    paths = []
    for number in range(train + test + 1):
        side, issue = ("LEFT", "RIGHT")[number % 2], list(TOPICS)[number % len(TOPICS)]
        paths.append(f"imgs/{side}/{issue}/paper.com/{number}.jpg")
        draw(root / paths[-1], number)
        text = " ".join(sentence(1000 * each * len(TOPICS) + number, 12) for each in range(8))
        item = {"local_path": paths[-1], "content_text": text, "url": "https://paper.com", "description": None}
        complete[side].setdefault(issue, []).append(item)
    items = [item for issues in complete.values() for some in issues.values() for item in some]
    content = [(item["local_path"], item["content_text"]) for item in items] if small else complete
    (root / ("db.pickle" if small else "complete_db.pickle")).write_bytes(pickle.dumps(content))
    splits = {"train": paths[:train], "test": paths[train:-1]}
    (root / "train_test_paths.pickle").write_bytes(pickle.dumps(splits))


def write_goodnews(root: Path, articles: int = 48) -> None:
    """GoodNews: articles by id with the captions of their images by number, and the split of each image.

    Three articles of twelve are in train, three in val, three in test, and of three the first image is in train and the
    second, where there is one, in test.
    """
    dataset, splits = {}, {}
    for number in range(articles):
        article_id = f"4fd2a0e18eb7c8105d{number:06x}"
        images = {}
        for image in range(1 + number % 2):
            images[str(image)] = sentence(1000 * image * len(TOPICS) + number)
            draw(root / "images" / f"{article_id}_{image}.jpg", number)
            kind = ("train", "val", "test", ("train", "test")[image])[number // 3 % 4]
            splits[f"{article_id}_{image}"] = kind
        dataset[article_id] = {
            "article_url": f"https://www.nytimes.com/{number}.html",
            "article": " ".join(sentence(500 * len(TOPICS) * each + number) for each in range(20)),
            "headline": {"main": f"Headline \u201c{number}\u201d"},
            "images": images,
        }
    root.mkdir(exist_ok=True)
    (root / "captioning_dataset.json").write_text(json.dumps(dataset))
    (root / "img_splits.json").write_text(json.dumps(splits))


def write_conceptual_captions(
    root: Path, train: int = 40, val: int = 10, tars: bool = True, metadata: bool = True, per_shard: int = 16
) -> None:
    """Conceptual Captions: two TSVs, and what img2dataset leaves of the images, which it could not all download.

    With `tars` as WebDataset shards, else as files; without `metadata` the Parquet file of each shard is not there.
    """
    for name, folder, first, count in (
        ("Train_GCC-training.tsv", "train", 0, train),
        ("Validation_GCC-1.1.0-Validation.tsv", "val", train, val),
    ):
        records = [
            (sentence(number), f"https://example.com/{number}.jpg?w=300") for number in range(first, first + count)
        ]
        (root / folder).mkdir(parents=True)
        (root / name).write_text("".join(f"{caption}\t{url}\n" for caption, url in records))
        for shard in range(-(-count // per_shard)):
            _write_shard(
                root / folder, shard, first + shard * per_shard, records[shard * per_shard :][:per_shard], tars
            )
            if not metadata:
                (root / folder / f"{shard:05d}.parquet").unlink()


def _write_shard(folder: Path, shard: int, first: int, records: list[tuple[str, str]], tars: bool) -> None:
    files, table = [], []
    for number, (caption, url) in enumerate(records):
        key = f"{shard:05d}{number:04d}"
        gone = (first + number) % 10 == 7
        meta = {
            "caption": caption,
            "url": url,
            "key": key,
            "status": "failed_to_download" if gone else "success",
            "error_message": "HTTP Error 404: Not Found" if gone else None,
            "width": None if gone else 32,
            "height": None if gone else 24,
        }
        table.append(meta)
        if not gone:
            draw(folder / "image.jpg", first + number)
            content = (folder / "image.jpg").read_bytes()
            files += [
                (f"{key}.jpg", content),
                (f"{key}.txt", caption.encode()),
                (f"{key}.json", json.dumps(meta).encode()),
            ]
            (folder / "image.jpg").unlink()
    if tars:
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for name, content in files:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), 1.6e9 + 0.25  # webdataset's mtime makes tarfile write PAX headers
                archive.addfile(info, io.BytesIO(content))
    else:
        (folder / f"{shard:05d}").mkdir()
        for name, content in files:
            (folder / f"{shard:05d}" / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(table), folder / f"{shard:05d}.parquet")
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(records)}))
