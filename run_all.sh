#!/usr/bin/env bash
# Every stage on one dataset; on the built-in demo without arguments. Run it again to go on where it stopped.
#
#   bash run_all.sh
#   DATASET=folder DATA_DIR=/data/mine ARCHS="resnet50 deit_small" IMAGE_SIZE=224 NPROC=4 bash run_all.sh
set -euo pipefail
cd "$(dirname "$0")"

DATASET=${DATASET:-demo}                 # as --dataset
DATA_DIR=${DATA_DIR:-}                   # as --data-dir
DATA_FLAGS=${DATA_FLAGS:-}               # further data flags, e.g. "--label-column diagnosis --split-column split"
ARCHS=${ARCHS:-resnet18 deit_tiny}       # the paper's: resnet50 deit_small
SEEDS=${SEEDS:-0}                        # the paper's: 0 1 2 3 4
IMAGE_SIZE=${IMAGE_SIZE:-96}             # the paper's: 224
EPOCHS=${EPOCHS:-30}                     # the paper's: until validation stops improving
FINETUNE_FLAGS=${FINETUNE_FLAGS:---lr 5e-4}  # from random init on few images; drop it for the paper's 1e-4
RUNS=${RUNS:-runs/$DATASET}              # where the run folders go
NPROC=${NPROC:-1}                        # processes (GPUs) of torchrun

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c "import torch, torchvision, timm, numpy, PIL, tqdm" 2>/dev/null; then
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  PYTHON=.venv/bin/python
  "$PYTHON" -c "import torch, torchvision, timm, numpy, PIL, tqdm" 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi

stage() {  # stage SCRIPT ARGUMENTS...
  echo "== $*"
  if [ "$NPROC" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" "$@"
  else
    "$PYTHON" "$@"
  fi
}

data="--dataset $DATASET ${DATA_DIR:+--data-dir $DATA_DIR} $DATA_FLAGS --image-size $IMAGE_SIZE"
for arch in $ARCHS; do
  for seed in $SEEDS; do
    run=$RUNS/finetune-$arch-random-s$seed
    stage finetune.py $data --arch "$arch" --seed "$seed" --epochs "$EPOCHS" $FINETUNE_FLAGS --output "$run"
    stage knn_eval.py $data --arch "$arch" --seed "$seed" --output "$RUNS/knn-$arch-random-s$seed"
    stage knn_eval.py $data --init "$run/model.pt" --seed "$seed" --output "$RUNS/knn-$arch-finetuned-s$seed"
  done
done

echo "== results ($RUNS)"
"$PYTHON" - "$RUNS" <<'PYTHON_CODE'
import json, pathlib, sys
import common
rows = []
for file in sorted(pathlib.Path(sys.argv[1]).glob("*/metrics.json")):
    run = json.loads(file.read_text())
    low, high = run["test"]["interval"] or (None, None)
    rows.append([file.parent.name, run["metric"], common.show(run["val"][run["metric"]]),
                 common.show(run["test"][run["metric"]]), f"{common.show(low)} to {common.show(high)}",
                 f"{run['seconds']:.0f}"])
common.print_table(["run", "metric", "val", "test", "95 % interval", "seconds"], rows)
PYTHON_CODE
