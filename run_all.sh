#!/usr/bin/env bash
# The whole study on one dataset; on the built-in demo without arguments. Interrupt it, run it again: it goes on.
#
#   bash run_all.sh                                              # the demo: minutes on a laptop
#   DRY_RUN=1 bash run_all.sh                                    # the plan: steps, what is done, time left
#   DATA=data/mine NPROC=4 bash run_all.sh                       # the paper's settings on a folder of prepare.py
#   DATA=data/mine SOURCE=/files/mine bash run_all.sh            # which is prepared first
#
# All settings are environment variables; lists and flags are separated by blanks.
set -ufo pipefail
from=$PWD
cd "$(dirname "$0")" || exit 2

DATA=${DATA:-data/demo}     # the prepared folder, as --data; data/demo makes itself
SOURCE=${SOURCE:-}          # what to prepare into it, if it is not there, with
PREPARE_FLAGS=${PREPARE_FLAGS:-}  # these flags of prepare.py: "--label-column diagnosis --group-column patient"
DATA_FLAGS=${DATA_FLAGS:-}  # further flags of all stages: "--limit 1000"
demo=0
[ "$DATA" != data/demo ] || demo=1
RUNS=${RUNS:-$PWD/runs/$(basename "$DATA")}  # where the run folders go
[ $demo = 1 ] || case $DATA in /*) ;; *) DATA=$from/$DATA ;; esac
case ${SOURCE:-/} in /*) ;; *) SOURCE=$from/$SOURCE ;; esac
case $RUNS in /*) ;; *) RUNS=$from/$RUNS ;; esac
RUNS=${RUNS#"$PWD/"} DATA=${DATA#"$PWD/"}

refuse() { echo "error: $*" >&2; exit 2; }
if [ $demo = 0 ] && [ ! -f "$DATA/images.npy" ] && [ -z "$SOURCE" ]; then
  refuse "DATA=$DATA is no prepared folder; make it: python prepare.py SOURCE --output $DATA"
fi

default() {  # default VARIABLE DEMO OTHER: DEMO on the demo, OTHER on any other data, unless the variable is set
  local value=$3
  [ $demo = 0 ] || value=$2
  [ -n "${!1+set}" ] || printf -v "$1" %s "$value"
}
#       variable         the demo's               all others': the paper's
default ARCHS           "resnet18 deit_tiny"     "resnet50 deit_small"
default INITS           "random dino"            "random imagenet dino"  # dino: pretrained here, on DATA's own images
default SEEDS           "0"                      "0 1 2 3 4"
default IMAGE_SIZE      64                       224             # pixels
default EPOCHS          5                        50              # of fine-tuning
default CAPACITY        "resnet50 deit_small"    "resnet18 resnet152 deit_tiny deit_base"  # capacity series, + ARCHS
default CAPACITY_INITS  "random"                 "random imagenet"
default DINO_EPOCHS     2                        100
default DINO_INIT       "random"                 "auto"  # auto: imagenet if all its weights can be had, else random
default DINO_PER_SEED   0                        0       # 1: each seed has its own pretraining; 0: all share one
default SEGMENT         auto                     auto    # 1: segmentation (auto: where there are masks)
default CLASSIFY        auto                     auto    # 0: no classification (auto: where there are labels)
default SEGMENT_INITS   "random"                 "$INITS"
default SEGMENT_EPOCHS  4                        50
default FINETUNE_FLAGS  "--lr 1e-3"              ""      # from random weights on few images; the paper's is 1e-4
default DINO_FLAGS      ""                       ""
default KNN_FLAGS       ""                       ""
default SEGMENT_FLAGS   "--lr 5e-4 --output-stride 16 --limit 200"  ""
default SALIENCY_FLAGS  "--images 4"             "--images 4"
default ATTENTION_FLAGS ""                       ""
default NPROC           1                        1       # processes (GPUs) per machine, by torchrun
default NNODES          1                        1       # machines: start the same command on each, with
default RDZV            localhost:29500          localhost:29500   # the first machine's host:port, and
default NODE            "${SLURM_NODEID:-0}"     "${SLURM_NODEID:-0}"  # this machine's number; RUNS is shared
default DRY_RUN         0                        0
variables="DATA SOURCE PREPARE_FLAGS DATA_FLAGS RUNS ARCHS INITS SEEDS IMAGE_SIZE EPOCHS CAPACITY CAPACITY_INITS DINO_EPOCHS
  DINO_INIT DINO_PER_SEED SEGMENT CLASSIFY SEGMENT_INITS SEGMENT_EPOCHS FINETUNE_FLAGS DINO_FLAGS KNN_FLAGS
  SEGMENT_FLAGS SALIENCY_FLAGS ATTENTION_FLAGS NPROC NNODES"

# ---- mistakes that can be seen before anything starts
holds() { case " $1 " in *" $2 "*) true ;; *) false ;; esac; }  # holds LIST WORD
for name in ARCHS INITS SEEDS; do
  [ -n "${!name// /}" ] || refuse "$name is empty; leave it out for the default, or name at least one"
done
for name in SEEDS IMAGE_SIZE EPOCHS DINO_EPOCHS SEGMENT_EPOCHS NPROC NNODES NODE; do
  case ${!name// /} in ''|*[!0-9]*) refuse "$name=${!name}: expected whole numbers" ;; esac
done
for name in $INITS $CAPACITY_INITS $SEGMENT_INITS; do
  holds "random imagenet imagenet-dino dino" "$name" ||
    refuse "INITS, CAPACITY_INITS, SEGMENT_INITS: $name is none of random, imagenet, imagenet-dino, dino"
  [ "$name" != dino ] || holds "$INITS" dino || refuse "dino has to be in INITS as well: that makes its weights"
done
holds "$CAPACITY_INITS" dino && refuse "CAPACITY_INITS: dino is pretrained for ARCHS only; name them there"
holds "auto random imagenet imagenet-dino" "$DINO_INIT" ||
  refuse "DINO_INIT=$DINO_INIT: expected auto, random, imagenet or imagenet-dino"

# ---- Python with the packages of requirements.txt: the active one, or .venv; then the names of ARCHS
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" > /dev/null || refuse "PYTHON=$PYTHON: there is no such program; Python 3.10 or newer is needed"
check='
import sys
if sys.version_info < (3, 10):
    sys.exit(f"error: this is Python {sys.version.split()[0]}, and 3.10 or newer is needed; set PYTHON=/path/to/it")
try:
    import torch, torchvision, timm, numpy, PIL, tqdm, matplotlib
except Exception:
    sys.exit(3)
import common
unknown = [arch for arch in sys.argv[1:] if not timm.is_model(common.ARCHS.get(arch, arch).split(".")[0])]
if unknown:
    sys.exit(f"error: ARCHS, CAPACITY: {unknown[0]} is none of " + ", ".join(common.ARCHS) + ", nor a model of timm")
'
"$PYTHON" -c "$check" $ARCHS $CAPACITY
code=$?
if [ $code = 3 ] && [ "$DRY_RUN" = 1 ]; then
  echo "note: would first install requirements.txt into .venv"
elif [ $code = 3 ]; then
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || exit 2
  PYTHON=$PWD/.venv/bin/python
  if ! "$PYTHON" -c "import torch, torchvision, timm, numpy, PIL, tqdm, matplotlib" 2>/dev/null; then
    echo "installing requirements.txt into .venv"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit 2
  fi
  "$PYTHON" -c "$check" $ARCHS $CAPACITY || exit 2
elif [ $code != 0 ]; then
  exit 2
fi

# ---- the prepared folder: what is in it decides which stages run
if [ ! -f "$DATA/images.npy" ]; then
  [ $demo = 1 ] && prepare=(prepare.py demo --layout demo --output "$DATA") ||
    prepare=(prepare.py "$SOURCE" --output "$DATA" $PREPARE_FLAGS)
  if [ "$DRY_RUN" = 1 ]; then
    echo "note: would first prepare $DATA: python ${prepare[*]}"
  else
    "$PYTHON" "${prepare[@]}" || exit 2
  fi
fi
if [ "$SEGMENT" = auto ]; then
  SEGMENT=0
  { [ $demo = 0 ] && [ ! -f "$DATA/masks.npy" ]; } || SEGMENT=1
fi
if [ "$CLASSIFY" = auto ]; then
  CLASSIFY=1
  others=$(head -n 1 "$DATA/labels.csv" 2>/dev/null | tr -d '\r' | tr , '\n' |
    grep -cvxE "image|split|fold|group|height|width")
  [ ! -f "$DATA/labels.csv" ] || [ "$others" -gt 0 ] || CLASSIFY=0
fi

# ---- ImageNet weights: no stage shall wait for a network that is not there; DINO_INIT=auto is settled once for all
set -- $SEEDS
first_seed=$1
dino_run() {  # dino_run ARCH SEED: the folder of the pretraining that this seed uses
  [ "$DINO_PER_SEED" = 1 ] && echo "$RUNS/dino-$1-s$2" || echo "$RUNS/dino-$1"
}
reach='import os, urllib.request as r; r.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)'
load='import sys, common; [common.published_weights(arch, "imagenet") for arch in sys.argv[1:]]'
case " $INITS $CAPACITY_INITS $SEGMENT_INITS $(holds "$INITS" dino && echo "$DINO_INIT") " in
  *imagenet*|*auto*)
    if [ "$DRY_RUN" != 1 ] && [ -z "${HF_HUB_OFFLINE:-}" ] && ! "$PYTHON" -c "$reach" 2>/dev/null; then
      export HF_HUB_OFFLINE=1
      echo "note: no way to huggingface.co from here; ImageNet weights are used where they are on this machine"
    fi ;;
esac
if [ "$DINO_INIT" = auto ] && holds "$INITS" dino; then
  for arch in $ARCHS; do  # what an earlier start settled
    file=$(dino_run "$arch" "$first_seed")/args.json
    [ -f "$file" ] && DINO_INIT=$(sed -n 's/^ *"init": "\([a-z-]*\)".*/\1/p' "$file" | head -n 1) && break
  done
  if [ "$DINO_INIT" = auto ] && [ "$DRY_RUN" = 1 ]; then
    echo "note: DINO starts from imagenet if its weights for $ARCHS can be had, else from random (DINO_INIT=auto)"
    DINO_INIT=imagenet
  elif [ "$DINO_INIT" = auto ]; then
    "$PYTHON" -c "$load" $ARCHS > /dev/null 2>&1 && DINO_INIT=imagenet || DINO_INIT=random
    echo "note: DINO starts from $DINO_INIT (DINO_INIT=auto)"
  fi
fi

# ---- the plan: a name, the run folder or picture it makes, the files that must be there first, and the command
names=() outputs=() needs=() commands=()
quoted() {  # quoted WORD...: as Python's shlex.join, and so args.json, writes them
  local LC_ALL=C word text="" mark="'\"'\"'"
  for word in "$@"; do
    case $word in ''|*[!a-zA-Z0-9@%+=:,./_-]*) word="'${word//\'/$mark}'" ;; esac
    text="$text $word"
  done
  printf '%s' "${text# }"
}
step() {  # step NAME OUTPUT NEEDS COMMAND...  (NEEDS: a file a line)
  holds "${names[*]-}" "$1" && return
  names+=("$1") outputs+=("$2") needs+=("$3")
  shift 3
  commands+=("$(quoted "$@")")
}
per_model() {  # per_model STAGE ARCH INIT SEED COMMAND...: a step that starts a model of ARCH from INIT
  local name=$1-$2-$3-s$4 arch=$2 init=$3 seed=$4 need=""
  shift 4
  if [ "$init" = dino ]; then
    init=$(dino_run "$arch" "$seed")/model.pt
    need=${init%/model.pt}/metrics.json
  fi
  step "$name" "$RUNS/$name" "$need" "$@" --arch "$arch" --init "$init" --seed "$seed" --output "$RUNS/$name"
}
data=(--data "$DATA" $DATA_FLAGS --image-size "$IMAGE_SIZE")
tuned="" vits="" end=$'\n'
for seed in $SEEDS; do
  for arch in $ARCHS; do
    folder=$(dino_run "$arch" "$seed")
    holds "$INITS" dino && step "${folder##*/}" "$folder" "" pretrain_dino.py "${data[@]}" --arch "$arch" \
      --init "$DINO_INIT" --seed "$seed" --epochs "$DINO_EPOCHS" $DINO_FLAGS --output "$folder"
  done
done
for seed in $SEEDS; do
  [ "$CLASSIFY" = 1 ] || break
  for init in $INITS; do
    for arch in $ARCHS; do
      per_model finetune "$arch" "$init" "$seed" finetune.py "${data[@]}" --epochs "$EPOCHS" $FINETUNE_FLAGS
      # k-NN trains nothing: a seed matters where it makes other weights
      case $seed:$init:$DINO_PER_SEED in
        $first_seed:*|*:random:*|*:dino:1)
          per_model knn "$arch" "$init" "$seed" knn_eval.py "${data[@]}" $KNN_FLAGS ;;
      esac
      if [ "$seed" = "$first_seed" ]; then
        file=$RUNS/finetune-$arch-$init-s$seed/metrics.json
        tuned=$tuned$file$end
        case $arch in *vit*|*deit*) vits=$vits$file$end ;; esac
      fi
    done
  done
  for init in $CAPACITY_INITS; do
    for arch in $CAPACITY; do
      per_model finetune "$arch" "$init" "$seed" finetune.py "${data[@]}" --epochs "$EPOCHS" $FINETUNE_FLAGS
    done
  done
done
if [ "$SEGMENT" = 1 ]; then
  for seed in $SEEDS; do
    for init in $SEGMENT_INITS; do
      for arch in $ARCHS; do
        per_model segment "$arch" "$init" "$seed" segment.py "${data[@]}" --epochs "$SEGMENT_EPOCHS" $SEGMENT_FLAGS
      done
    done
  done
  set -- $ARCHS
  if [ $# -ge 2 ]; then
    a=$RUNS/segment-$1-${SEGMENT_INITS##* }-s$first_seed b=$RUNS/segment-$2-${SEGMENT_INITS##* }-s$first_seed
    name=comparison-$1-$2
    step "$name" "$RUNS/$name.png" "$a/metrics.json$end$b/metrics.json$end" segment.py --compare "$a" "$b" \
      --output "$RUNS/$name.png"
  fi
fi
look() {  # look STAGE FILES FLAGS...: a step that looks at several runs, and is made anew when they change
  local stage=$1 files=$2 file runs=()
  shift 2
  [ -n "$files" ] || return
  while IFS= read -r file; do [ -n "$file" ] && runs+=("${file%/metrics.json}"); done <<< "$files"
  step "$stage" "$RUNS/$stage" "$files" "$stage.py" --runs "${runs[@]}" "${data[@]}" "$@" --overwrite \
    --output "$RUNS/$stage"
}
look saliency "$tuned" $SALIENCY_FLAGS
look attn_distance "$vits" $ATTENTION_FLAGS
count=${#names[@]}
[ "$count" -gt 0 ] || refuse "nothing to do: CLASSIFY=$CLASSIFY and SEGMENT=$SEGMENT"

# ---- what is done, and how long the rest may take
json=()  # the commands as args.json has them
while IFS= read -r line; do json+=("$line"); done < <(printf '%s\0' "${commands[@]}" | "$PYTHON" -c \
  'import json, sys; print(*map(json.dumps, sys.stdin.read().split("\0")[:-1]), sep="\n")')

finished() {  # finished I: its output is there, made by this very command
  local last=${outputs[$1]}/metrics.json file
  case ${outputs[$1]} in
    *.png) last=${outputs[$1]%.png}.json ;;
    *) grep -qsF "\"command\": ${json[$1]}," "${outputs[$1]}/args.json" || return 1 ;;
  esac
  [ -s "$last" ] || return 1
  case ${commands[$1]} in *" --overwrite "*|*" --compare "*)
    while IFS= read -r file; do [ "$file" -nt "$last" ] && return 1; done <<< "${needs[$1]}" ;;
  esac
  return 0
}
settle() {  # settle I: a step that looks at several runs does without those that failed
  local file kept=""
  case ${commands[$1]} in *" --runs "*) ;; *) return ;; esac
  while IFS= read -r file; do
    [ -f "$file" ] && kept=$kept$file$end && continue
    file=" $(quoted "${file%/metrics.json}") "
    commands[$1]=${commands[$1]/"$file"/ }
  done <<< "${needs[$1]}"
  [ -n "$kept" ] || return
  needs[$1]=$kept
  json[$1]=$("$PYTHON" -c 'import json, sys; print(json.dumps(sys.argv[1]))' "${commands[$1]}")
}
clock() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }
kind() {  # kind I: its script and architecture
  local arch="-"
  case ${commands[$1]} in *" --arch "*) arch=${commands[$1]#* --arch } arch=${arch%% *} ;; esac
  printf '%s %s' "${commands[$1]%% *}" "$arch"
}
# logs/steps.tsv: name, script and architecture, exit code, seconds (- if it did not start from nothing), last words
remaining() {  # remaining FROM: the unfinished steps, each as long as the mean of its like so far
  local i
  for ((i = $1; i < count; i++)); do finished "$i" || { kind "$i"; echo; }; done |
    awk -F'\t' -v file="$RUNS/logs/steps.tsv" '
      BEGIN {
        while ((getline < file) > 0) if (NF == 5 && $3 == "0" && $4 ~ /^[0-9]+$/) {
          split($2, word, " ")
          n[$2]++; sum[$2] += $4; n[word[1]]++; sum[word[1]] += $4; all++; total += $4
        }
      }
      { split($0, word, " "); k = n[$0] ? $0 : word[1]; left += n[k] ? sum[k] / n[k] : all ? total / all : 0 }
      END { if (all || !NR) print int(left) }' | { read -r left && echo "about $(clock "$left")" || echo unknown; }
}
if [ "$DRY_RUN" = 1 ]; then
  for ((i = 0; i < count; i++)); do
    finished "$i" && state=done || state=todo
    printf '%-4s %s\n     %s\n' "$state" "${names[$i]}" "${commands[$i]}"
  done
  echo "$count steps, remaining $(remaining 0)"
  exit 0
fi

# ---- one study at a time in a folder. A step inherits the lock: it holds on if this script alone is killed
host=$(hostname)
mkdir -p "$RUNS/logs" 2>/dev/null && { true >> "$RUNS/logs/steps.tsv"; } 2>/dev/null ||
  refuse "RUNS=$RUNS cannot be written"
if [ "$NNODES" = 1 ]; then
  exec 9>>"$RUNS/.lock"
  for try in 1 2 3 4 5 6; do
    "$PYTHON" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2>/dev/null && break
    read -r where script child name < "$RUNS/.lock"
    if [ "${where:-}" != "$host" ] || kill -0 "${script:-0}" 2>/dev/null; then
      refuse "$RUNS is in use by process ${script:-?} on ${where:-?}, at ${name:-its start}; wait for it, or set RUNS" \
        "to another folder"
    elif kill -0 "$child" 2>/dev/null; then
      refuse "$RUNS is in use: run_all.sh is gone, but its step $name still runs as process $child; wait for it, or" \
        "end it with: kill $child"
    fi
    [ "$try" = 6 ] && refuse "$RUNS is still in use by what process ${child:-?} on $host left behind; try again soon"
    sleep 1  # the workers of a killed step end by themselves
  done
  echo "$host $$ $$ its start" > "$RUNS/.lock"
fi
[ -z "$(tail -c 1 "$RUNS/logs/steps.tsv")" ] || echo >> "$RUNS/logs/steps.tsv"  # torn by a power cut
child=""
stop() {  # stop SIGNAL CODE: end the step, which keeps its last finished epoch
  trap '' INT TERM
  [ -n "$child" ] && kill "-$1" "$child" 2>/dev/null && wait "$child"
  echo; echo "interrupted; the same command goes on from here"
  exit "$2"
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
for name in $variables; do printf '%s=%s ' "$name" "$(quoted "${!name}")"; done > "$RUNS/logs/settings"
echo "bash run_all.sh" >> "$RUNS/logs/settings"

# a shell starts its background processes deaf to Ctrl-C; this one makes them hear again
start='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])'
begin=$SECONDS failed=()
record() { printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$(kind "$i")" "$1" "$2" "$3" >> "$RUNS/logs/steps.tsv"; }
for ((i = 0; i < count; i++)); do
  name=${names[$i]} log=$RUNS/logs/${names[$i]}.log
  head="[$((i + 1))/$count, $(clock $((SECONDS - begin))) elapsed"
  settle "$i"
  if finished "$i"; then
    echo "$head] $name: complete"
    continue
  fi
  while IFS= read -r file; do
    if [ -n "$file" ] && [ ! -f "$file" ]; then
      echo "$head] $name: left out, $file is missing"
      failed+=("$name: left out, $file is missing")
      record "left out" - "$file is missing"
      continue 2
    fi
  done <<< "${needs[$i]}"
  launch=("$PYTHON")  # training and features gain from several processes; the other stages take one
  case "$NPROC:$NNODES:${commands[$i]}" in
    1:1:*) ;;
    *" --compare "*|*:saliency.py*) [ "$NODE" = 0 ] || continue ;;
    *) launch+=(-m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC")
       [ "$NNODES" = 1 ] && launch+=(--standalone) || launch+=(--rdzv_backend c10d --rdzv_endpoint "$RDZV")
       [ "$NODE" = 0 ] || log=$RUNS/logs/$name-node$NODE.log ;;
  esac
  printf '%s, remaining %s] %s: ' "$head" "$(remaining "$i")" "$name"
  started=$SECONDS whole=1
  [ -e "${outputs[$i]}" ] && whole=0  # goes on where it stopped: its seconds say nothing about the next
  eval "words=(${commands[$i]})"
  echo "\$ ${launch[*]} ${commands[$i]}" >> "$log"
  "$PYTHON" -c "$start" "${launch[@]}" "${words[@]}" < /dev/null >> "$log" 2>&1 &
  child=$!
  [ "$NNODES" != 1 ] || echo "$host $$ $child $name" > "$RUNS/.lock"
  wait "$child"
  code=$? child="" took=$((SECONDS - started))
  last=$(tr '\r\t' '\n ' < "$log" | grep . | tail -n 1 | cut -c 1-300)
  [ "$code" -le 128 ] || last="killed by signal $((code - 128)) after: $last"
  [ "$NODE" != 0 ] || record "$code" "$([ $whole = 1 ] && echo $took || echo -)" "$last"
  if [ "$code" = 0 ]; then
    echo "done in $(clock $took)"
  else
    failed+=("$name: exit code $code, $last (log: $log)")
    echo "failed: exit code $code, $last"
  fi
done

[ "$NODE" = 0 ] || exit $((${#failed[@]} > 0))
"$PYTHON" report.py "$RUNS" --output "$RUNS/report" || failed+=("report")
echo "$count steps in $(clock $((SECONDS - begin)))"
if [ ${#failed[@]} -gt 0 ]; then
  echo "${#failed[@]} of them failed or were left out:"
  printf '  %s\n' "${failed[@]}"
  exit 1
fi
