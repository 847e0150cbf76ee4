"""Visual features of every pair's image, for neighbors in image space (OURS (Img NNs)).

    python extract_image_features.py --config configs/openclipart.yaml

Reads pairs.parquet and the images. Writes WORK/image_features/vectors.npy, one row a pair: the features of
`model.image.backbone` with `model.image.weights`, as pretrained, whatever training does with it afterwards. Then
`knn_document_features.py --neighbors.space images` looks up the neighbors in them, and `both` in them and in Omega.
"""

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.files import write_array
from pipeline.steps import EXTRACT_IMAGES, PREPARE, is_up_to_date, making, require


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__, "model"), argv)
    # torch takes seconds to import: a wrong flag is reported first.
    from images.loading import demand_readable
    from pipeline.devices import choose_device, use_precision
    from pipeline.pairs import load_images
    from training.image_sources import cached_features, made_from

    require(PREPARE, settings)
    images = load_images(settings.work_folder)
    published = made_from(settings.model.image, settings.seed, images)
    if is_up_to_date(EXTRACT_IMAGES, settings, published):
        return
    with making(EXTRACT_IMAGES, settings, published) as figures:
        use_precision(settings.training.precision)
        features, unreadable = cached_features(settings, images, choose_device(settings.training.device))
        demand_readable(unreadable, len(features))
        write_array(figures.new.image_vectors, features[images.of_pair, 0])
        figures |= {"pairs": len(images.of_pair), "images": len(features), "features": features.shape[2]}


if __name__ == "__main__":
    run_script(main, then="knn_document_features.py --neighbors.space images")
