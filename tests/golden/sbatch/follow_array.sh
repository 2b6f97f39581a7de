#!/bin/bash -l
#SBATCH --job-name=paper-13b-n4
#SBATCH --partition=gpu,long
#SBATCH --account=proj-1
#SBATCH --qos=high
#SBATCH --constraint='[a|b]'
#SBATCH --reservation=r1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=900G
#SBATCH --time=2-00:00:00
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/13b/logs/submit_1/slurm-%A_%a.out
#SBATCH --array=0-2
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --switches=1
# Written by `mtp submit` for the site everything.

recipes=(
    /shared/runs/13b/logs/submit_1/recipe_0.yaml
    /shared/runs/13b/logs/submit_1/recipe_1.yaml
    /shared/runs/13b/logs/submit_1/recipe_2.yaml
)
runs=(
    /shared/runs/13b/optimizer.lr=1e-4
    /shared/runs/13b/optimizer.lr=2e-4
    /shared/runs/13b/optimizer.lr=3e-4
)
recipe=${recipes[${SLURM_ARRAY_TASK_ID:-0}]} run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
cd /home/me || exit 1
module load cuda/12.4 gcc || exit 1
source /project/env/bin/activate || exit 1
export OMP_NUM_THREADS=12
export HF_HOME='/data/hf cache'
export NCCL_IB_HCA==mlx5_0,mlx5_1
export TMPDIR=/local/disk/"$SLURM_JOB_ID"
srun --ntasks-per-node=1 mkdir -p "$TMPDIR" || exit 1
mtp=(python -m mtp_lightning)
srun=(srun --kill-on-bad-exit=0 --wait=30 --nodes=1 --ntasks-per-node=1 --cpus-per-task=12 --container-image=/images/torch.sqsh --container-mounts=/data:/data,/project:/project --cpu-bind=cores)

# From here on the commands of --then: all of them run, and the job ends as the first that failed.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
say() { printf '%s job %s: %s\n' "$(date -u +%FT%TZ)" "$job" "$*"; }
first=0
follow() {
    local code=0
    say "mtp $*"
    "${srun[@]}" "${mtp[@]}" "$@" || code=$?
    if ((code)); then say "mtp $1 has ended with exit code $code"; fi
    if ((first == 0)); then first=$code; fi
}
follow bench decode "$run"
follow export "$run" --out "$run"'/my export' --format consolidated
exit "$first"
