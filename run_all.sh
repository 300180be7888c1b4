#!/usr/bin/env bash
# The whole study on one dataset; on the built-in demo without settings. Interrupt it, run it again: it goes on.
#
#   bash run_all.sh                                                          # the demo: minutes on a laptop
#   DRY_RUN=1 bash run_all.sh                                                # what it would do, and what is done
#   DATA=data/mine LAUNCH="torchrun --nproc_per_node 4" bash run_all.sh      # a folder of prepare.py, on 4 GPUs
#   DATA=data/mine SOURCE=/files/mine bash run_all.sh                        # which is prepared first
#   DATA="data/aptos2019 data/isic2019" bash run_all.sh                      # several, and one report
#
# All settings are environment variables; lists and flags are separated by blanks. On several machines, which share
# RUNS, start the same command on each, with LAUNCH="torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d
# --rdzv_endpoint HOST:29500" and NODE=0 on the first, NODE=1 on the next.
set -uf -o pipefail
refuse() { echo "error: $*" >&2; exit 2; }
case "${SOURCE:-}:${DATA:-}" in :*" "*) [ -d "$DATA" ] || {  # several datasets, one after the other, and one report
  studies=() code=0
  for folder in $DATA; do
    studies+=("${RUNS:-$(dirname "$0")/runs}/$(basename "$folder")")
    DATA=$folder RUNS=${studies[${#studies[@]} - 1]} bash "$0" || { [ $? != 130 ] || exit 130; code=1; }
  done
  [ -n "${PYTHON:-}" ] || [ ! -x "$(dirname "$0")/.venv/bin/python" ] || PYTHON=$(dirname "$0")/.venv/bin/python
  [ "${DRY_RUN:-0}" = 1 ] || "${PYTHON:-python3}" "$(dirname "$0")/report.py" "${studies[@]}" \
    --output "${RUNS:-$(dirname "$0")/runs}/report" || code=1
  exit $code; } ;;
esac
for name in DATA SOURCE RUNS; do  # relative to where the command was typed
  case ${!name:-/} in /*) ;; *) printf -v "$name" %s "$PWD/${!name}" ;; esac
done
cd "$(dirname "$0")" || exit 2
DATA=${DATA:-data/demo}
DATA=${DATA#"$PWD/"}

setting() {  # setting NAME DEMO PAPER: the value of NAME, where it is not set
  local value=$3
  [ "$DATA" != data/demo ] || value=$2
  [ -n "${!1+set}" ] || printf -v "$1" %s "$value"
}
#       name             on the demo                     on other data: the paper's
setting ARCHS           "resnet18 deit_tiny"            "resnet50 deit_small"
setting INITS           "random dino"                   "random imagenet imagenet-dino dino"  # dino: pretrained here
#                                                       further ones: imagenet-stats, dino-stats (see README.md)
setting SEEDS           "0"                             "0 1 2 3 4"
setting FOLDS           ""                              ""          # "0 1 2 3 4": cross-validation, of prepare.py --folds 5
setting IMAGE_SIZE      48                              224
setting EPOCHS          5                               50          # of fine-tuning
setting CAPACITY        "test_resnet test_vit"          "resnet18 resnet152 deit_tiny deit_base"  # figure 3, with ARCHS
setting CAPACITY_INITS  "random"                        "random imagenet"
setting DINO_EPOCHS     7                               100
setting DINO_INIT       random                          imagenet
setting DINO_PER_SEED   0                               0           # 1: each seed has a pretraining of its own
setting SEGMENT_INITS   "random"                        "$INITS"
setting SEGMENT_EPOCHS  3                               50
setting VIT_FLAGS       "--patch-size 8"                ""          # of every stage, where the architecture is a ViT
setting FINETUNE_FLAGS  "--lr 2.5e-4 --batch-size 16"   ""          # random weights, few images; the paper's is 1e-4
# DINO of the demo: a teacher that follows within its few steps; colours that stay what they are, as they tell the classes;
# no small crops, in which 48 pixels leave nothing of a texture
demo_dino="--batch-size 16 --lr 4e-3 --momentum-teacher 0.9 --local-crops 0 --jitter 0.2 0.2 0.1 0.02 --grey 0 --keep last"
setting DINO_FLAGS      "$demo_dino"                    ""
setting KNN_FLAGS       ""                              ""
setting SEGMENT_FLAGS   "--lr 5e-4 --output-stride 8 --limit 400"  ""
setting SALIENCY_FLAGS  "--images 4"                    "--images 4"
setting ATTENTION_FLAGS ""                              ""
setting LAYERS_FLAGS    "--limit 200"                   ""
setting DATA_FLAGS      "--amp off"                     ""          # of all stages: "--limit 1000"
setting PREPARE_FLAGS   ""                              ""          # "--label-column diagnosis --group-column patient"
setting RUNS            "runs/demo"                     "runs/$(basename "$DATA")"
setting SOURCE          ""                              ""
setting LAUNCH          ""                              ""          # torchrun with its flags; else one process
[ -z "$LAUNCH" ] || JOBS=${JOBS:-1}
setting JOBS            2                               1           # steps at once, where one leaves the machine idle
setting NODE            0                               "${SLURM_NODEID:-0}"
setting DRY_RUN         0                               0
RUNS=${RUNS#"$PWD/"}
for name in ARCHS INITS SEEDS; do
  [ -n "${!name// /}" ] || refuse "$name is empty; leave it out for the default, or name at least one"
done
case $JOBS in [1-9] | [1-9][0-9]) ;; *) refuse "JOBS=$JOBS: give how many steps to run at once, 1 to 99" ;; esac
[ "$JOBS" = 1 ] || [ -z "$LAUNCH" ] || refuse "JOBS=$JOBS: with LAUNCH=\"$LAUNCH\" one step runs at a time; leave one of both out"
if [ "$JOBS" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then  # the cores of a CPU are shared out
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores > JOBS ? cores / JOBS : 1))
fi

# ---- Python with the packages of requirements.txt: the active one, or .venv
needed='import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1].split())))'
packages="torch torchvision timm numpy PIL tqdm matplotlib"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  refuse "PYTHON=$PYTHON is no Python of version 3.10 or newer; set PYTHON=/path/to/it"
if [ "$DRY_RUN" != 1 ] && ! "$PYTHON" -c "$needed" "$packages"; then
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || exit 2
  PYTHON=$PWD/.venv/bin/python PATH=$PWD/.venv/bin:$PATH
  "$PYTHON" -c "$needed" "$packages" || { echo "installing requirements.txt into .venv" &&
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt; } || exit 2
fi

# ---- a step: skipped where this very command has finished, logged, named at the end where it fails
failed=() inputs=()
processes=() names=() begins=() commands=()  # of the steps that run
suffix=.log
[ "$NODE" = 0 ] || suffix=-node$NODE.log
end() {  # end PROCESS: and those that it has started, such as behind a wrapper
  local process children=$(pgrep -P "$1" 2>/dev/null)
  kill "$1" 2>/dev/null
  for process in $children; do end "$process"; done
}
interrupt() {
  local process
  for process in $(jobs -p); do end "$process"; done
  wait
  echo
  echo "interrupted; the same command goes on from here"
  exit 130
}
trap interrupt INT TERM
await() {  # await MOST [NAME]: until at most MOST steps run, and NAME is none of them
  local i code log why waiting=1
  while [ $waiting = 1 ]; do
    waiting=0
    for i in ${names[@]+"${!names[@]}"}; do
      log=$RUNS/logs/${names[i]}$suffix
      if kill -0 "${processes[i]}" 2>/dev/null; then
        [ "${names[i]}" != "${2:-}" ] || waiting=1
        continue
      fi
      wait "${processes[i]}" && code=0 || code=$?
      if [ $code = 0 ]; then
        echo "${commands[i]}" > "$RUNS/logs/${names[i]}.done"
        rm -f "$RUNS/logs/${names[i]}.failed"
        echo "done    ${names[i]} in $((SECONDS - begins[i])) s"
      else
        why=$(tr '\r' '\n' < "$log" | grep . | tail -n 1)
        [ $code -le 128 ] || why="killed by signal $((code - 128)): out of memory?"
        echo "$why" > "$RUNS/logs/${names[i]}.failed"
        echo "FAILED  ${names[i]}: $why (see $log)"
        failed+=("${names[i]}")
      fi
      unset "processes[i]" "names[i]" "begins[i]" "commands[i]"
    done
    [ ${#names[@]} -le "$1" ] || waiting=1
    [ $waiting = 0 ] || sleep 0.1
  done
}
step() {  # step NAME COMMAND...: done again where one of the runs `inputs` is newer
  local name=$1 done=$RUNS/logs/$1.done log=$RUNS/logs/$1$suffix output=${*: -1} stale=1 folder
  shift
  await $((JOBS - 1)) "$name"
  [ ! -f "$output" ] && [ ! -f "$output/metrics.json" ] && [ ! -f "$output/images.npy" ] || stale=0
  for folder in ${inputs[@]+"${inputs[@]}"}; do
    [ ! "$folder/metrics.json" -nt "$done" ] || stale=1
  done
  if [ $stale = 0 ] && [ "$(cat "$done" 2>/dev/null)" = "$*" ]; then
    echo "done    $name"
  elif [ "$DRY_RUN" = 1 ]; then
    echo "to do   $name: $*"
  else
    echo "starts  $name"
    echo "\$ $*" >> "$log"
    "$@" >> "$log" 2>&1 < /dev/null &
    processes+=($!) names+=("$name") begins+=($SECONDS) commands+=("$*")
  fi
}
[ "$DRY_RUN" = 1 ] || mkdir -p "$RUNS/logs" 2>/dev/null || refuse "RUNS=$RUNS cannot be written"
launch=($LAUNCH)
[ -n "$LAUNCH" ] || launch=("$PYTHON")
if [ ! -f "$DATA/images.npy" ] && [ -n "$SOURCE" ]; then
  step prepare "$PYTHON" prepare.py "$SOURCE" $PREPARE_FLAGS --output "$DATA"
elif [ ! -f "$DATA/images.npy" ] && [ "$DATA" = data/demo ]; then
  step prepare "$PYTHON" prepare.py demo --layout demo --output "$DATA"
fi
await 0
[ "$DRY_RUN" = 1 ] || [ -f "$DATA/images.npy" ] ||
  refuse "DATA=$DATA is no prepared folder; make it: python prepare.py SOURCE --output $DATA"
columns=$(head -n 1 "$DATA/labels.csv" 2>/dev/null | tr -d '\r')
case $FOLDS:$columns in
  :* | *:*,fold,* | *:*,fold) ;;
  *) [ "$DRY_RUN" = 1 ] || refuse "FOLDS=\"$FOLDS\": $DATA has no folds; prepare it with --folds 5" ;;
esac
classify=1 segment=0
case $columns in *,width | *,split | *,fold) classify=0 ;; esac
{ [ -f "$DATA/masks.npy" ] || [ "$DATA" = data/demo ]; } && segment=1
setting CLASSIFY $classify $classify
setting SEGMENT $segment $segment

# ---- the study
take_fold() {  # take_fold FOLD: what is done from here on is on it; none: on the split of the dataset
  data=(--data "$DATA" $DATA_FLAGS --image-size "$IMAGE_SIZE") at=
  [ "$1" = none ] || { data+=(--fold "$1") && at=-f$1; }
}
has() { case " $1 " in *" $2 "*) true ;; *) false ;; esac; }  # has LIST WORD
vit_flags() { case $1 in *vit* | *deit*) echo "$VIT_FLAGS" ;; esac; }  # vit_flags ARCH
dino_run() { [ "$DINO_PER_SEED" = 1 ] && echo "dino-$1-s$2$at" || echo "dino-$1$at"; }  # dino_run ARCH SEED
first=${SEEDS%% *}
folds=${FOLDS:-none}
for fold in $folds; do
  take_fold "$fold"
  for seed in $SEEDS; do
    for arch in $ARCHS; do
      has "$INITS" dino || has "$INITS" dino-stats || continue
      name=$(dino_run "$arch" "$seed")
      [ "$seed" != "$first" ] && [ "$DINO_PER_SEED" != 1 ] || step "$name" "${launch[@]}" pretrain_dino.py "${data[@]}" \
        --arch "$arch" $(vit_flags "$arch") --init "$DINO_INIT" --seed "$seed" --epochs "$DINO_EPOCHS" $DINO_FLAGS \
        --output "$RUNS/$name"
    done
    for pretrained in "" 1; do  # first what starts from nothing that is pretrained here
      for arch in $ARCHS $CAPACITY; do
        inits=$CAPACITY_INITS main=0
        ! has "$ARCHS" "$arch" || inits=$INITS main=1
        for init in $inits; do
          weights=$init name=$arch-$init-s$seed$at pretraining=
          case $init in dino | dino-stats)
            pretraining=$(dino_run "$arch" "$seed")
            weights=$RUNS/$pretraining/model.pt ;;
          esac
          [ "${pretraining:+1}" = "$pretrained" ] || continue
          [ -z "$pretraining" ] || await "$JOBS" "$pretraining"
          model=("${data[@]}" --arch "$arch" $(vit_flags "$arch") --init "$weights" --seed "$seed")
          [ "$init" != dino-stats ] || model+=(--init-stats)
          [ "$CLASSIFY" = 0 ] || step "finetune-$name" "${launch[@]}" finetune.py "${model[@]}" --epochs "$EPOCHS" \
            $FINETUNE_FLAGS --output "$RUNS/finetune-$name"
          [ $main = 1 ] || continue
          case $seed:$init:$DINO_PER_SEED in  # k-NN trains nothing: a seed matters where it makes other weights
            "$first":* | *:random:* | *-stats:* | *:dino:1)
              [ "$CLASSIFY" = 0 ] || step "knn-$name" "${launch[@]}" knn_eval.py "${model[@]}" $KNN_FLAGS \
                --output "$RUNS/knn-$name" ;;
          esac
          [ "$SEGMENT" = 0 ] || ! has "$SEGMENT_INITS" "$init" || step "segment-$name" "${launch[@]}" segment.py \
            "${model[@]}" --epochs "$SEGMENT_EPOCHS" $SEGMENT_FLAGS --output "$RUNS/segment-$name"
        done
      done
    done
  done
done

# ---- what looks at several runs: those of the first seed, and fold, that are there
await 0
take_fold "${folds%% *}"
collect() {  # collect STAGE: inputs becomes the fine-tuned runs that the stage looks at, pairs those with their starts
  inputs=() pairs=()
  for arch in $ARCHS; do
    for init in $INITS; do
      folder=$RUNS/finetune-$arch-$init-s$first$at
      case $1:$arch in saliency:* | layers:* | *:*vit* | *:*deit*) ;; *) continue ;; esac
      [ "$DRY_RUN" = 1 ] || [ -f "$folder/metrics.json" ] || continue
      inputs+=("$folder")
      case $1:$init in
        layers:dino-stats) ;;
        layers:dino) pairs+=(--pair "$RUNS/$(dino_run "$arch" "$first")/model.pt" "$folder") ;;
        layers:*) pairs+=(--pair "$init" "$folder") ;;
      esac
    done
  done
}
if [ "$NODE" = 0 ]; then
  for stage in layers saliency attn_distance; do  # the longest first, as two may run at once
    case $stage in
      saliency) flags=$SALIENCY_FLAGS ;;
      attn_distance) flags=$ATTENTION_FLAGS ;;
      layers) flags="--seed $first $LAYERS_FLAGS" ;;
    esac
    collect $stage
    [ "$CLASSIFY" = 0 ] || [ ${#inputs[@]} = 0 ] || step $stage "$PYTHON" $stage.py --runs "${inputs[@]}" \
      ${pairs[@]+"${pairs[@]}"} "${data[@]}" $flags --overwrite --output "$RUNS/$stage"
  done
  set -- $ARCHS
  inputs=("$RUNS/segment-$1-${SEGMENT_INITS##* }-s$first$at" "$RUNS/segment-${2:-}-${SEGMENT_INITS##* }-s$first$at")
  [ "$SEGMENT" = 0 ] || [ $# -lt 2 ] || step comparison "$PYTHON" segment.py --compare "${inputs[@]}" \
    --output "$RUNS/comparison-$1-$2.png"
  await 0
  [ "$DRY_RUN" = 1 ] || "$PYTHON" report.py "$RUNS" --output "$RUNS/report" || failed+=(report)
fi
[ ${#failed[@]} = 0 ] || { echo "${#failed[@]} steps failed: ${failed[*]}"; exit 1; }
