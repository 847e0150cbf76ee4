"""Write a made-up sample in COCO's format: drawings with five captions each, for methods that need several texts.

    python benchmarks/coco_sample.py --out data/coco_sample [--train 600] [--val 200] [--seed 0]

The drawings and words are those of synthetic.py: an image's captions share its topic, and each names what is drawn.
Writes OUT/train2017, OUT/val2017 and OUT/annotations/captions_{train,val}2017.json, which
`--dataset.source coco --dataset.root OUT` reads.
"""

import argparse
import random
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.files import write_json
from pipeline.schema import Synthetic
from readers.synthetic import SIZE, World

CAPTIONS = 5  # of an image, as COCO has (4 to 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/coco_sample"), help="folder to write to")
    parser.add_argument("--train", type=int, default=600, help="train images")
    parser.add_argument("--val", type=int, default=200, help="val images")
    parser.add_argument("--seed", type=int, default=0, help="seeds drawings and captions")
    arguments = parser.parse_args()
    world = World(Synthetic(literalness=1.0), random.Random(f"coco sample {arguments.seed}"))
    image_id = 0
    for split, count in (("train2017", arguments.train), ("val2017", arguments.val)):
        (arguments.out / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for _ in tqdm(range(count), desc=split, unit="image", disable=None):
            image_id += 1
            picture, captions = world.captioned(CAPTIONS)
            name = f"{image_id:012}.jpg"
            picture.save(arguments.out / split / name, quality=95)
            images.append({"id": image_id, "file_name": name, "height": SIZE, "width": SIZE})
            for caption in captions:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "caption": caption})
        path = arguments.out / "annotations" / f"captions_{split}.json"
        write_json(path, {"info": {"description": "made-up sample"}, "images": images, "annotations": annotations})
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
