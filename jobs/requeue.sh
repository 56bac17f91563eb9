# Run a command that can be stopped and goes on when it is started again, in a job that comes back.
#
#   source jobs/requeue.sh                      after jobs/environment.sh, in a batch script
#   launch_again STATE RANKS COMMAND...         instead of launch RANKS COMMAND...
#
# COMMAND ends with code 75 when it was stopped by a signal or its time limit; STATE is the file
# with which it goes on. The job is then put back into the queue (needs #SBATCH --requeue), unless
# SLURM is ending it, or it came no further than the time before. A signal that SLURM sends to the
# batch script (#SBATCH --signal=B:USR1@120) is handed on to all ranks, by srun and mpirun alike.
# Preemption, node failure and scontrol requeue need nothing: there SLURM itself requeues the job.

launch_again() {
    local state launcher code heard before told=
    state=$(readlink -m "${1%.state}").state # an output that is a link has its files where it leads to
    shift

    # A run that was to begin anew has done so when it comes back
    local word words=()
    for word in "$@"; do
        [ "$word" = --restart ] && [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || words+=("$word")
    done
    set -- "${words[@]}"
    before=$(cksum 2>/dev/null <"$state") || true

    # Wait for the ranks, as whose launcher this shell goes on; a signal ends the waiting, not them
    launch_here "$@" &
    launcher=$!
    trap 'heard=yes told=USR1; kill -USR1 "$launcher" 2>/dev/null || true' USR1
    trap 'heard=yes told=TERM; kill -USR1 "$launcher" 2>/dev/null || true' TERM
    while :; do
        heard='' code=0
        wait "$launcher" || code=$?
        [ -n "$heard" ] || break
    done
    trap - USR1

    # A rank that had to be ended hides the 75 of the others
    [ -z "$told" ] || [ "$code" -lt 128 ] || code=75
    [ "$code" = 75 ] || return "$code"
    if [ "$told" != TERM ] && [ "$before" = "$(cksum 2>/dev/null <"$state")" ]; then
        echo "jobs/requeue.sh: got no further than the run before, need more time; raise --time" >&2
        return 1
    fi

    # A job that SLURM is ending is no longer running: requeued by SLURM, or cancelled by the user
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        echo "jobs/requeue.sh: stopped, back into the queue after ${SLURM_RESTART_COUNT:-0} restarts" >&2
        scontrol requeue "$SLURM_JOB_ID" ||
            echo "jobs/requeue.sh: could not requeue the job; submit the same again to go on" >&2
    fi
    return 75
}
