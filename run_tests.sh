#!/usr/bin/env bash
# Set up .venv and run the checks: ruff, mypy, the import contracts, then pytest.
#
#   bash run_tests.sh [--quick] [PYTEST ARGUMENTS]
#
# --quick leaves out the tests marked slow, and tries few examples of each property. The full tier tries 1,000.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_environment.sh requirements.txt requirements-test.txt requirements-encoders.txt

selection=()
export HYPOTHESIS_PROFILE=full
if [ "${1:-}" = --quick ]; then
    shift
    selection=(-m "not slow")
    HYPOTHESIS_PROFILE=quick
fi
ruff check .
ruff format --check .
mypy
PYTHONPATH=. lint-imports --no-cache
# Most tests start scripts, of one thread each: as many at a time as there are cores, up to four.
python -m pytest -q -rs -n auto --maxprocesses 4 "${selection[@]}" "$@"
