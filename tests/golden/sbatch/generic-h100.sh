#!/bin/bash
#SBATCH --job-name=paper-13b-n4
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/13b/logs/submit_1/slurm-%j.out
#SBATCH --gpus-per-node=4
#SBATCH --requeue
#SBATCH --exclusive
# Written by `mtp submit` for the site generic-h100.

recipes=(/shared/runs/13b/logs/submit_1/recipe_0.yaml)
runs=(/shared/runs/13b)
recipe=${recipes[${SLURM_ARRAY_TASK_ID:-0}]} run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
max_restarts=3 limit_s=86400 has_preflight=0
cd /home/me || exit 1
export OMP_NUM_THREADS=12
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export PYTHONFAULTHANDLER=1
export NCCL_SOCKET_IFNAME='^lo,docker'
mtp=(mtp)
srun=(srun --kill-on-bad-exit=0 --wait=30 --nodes=2 --ntasks-per-node=4 --cpus-per-task=12)

# From here on the same for every job.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
say() { printf '%s job %s: %s\n' "$(date -u +%FT%TZ)" "$job" "$*"; }
newest() {
    local name newest=none
    for name in "$run"/checkpoints/step-*; do
        if [[ $name =~ /step-[0-9]+$ ]]; then newest=${name##*/}; fi
    done
    echo "$newest"
}

again() {
    if ((terms > 0 && SECONDS + 60 < limit_s)); then # cancelled, or Slurm requeues by itself
        say "$1; ended by Slurm"
        exit "$code"
    fi
    say "$1; requeued"
    trap '' TERM # of a limit there come several, and the next one would end scontrol
    scontrol requeue "$job" || say "scontrol could not requeue: submit again"
    exclude
    exit "$code"
}
exclude() { # Slurm takes this for a pending job only, which a job is from its requeue on
    local bad try
    if [[ ! -s $run/logs/bad_nodes ]]; then return; fi
    bad=$(sort -u "$run/logs/bad_nodes" | paste -sd,)
    for try in {1..20}; do
        if scontrol update "JobId=$job" "ExcNodeList=$bad"; then
            say "excluded $bad"
            return
        fi
        sleep 1
    done
    say "could not exclude $bad"
}
stop() {
    say "$1; not started again. See $run/logs"
    exit "$code"
}
on_bad_node() { # after a restart whose exclusion did not come through
    local node
    [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -s $run/logs/bad_nodes ]] || return 1
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        if grep -qxF "$node" "$run/logs/bad_nodes"; then return; fi
    done
    return 1
}

# Restarts in a row without a new checkpoint, whoever asked for them, are limited.
record=$run/logs/restarts-$job
count=0 before=
if [[ -r $record ]]; then read -r count before <"$record"; fi
if [[ ${SLURM_RESTART_COUNT:-0} -eq 0 || $(newest) != "$before" ]]; then count=0; else count=$((count + 1)); fi
if ((count > max_restarts)); then
    say "restarts in a row without a checkpoint after $before: $max_restarts, no more are allowed"
    exit 1
fi
mkdir -p "$run/logs"
echo "$count $(newest)" >"$record"

# The tasks get the signals of Slurm themselves; this shell gets SIGTERM when the job is over for Slurm.
terms=0
trap 'terms=$((terms + 1))' TERM
say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST from checkpoint $(newest)"
if on_bad_node; then
    code=86
    again "given a bad node again"
fi
if ((has_preflight && ${SLURM_RESTART_COUNT:-0} == 0)); then
    if ! "${srun[@]}" "${mtp[@]}" preflight "$recipe"; then
        say "preflight has found faults: not started"
        exit 6
    fi
fi
"${srun[@]}" "${mtp[@]}" train "$recipe" &
step=$! seen=0
wait "$step"
code=$?
while ((terms > seen)); do # the trap has cut the wait short
    seen=$terms
    wait "$step"
    code=$?
done

case $code in
0) say "finished" ;;
85) again "stopped, to go on from its last checkpoint" ;;
86) again "bad node, named in $run/logs/bad_nodes" ;;
87) stop "the data cannot be trained on (87)" ;;
88) stop "a loss or gradient is not finite (88)" ;;
89) again "hang (89): stacks are in the logs of the attempt" ;;
[2-9] | 12) stop "the run was refused (exit code $code)" ;;
*) again "ended with exit code $code" ;;
esac
