#!/bin/bash
#SBATCH --job-name=dmd2 --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=24:00:00 --signal=B:USR1@1200 --requeue --open-mode=append --output=%x-%j.log
# sbatch docs/slurm.sh dmd2.py --teacher wan2.1-1.3b: twenty minutes before its time is over the run saves and stops, and
# the job is queued again and goes on from there, until the run is finished. Explained in docs/cluster.md.
runs=${RUNS:-runs}/$SLURM_JOB_ID  # a job that is queued again keeps its number
train=("$@" --runs-dir "$runs")
if compgen -G "$runs/*/checkpoints/step_*[0-9]" > /dev/null; then train+=(--resume latest); fi

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun does not take from the job since Slurm 22.05
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${GPUS:-8}" \
  --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:29500" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 1000 "${train[@]}" &
job=$!

over=0
trap 'over=1; mkdir -p "$runs"; touch "$runs/.over"; kill -USR1 "$job"' USR1
wait "$job"
code=$?
if [ "$over" = 1 ]; then
  wait "$job"  # the trap ended the first one
  code=$?
  saved=$(find "$runs" -path '*/checkpoints/step_*/checkpoint.json' -newer "$runs/.over" | head -n 1)
  if [ -n "$saved" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
fi
exit "$code"
