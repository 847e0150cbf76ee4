# Sourced by run_pipeline.sh and run_tests.sh: makes .venv, installs the requirements named as arguments, activates it.
# Where the same requirements are installed already, it only activates.

# An environment that was moved, or whose Python is gone, would silently hand over to the system's Python.
if ! { .venv/bin/python -c 'import pip' && grep -qF "$PWD/.venv" .venv/bin/activate; } 2>/dev/null; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        echo "Python 3.11, 3.12 or 3.13 is needed (gensim has no wheel for 3.14); name one with PYTHON=/path/to/python3" >&2
        exit 2
    fi
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "cannot make .venv; on Debian: apt-get install python3-venv" >&2
        exit 2
    fi
fi
wanted=$(cat "$@" | sha256sum)
installed=.venv/installed-$(printf '%s-' "$@")
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $* into .venv (torch and its libraries are 5 GB)"
    .venv/bin/pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@")
    echo "$wanted" >"$installed"
fi
. .venv/bin/activate
