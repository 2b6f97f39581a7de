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
