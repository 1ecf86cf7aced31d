#!/usr/bin/env bash
# All tests, offline, a file at a time on each core. Arguments go to pytest.
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1  # the cores are shared by whole test files, not within one
# In the files' order: else those with few tests come last, and some of these take minutes.
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
