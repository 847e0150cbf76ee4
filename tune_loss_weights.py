"""Search the weights SYM, IMG and TEXT of Eq. 8 on the validation split.

    python tune_loss_weights.py --config configs/web_news.yaml --tuning.trials 30

The authors say of the three weights that they "should be optimized on your dataset". Two searches have the same number
of trials, so that a gain of the method does not come from its tuning:

- `baseline` varies SYM, with IMG = TEXT = 0;
- `method` varies all three.

A search tries the paper's weights first, then those that Optuna's TPE sampler proposes. A trial is a training as in
step 4. It also stops where it lies below the median of earlier trials after as many epochs. Its figure is k-way
Recall@1 of the validation split, at the epoch that training.select chooses: k is training.select_k, and both directions
are averaged. The test split is not read. Evaluate a run with the weights found on it once.

Reads what step 4 reads. Writes WORK/tuning/<settings>/<search>/: trials.db (Optuna's), best.json, and for each trial
TensorBoard curves and HParams. A stopped search is resumed. A search for more trials reuses those that exist.
"""

import sys
from typing import TYPE_CHECKING

from pipeline.command_line import make_parser, parse_settings, run_script, say_next, without
from pipeline.errors import UserError
from pipeline.files import lock, read_json, write_text
from pipeline.settings import mistakes_of_weights
from pipeline.steps import EXTRACT_DOC2VEC, FIND_NEIGHBORS, PREPARE, TRAIN_DOC2VEC, require

if TYPE_CHECKING:
    from training.runs import Weights


def main(argv: list[str] | None = None) -> "dict[str, Weights]":
    """Search; returns the best weights of each search."""
    argv = sys.argv[1:] if argv is None else argv
    settings, _, _ = parse_settings(make_parser(__doc__, "tuning", "loss", "training", "model"), argv)
    if found := mistakes_of_weights(settings.loss, sym=1, img=1):  # the search `method` varies all three
        raise UserError(f"SYM, IMG and TEXT cannot be searched: {'; '.join(found)}")
    for step in (PREPARE, TRAIN_DOC2VEC, EXTRACT_DOC2VEC):
        require(step, settings)
    import yaml  # these and torch take seconds to import: a wrong flag is reported first

    from pipeline.devices import be_deterministic, use_precision
    from text_space.spaces import space_of
    from training.tuning import SEARCHES, at_bounds, search, search_folder

    require(FIND_NEIGHBORS, settings, space_of(settings).made_from)
    be_deterministic(settings.deterministic)
    use_precision(settings.training.precision)
    folder = search_folder(settings)
    with lock(folder):
        if not (folder / "config.yaml").exists():
            written = yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True)
            write_text(folder / "config.yaml", written)
        best = {name: search(folder / name, names, settings) for name, names in SEARCHES.items()}
    flags = without(argv, ["--tuning.trials"])
    k = settings.training.select_k
    for name, weights in best.items():
        value = read_json(folder / name / "best.json")["value"]
        print(f"{name}: {k}-way Recall@1 {value:.4f} on the validation split")
        for at_bound in at_bounds(weights, SEARCHES[name]):
            print(f"warning: {at_bound}; the best weight may lie beyond it")
        words = [f"{weight:g}" for weight in (weights.sym, weights.img, weights.text)]
        say_next("python", "train_cross_modal_retrieval_model.py", *words, *flags)
    say_next("tensorboard", "--logdir", folder)
    return best


if __name__ == "__main__":
    run_script(main)
