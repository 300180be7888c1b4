#!/usr/bin/env bash
# Set up what is missing and run the tests; arguments go to pytest. MEDVIT_DATA=DIR adds the tests on real images.
set -euo pipefail
cd "$(dirname "$0")/.."
needed="import torch, torchvision, timm, numpy, PIL, tqdm, matplotlib, pytest, sklearn, h5py, pydicom"
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c "$needed" 2>/dev/null; then
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  PYTHON=.venv/bin/python
  "$PYTHON" -c "$needed" 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest scikit-learn h5py pydicom
fi
[ $# = 0 ] || exec "$PYTHON" -m pytest -q "$@"

# everything: two halves side by side, a thread each, as these tiny models gain nothing from a second
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
half=$(printf "tests/test_%s.py " report pretrain models weights layers training folds attn_distance pictures)
log=$(mktemp)
export TESTS_DEMO=$(mktemp -d)  # the demo for both
"$PYTHON" -m pytest -q -p no:cacheprovider $half > "$log" 2>&1 &
beside=$!
trap 'rm -rf "$log" "$TESTS_DEMO"; kill $beside 2> /dev/null || true' EXIT
trap 'exit 130' INT TERM  # of which the one in the background hears nothing
code=0
"$PYTHON" -m pytest -q -p no:cacheprovider tests ${half//tests\//--ignore=tests/} || code=$?
wait $beside || code=$?
cat "$log"
exit $code
