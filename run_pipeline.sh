#!/usr/bin/env bash
# Set up .venv and run every step: prepare, Doc2Vec, vectors, neighbors, train, evaluate, compare.
#
#   bash run_pipeline.sh [CONFIG] [SYM IMG TEXT]
#
# CONFIG defaults to configs/openclipart.yaml (configs/synthetic.yaml where there is no apt-get to fetch it with). It
# trains the baseline SYM 0 0 and the method SYM IMG TEXT, by default the paper's 1 0.3 0.2. Without weights it trains
# soft targets too (docs/methods.md), where the config has a frozen backbone. What is done and still valid is not done
# again.
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -ne 0 ] && [ $# -ne 1 ] && [ $# -ne 4 ]; then
    echo "usage: bash run_pipeline.sh [CONFIG] [SYM IMG TEXT]" >&2
    exit 2
fi
config=${1:-configs/openclipart.yaml} sym=${2:-1} img=${3:-0.3} text=${4:-0.2}
if [ $# -eq 0 ] && ! command -v apt-get >/dev/null; then
    echo "there is no apt-get to fetch OpenClipart with: taking the synthetic pairs, configs/synthetic.yaml"
    config=configs/synthetic.yaml
fi
. ./setup_environment.sh requirements.txt

# Train with the weights given, evaluate, and leave the run's folder in $run.
train_and_evaluate() {
    local log
    log=$(mktemp)
    python train_cross_modal_retrieval_model.py "$@" --config "$config" --resume --refresh | tee "$log"
    run=$(sed -nE 's,^(wrote|up to date) (.*)/best\.pt$,\2,p' "$log")
    rm "$log"
    python evaluate.py --run "$run"
}

python prepare_dataset.py --config "$config"
python train_doc2vec.py --config "$config"
python extract_doc2vec_vectors.py --config "$config"
if grep -qE '(space: *(images|both)|^ +trainable: *false)\b' "$config"; then  # step 3 compares texts with the features
    python extract_image_features.py --config "$config"
fi
python knn_document_features.py --config "$config"
train_and_evaluate "$sym" 0 0
baseline=$run
train_and_evaluate "$sym" "$img" "$text"
method=$run
runs=("$baseline" "$method")
if [ $# -le 1 ] && grep -qE '^ +trainable: *false' "$config" && ! grep -qE '^ +(base|form): ' "$config"; then
    python knn_document_features.py --config "$config" --neighbors.space both
    train_and_evaluate 1 0 0 --neighbors.space both --loss.soft_targets 0.5
    runs+=("$run")
fi

echo
python compare_runs.py "${runs[@]}"
echo
echo "curves: .venv/bin/tensorboard --logdir $(dirname "$method")"
