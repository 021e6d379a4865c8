#!/usr/bin/env bash
# A run on two machines of eight GPUs that Slurm may stop at any time: before the time limit, or for a more urgent job, it
# saves a checkpoint and queues itself again. Submit it in the folder of the recipe:
#   sbatch configs/slurm.sh sft_llava.py --dataset_name train.json --image_folder images --output_dir llava-lora
#SBATCH --job-name=recipe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# ntasks-per-node: a process for each GPU, and no torchrun between Slurm and them: it would kill them 30 s after SIGTERM,
#   in the middle of a long step or of a checkpoint.
# cpus-per-task: for --dataloader_num_workers. signal: SIGTERM to this script (B:) five minutes before the time is over:
#   longer than a step, an evaluation and a checkpoint take. open-mode: the log of earlier starts is kept.
set -u

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one machine must not meet
export MASTER_ADDR MASTER_PORT

# SLURM_PROCID and SLURM_LOCALID differ from process to process, so they are read there.
srun --kill-on-bad-exit=0 bash -c \
  'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python "$@"' recipe "$@" &
step=$!

is_stopped=false
stop() {
  is_stopped=true
  kill -TERM "$step"  # srun passes it on: each process ends its step, saves, and exits with 143
}
trap stop TERM

wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do  # the signal interrupted wait
  wait "$step"
  status=$?
done

if $is_stopped && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"  # the same command resumes from the checkpoint
fi
exit "$status"
