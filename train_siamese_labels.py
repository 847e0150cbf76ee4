"""Before step 4 with loss.base fine_grained: train the siamese text network whose labels weigh that loss.

    python train_siamese_labels.py [--config FILE.yaml] [--siamese.encoder graph|bag_of_words|gru] ...

Reads pairs.parquet, the token sequences, word vectors and Doc2Vec vectors in WORK and, where siamese.relevance is by
neighbors, the neighbor table. Writes into WORK/siamese:

- vectors.npy (float32, pairs x siamese.dimensions): a vector of every text; zeros for a text without a known word;
- comparison.npy (float32): a weight for each dimension, and a bias;
- train_siamese_labels.json: the figures that are printed.

Texts with vectors a and b are alike with the probability sigmoid(sum of weight x a x b + bias). Prints the balanced
accuracy on pairs of test texts, beside chance and beside the cosine of their Doc2Vec vectors, whose threshold is the
best of the val split.
"""

import functools

import numpy as np

from pipeline.command_line import make_parser, parse_settings, run_script
from pipeline.files import read_array, write_array
from pipeline.steps import (
    EXTRACT_DOC2VEC,
    FIND_NEIGHBORS,
    PREPARE,
    TRAIN_DOC2VEC,
    is_up_to_date,
    making,
    require,
)
from pipeline.work import Work


def main(argv: list[str] | None = None) -> None:
    settings, _, _ = parse_settings(make_parser(__doc__, "siamese", "model"), argv)
    # torch takes seconds to import: a wrong flag is reported first.
    from datasets import load_neighbors, load_prepared
    from pipeline.devices import be_deterministic, choose_device, use_precision
    from training.embedding import embed_texts
    from training.fine_grained import siamese_step, train_relevance
    from training.siamese import best_threshold, build_network, cosines, held_out, measure, train_network

    for step in (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC):
        require(step, settings)
    work = Work(settings.work_folder)
    alike_by = work.folder, settings.siamese.relevance, settings.neighbors.space
    step = siamese_step(*alike_by)
    neighbors_decide = step.inputs[-1] in FIND_NEIGHBORS.outputs
    if neighbors_decide:
        require(FIND_NEIGHBORS, settings)
    if is_up_to_date(step, settings):
        return
    device = choose_device(settings.training.device)
    use_precision(settings.training.precision)
    be_deterministic(settings.deterministic)
    data = load_prepared(work.folder, max_words=None)  # labels are of whole texts
    relevance = train_relevance(*alike_by, data)
    neighbors = load_neighbors(work.folder, settings.neighbors, data) if neighbors_decide else None
    reference = read_array(work.vectors)
    val, test = (held_out(split, data, relevance, reference, settings) for split in ("val", "test"))
    network = build_network(settings.siamese, settings.model.text, read_array(work.word_vectors), settings.seed).to(
        device
    )

    with making(step, settings) as figures:
        what = "Doc2Vec neighbors" if neighbors_decide else f"one of {len(data.category_names)} categories"
        print(f"training a siamese network on {len(data.rows['train']):,} texts, alike being {what}, on {device}")
        figures |= train_network(network, data, relevance, neighbors, val, settings.siamese, settings.seed, device)

        size = settings.siamese.batch_size
        embed = functools.partial(embed_texts, network.encoder, data, size=size, precision="float32", device=device)
        scores = test.logits(network, embed(rows=test.rows).cpu()).numpy()
        of_val, of_test = (cosines(np.array(reference[pairs.rows])) for pairs in (val, test))
        figures["test"] = {
            "texts": len(test.rows),
            "alike_pairs": int(test.alike.sum()) // 2,
            "unlike_pairs": int(test.unlike.sum()) // 2,
            "chance": 0.5,
            "doc2vec_cosine": measure(
                of_test, best_threshold(of_val, val.alike, val.unlike), test, data.categories, data.category_names
            ),
            "siamese": measure(scores, 0.0, test, data.categories, data.category_names),
        }
        print_accuracies(figures["test"])

        usable = np.flatnonzero(np.diff(data.offsets) > 0)
        vectors = np.zeros((len(data.image_ids), settings.siamese.dimensions), dtype=np.float32)
        vectors[usable] = embed(rows=usable).cpu().numpy()
        write_array(figures.new.siamese_vectors, vectors)
        write_array(figures.new.siamese_comparison, network.comparison.detach().cpu().numpy())


def print_accuracies(figures: dict) -> None:
    """A line for all pairs and, where there are categories, one for each."""
    print(
        f"accuracy on all pairs of {figures['texts']:,} test texts, {figures['alike_pairs']:,} alike and "
        f"{figures['unlike_pairs']:,} unlike ones, each half of it (chance {figures['chance']})"
    )
    network, cosine = figures["siamese"], figures["doc2vec_cosine"]
    lines = {"all": (network["accuracy"], cosine["accuracy"])}
    for name, value in network["accuracy_by_category"].items():
        lines[name] = value, cosine["accuracy_by_category"][name]
    width = max(map(len, lines))
    print(f"{'':{width}}  siamese  Doc2Vec cosine")
    for name, values in lines.items():
        print(f"{name:{width}}   {values[0]:.4f}          {values[1]:.4f}")


if __name__ == "__main__":
    run_script(main, then="train_cross_modal_retrieval_model.py 0 0 0 --loss.base fine_grained")
