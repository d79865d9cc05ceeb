#!/bin/bash
# What the first GPU shows in eight minutes, most important first, as a table that is whole after every row.
#
#     bash tools/gpu_check.sh                  # gpu_check/table.md, for docs/hardware.md, and a log of each row
#
# One micro-batch of dmd2.py at the real size with random weights, under several flags; then the tiny run in bf16 beside
# float32 on the CPU, and its resume. TEACHER=tiny ATTENTION=_native_math STEPS=2 SLOW=9 rehearses it without a GPU.
set -u
out=${OUT:-gpu_check} teacher=${TEACHER:-wan2.1-1.3b} steps=${STEPS:-100}
mkdir -p "$out"
table=$out/table.md

row() { # NAME SECONDS PROGRAM COMMAND…: a row of what PROGRAM (awk) prints of the command's output, or why there is none
  local name=$1 limit=$2 program=$3 log="$out/${1// /_}.log" said
  shift 3
  if timeout $((limit * ${SLOW:-1})) "$@" > "$log" 2>&1; then said=$(awk "$program" "$log")
  else said="failed with $?: $(tail -n 1 "$log" | tr '|' ' ' | cut -c 1-200) | | | |"; fi
  echo "| $name | $said" | tee -a "$table"
}

measured='/^fake score alone/ {fake = $4} /^student and that/ {both = $4} /^peak memory/ {gib = $3}
  /^time in operations/ {attention = $5; matmul = $7 + 0} END {print fake " | " both " | " gib " | " attention " " matmul "% |"}'
measure() { # NAME SECONDS FLAGS…
  row "$1" "$2" "$measured" python tools/cost.py dmd2 --teacher "$teacher" --ema-decay 0 --grad-accum 1 --measure 4 "${@:3}"
}
tiny="python dmd2.py --gan-weight 0 --ema-decay 0 --steps $steps --preview-every $steps --preview-prompts 4"
right='/^\| right / {right = $(NF - 1)} END {print "right in " right " % after '"$steps"' steps | | | |"}'

CUDA_VISIBLE_DEVICES= timeout 400 $tiny --runs-dir "$out/float32" > "$out/float32.log" 2>&1 &
float32=$!
{
  python -c 'import torch; print(f"torch {torch.__version__},", torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")'
  echo "$(git describe --always --dirty), $(date -u +%F), $teacher, one micro-batch"
  printf '\n| | fake score alone, s | student and that, s | peak, GiB | attention, matmul |\n|---|---:|---:|---:|---:|\n'
} | tee "$table"
measure "as it is" 100
measure "compiled" 130 --compile
measure "other attention" 50 --attention "${ATTENTION:-_native_cudnn}"
measure "attention kept" 50 --keep-attention
row "tiny" 70 "$right" $tiny --runs-dir "$out/tiny"
row "tiny, resumed" 50 '/^going on from/ {from = $NF} END {print "from " from " | | | |"}' \
  python dmd2.py --runs-dir "$out/tiny" --resume latest --steps $((steps + 2))
wait "$float32"
row "tiny in float32 on the CPU" 10 "$right" cat "$out/float32.log"
