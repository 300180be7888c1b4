#!/usr/bin/env bash
# The whole study on one dataset; on the built-in demo without arguments. Interrupt it, run it again: it goes on.
#
#   bash run_all.sh
#   DRY_RUN=1 bash run_all.sh                      # the plan: steps, what is done, how long the rest may take
#   DATASET=folder DATA_DIR=/data/mine ARCHS="resnet50 deit_small" INITS="random imagenet dino" SEEDS="0 1 2 3 4" \
#     IMAGE_SIZE=224 EPOCHS=50 DINO_EPOCHS=100 FINETUNE_FLAGS= NPROC=4 bash run_all.sh
set -uo pipefail
cd "$(dirname "$0")"

DATASET=${DATASET:-demo}                     # as --dataset
DATA_DIR=${DATA_DIR:-}                       # as --data-dir
DATA_FLAGS=${DATA_FLAGS:-}                   # further data flags: "--label-column diagnosis --split-column split"
ARCHS=${ARCHS:-resnet18 deit_tiny}           # the paper's: resnet50 deit_small
CAPACITY=${CAPACITY-resnet50 deit_small}     # further ones for the capacity figure, fine-tuned from CAPACITY_INITS
CAPACITY_INITS=${CAPACITY_INITS:-random}
INITS=${INITS:-random dino}                  # the paper's: random imagenet dino (dino: pretrained here, on DATASET)
DINO_INIT=${DINO_INIT:-random}               # what pretraining starts from; the paper's: imagenet
SEEDS=${SEEDS:-0}                            # the paper's: 0 1 2 3 4
IMAGE_SIZE=${IMAGE_SIZE:-64}                 # the paper's: 224
EPOCHS=${EPOCHS:-8}                          # of fine-tuning; the paper's: until validation stops improving
DINO_EPOCHS=${DINO_EPOCHS:-4}
SEGMENT_EPOCHS=${SEGMENT_EPOCHS:-5}
SEGMENT_INITS=${SEGMENT_INITS:-random}       # of INITS
SEGMENT=${SEGMENT:-$([ "$DATASET" = demo ] && echo 1 || echo 0)}  # 1: segmentation as well (needs masks)
CLASSIFY=${CLASSIFY:-1}                      # 0: the dataset has masks only
FINETUNE_FLAGS=${FINETUNE_FLAGS---lr 1e-3}   # from random weights on few images; empty for the paper's 1e-4
DINO_FLAGS=${DINO_FLAGS:-}
KNN_FLAGS=${KNN_FLAGS:-}
SEGMENT_FLAGS=${SEGMENT_FLAGS---lr 5e-4 --output-stride 16 --limit 300}  # the paper's stride is 8
SALIENCY_FLAGS=${SALIENCY_FLAGS:---images 6}
ATTENTION_FLAGS=${ATTENTION_FLAGS:-}
RUNS=${RUNS:-runs/$DATASET}                  # where the run folders go
NPROC=${NPROC:-1}                            # processes (GPUs) per machine, by torchrun
NNODES=${NNODES:-1}                          # machines; start the same command on each, with
RDZV=${RDZV:-localhost:29500}                # the first machine's host:port
DRY_RUN=${DRY_RUN:-0}

# ---- Python with the packages of requirements.txt: the active one, or .venv
PYTHON=${PYTHON:-python3}
needed="import torch, torchvision, timm, numpy, PIL, tqdm"
if ! "$PYTHON" -c "$needed" 2>/dev/null; then
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || exit 2
  PYTHON=.venv/bin/python
  if ! "$PYTHON" -c "$needed" 2>/dev/null; then
    echo "installing requirements.txt into .venv"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit 2
  fi
fi

# ---- the plan: a name, the run folder or file it makes, what must be there first, and the command
names=() outputs=() needs=() commands=()
step() {  # step NAME OUTPUT NEEDS COMMAND...
  names+=("$1") outputs+=("$2") needs+=("$3")
  shift 3
  commands+=("$*")
}

data="--dataset $DATASET ${DATA_DIR:+--data-dir $DATA_DIR} $DATA_FLAGS --image-size $IMAGE_SIZE"
set -- $SEEDS
first_seed=$1
start_from() {  # start_from INIT ARCH: what --init takes
  [ "$1" = dino ] && echo "$RUNS/dino-$2/model.pt" || echo "$1"
}
wanted_file() {  # the file that has to be there before INIT can be used
  [ "$1" = dino ] && echo "$RUNS/dino-$2/metrics.json" || echo ""
}
for arch in $ARCHS; do
  case " $INITS " in *" dino "*)
    step "dino-$arch" "$RUNS/dino-$arch" "" pretrain_dino.py $data --arch "$arch" --init "$DINO_INIT" \
      --seed "$first_seed" --epochs "$DINO_EPOCHS" $DINO_FLAGS --output "$RUNS/dino-$arch" ;;
  esac
done
tuned=() vits=()
if [ "$CLASSIFY" = 1 ]; then
  for seed in $SEEDS; do
    for init in $INITS; do
      for arch in $ARCHS; do
        name=finetune-$arch-$init-s$seed
        step "$name" "$RUNS/$name" "$(wanted_file "$init" "$arch")" finetune.py $data --arch "$arch" \
          --init "$(start_from "$init" "$arch")" --seed "$seed" --epochs "$EPOCHS" $FINETUNE_FLAGS --output "$RUNS/$name"
        if [ "$seed" = "$first_seed" ]; then
          tuned+=("$RUNS/$name")
          case $arch in *vit*|*deit*) vits+=("$RUNS/$name") ;; esac
          name=knn-$arch-$init-s$seed
          step "$name" "$RUNS/$name" "$(wanted_file "$init" "$arch")" knn_eval.py $data --arch "$arch" \
            --init "$(start_from "$init" "$arch")" --seed "$seed" $KNN_FLAGS --output "$RUNS/$name"
        fi
      done
    done
    for init in $CAPACITY_INITS; do
      for arch in $CAPACITY; do
        name=finetune-$arch-$init-s$seed
        step "$name" "$RUNS/$name" "" finetune.py $data --arch "$arch" --init "$init" --seed "$seed" \
          --epochs "$EPOCHS" $FINETUNE_FLAGS --output "$RUNS/$name"
      done
    done
  done
fi
if [ "$SEGMENT" = 1 ]; then
  for seed in $SEEDS; do
    for init in $SEGMENT_INITS; do
      for arch in $ARCHS; do
        name=segment-$arch-$init-s$seed
        step "$name" "$RUNS/$name" "$(wanted_file "$init" "$arch")" segment.py $data --arch "$arch" \
          --init "$(start_from "$init" "$arch")" --seed "$seed" --epochs "$SEGMENT_EPOCHS" $SEGMENT_FLAGS --output "$RUNS/$name"
      done
    done
  done
  set -- $ARCHS
  if [ $# -ge 2 ]; then
    last_init=${SEGMENT_INITS##* }
    a=$RUNS/segment-$1-$last_init-s$first_seed b=$RUNS/segment-$2-$last_init-s$first_seed
    step comparison "$RUNS/comparison.png" "$a/metrics.json $b/metrics.json" segment.py --compare "$a" "$b" \
      --output "$RUNS/comparison.png"
  fi
fi
if [ ${#tuned[@]} -gt 0 ]; then
  step saliency "$RUNS/saliency" "${tuned[*]/%//metrics.json}" saliency.py --runs ${tuned[*]} $data $SALIENCY_FLAGS \
    --output "$RUNS/saliency"
fi
if [ ${#vits[@]} -gt 0 ]; then
  step attn_distance "$RUNS/attn_distance" "${vits[*]/%//metrics.json}" attn_distance.py --runs ${vits[*]} $data \
    $ATTENTION_FLAGS --output "$RUNS/attn_distance"
fi

# ---- what is done, and how long the rest may take: the mean of the finished steps of the same script
finished() {  # finished I: its output is there, made by this very command
  case ${outputs[$1]} in
    *.png) [ -s "${outputs[$1]}" ] ;;
    *) [ -f "${outputs[$1]}/metrics.json" ] && grep -qF "\"command\": \"${commands[$1]}\"" "${outputs[$1]}/args.json" ;;
  esac
}
clock() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }
remaining() {  # remaining FROM: seconds that the unfinished steps may take, "unknown" before anything was measured
  local i script total=0 known=0
  for ((i = $1; i < ${#names[@]}; i++)); do
    finished "$i" && continue
    script=${commands[$i]%% *}
    if [ -s "$RUNS/logs/seconds" ]; then
      known=$(awk -v s="$script" '$1 == s {n++; t += $2} {m++; a += $2} END {print int(n ? t / n : a / m)}' "$RUNS/logs/seconds")
      total=$((total + known))
    fi
  done
  if [ -s "$RUNS/logs/seconds" ]; then echo "about $(clock $total)"; else echo unknown; fi
}
count=${#names[@]}
if [ "$DRY_RUN" = 1 ]; then
  for ((i = 0; i < count; i++)); do
    finished "$i" && state=done || state=todo
    printf '%-4s %s\n     %s\n' "$state" "${names[$i]}" "${commands[$i]}"
  done
  echo "$count steps, remaining $(remaining 0)"
  exit 0
fi

# ---- one at a time: a second copy on the same folder says who holds it
mkdir -p "$RUNS/logs" || exit 2
if [ "$NNODES" = 1 ]; then
  exec 9>>"$RUNS/.lock"
  if ! "$PYTHON" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2>/dev/null; then
    echo "error: $RUNS is in use by process $(tail -n 1 "$RUNS/.lock"); wait for it, or set RUNS to another folder" >&2
    exit 2
  fi
  echo $$ >> "$RUNS/.lock"
fi
trap 'echo; echo "interrupted; bash run_all.sh goes on from here"; exit 130' INT TERM

begin=$SECONDS failed=()
for ((i = 0; i < count; i++)); do
  name=${names[$i]} log=$RUNS/logs/${names[$i]}.log
  head="[$((i + 1))/$count, $(clock $((SECONDS - begin))) elapsed"
  if finished "$i"; then
    echo "$head] $name: complete"
    continue
  fi
  for file in ${needs[$i]}; do
    if [ ! -f "$file" ]; then
      echo "$head] $name: left out, $file is missing"
      failed+=("$name: left out, $file is missing")
      continue 2
    fi
  done
  echo "$head, remaining $(remaining "$i")] $name"
  started=$SECONDS
  # only training and features gain from several processes; the other stages are single-process
  case "$NPROC$NNODES ${commands[$i]}" in
    11\ *|*\ --compare*|*\ saliency.py*) launch=("$PYTHON") ;;
    *) launch=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC")
       [ "$NNODES" = 1 ] && launch+=(--standalone) || launch+=(--rdzv_backend c10d --rdzv_endpoint "$RDZV") ;;
  esac
  if "${launch[@]}" ${commands[$i]} > "$log" 2>&1; then
    echo "${commands[$i]%% *} $((SECONDS - started))" >> "$RUNS/logs/seconds"
  else
    code=$?
    [ $code -ge 130 ] && exit $code
    failed+=("$name: exit code $code, $(tr '\r' '\n' < "$log" | grep . | tail -n 1 | cut -c 1-200) (log: $log)")
    echo "    failed: ${failed[-1]}"
  fi
done

"$PYTHON" report.py "$RUNS" --output "$RUNS/report" || failed+=("report")
echo "$count steps in $(clock $((SECONDS - begin)))"
if [ ${#failed[@]} -gt 0 ]; then
  echo "${#failed[@]} steps failed:"
  printf '  %s\n' "${failed[@]}"
  exit 1
fi
