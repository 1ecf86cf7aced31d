#!/usr/bin/env bash
# All tests, offline. Arguments go to pytest.
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1
python -m pytest "$@"
