# Sourced by scripts/demo.sh and scripts/test.sh: makes .venv, installs mxdsurgery into it with pinned versions, activates it.
# Does nothing when the installation is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "mxdsurgery needs Python 3.11 or newer; found $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
    exit 2
}
stamp=.venv/installed.txt
wanted=$(cat pyproject.toml constraints.txt | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "Installing mxdsurgery and its dependencies into .venv (a few minutes, once) ..." >&2
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,docs]'
    echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
