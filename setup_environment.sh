# Sourced by run_pipeline.sh and run_tests.sh: makes .venv, installs the requirements named as arguments, activates it.
# Does nothing but activate where the same requirements are installed already.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2
    exit 2
fi
if [ ! -x .venv/bin/pip ]; then
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
