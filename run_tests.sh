#!/usr/bin/env bash
# Set up .venv and run the checks: ruff, then pytest.
#
#   bash run_tests.sh [--quick] [PYTEST ARGUMENTS]
#
# --quick leaves out the tests marked slow.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_environment.sh requirements.txt requirements-test.txt

selection=()
if [ "${1:-}" = --quick ]; then
    shift
    selection=(-m "not slow")
fi
ruff check .
ruff format --check .
# Most tests start scripts, of one thread each: as many at a time as there are cores, up to four.
python -m pytest -q -rs -n auto --maxprocesses 4 "${selection[@]}" "$@"
