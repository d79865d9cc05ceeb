#!/bin/bash
# The whole way from a teacher to a student that others can load: DMD2, DFD, samples, scores, export. docs/first_run.md
# says what each command prints and takes.
#
#   STEPS=10 RUNS=runs/smoke bash run_wan.sh        # first, ten steps of all: whatever is missing shows in an hour
#   bash run_wan.sh                                 # wan2.1-1.3b on all GPUs of this machine
#   TEACHER=tiny bash run_wan.sh                    # on a laptop
#
# Stopped (Ctrl-C saves first) it goes on where it was when it is started again.
set -euo pipefail
teacher=${TEACHER:-wan2.1-1.3b}
runs=${RUNS:-runs/$(basename "$teacher")}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)}
gpus=$((gpus > 0 ? gpus : 1))
short=(${STEPS:+--steps "$STEPS" --save-every "$STEPS" --num-samples "$STEPS"})

train() {
  if [ -e "$runs/$1.done" ]; then return; fi
  local resume=()
  if compgen -G "$runs/${1%.py}__*/checkpoints/step_*[0-9]" > /dev/null; then resume=(--resume latest); fi
  torchrun --standalone --nproc_per_node="$gpus" --shutdown-timeout 900 \
    "$1" --teacher "$teacher" --runs-dir "$runs" "${@:2}" "${short[@]}" "${resume[@]}"
  touch "$runs/$1.done"
}

python tools/cost.py dmd2 --teacher "$teacher" --gpus "$gpus"
train dmd2.py
train dfd.py # from that student, at its noise levels

student=$(ls -td "$runs"/dfd__* | head -n 1)
head -n 2 prompts/prompts.txt > "$runs/prompts.txt"
[ -e "$student/samples" ] || python tools/sample.py --checkpoint "$student" --prompts "$runs/prompts.txt" --teacher
python eval_vbench.py all --checkpoint "$student" --prompts "$runs/prompts.txt" --out "$runs/eval"
[ -e "$runs/exported" ] || python tools/export.py "$student" "$runs/exported"
echo "look at $student/samples/sheet.png; the student for diffusers is $runs/exported"
