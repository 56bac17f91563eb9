#!/usr/bin/env bash
# The whole suite: style, types, floors, then every test on 1, 2, 3 and 4 ranks.
#
#   run      bash tests/run.sh                 all of it
#            bash tests/run.sh -k ring         arguments go to pytest
#   ends     with pytest's summary line for the sum of all runs; exit status 0 only if all passed
#   files    results/tests: per rank count N a report ranks-N.xml, the ranks' logs
#            ranks-N.rank-R.log (R > 0), and ranks-N.record: every report as soon as it is made
#
# A test that takes too long, or ends the job, fails alone: the others are run by a new job.
#
# HPCINFER_TEST_RANKS="1 2 3 4"        rank counts
# HPCINFER_TEST_LIMIT=60               seconds that one test may take
# HPCINFER_TEST_SESSION_LIMIT=1800     seconds that one job of tests may take
# HPCINFER_TEST_SLOWDOWN=...           factor on all limits (default: measured first, 1 or more)
# HPCINFER_TEST_DEVICE=all             all cases of tests/device/test_device_engine.py
# HPCINFER_MPI=openmpi, intel          another MPI: what concerns it, on 1 to 4 ranks
# jobs/environment.sh lists the settings of the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HPCINFER_EXTRAS="test ${HPCINFER_EXTRAS:-}"
source jobs/environment.sh
export PYTHONUNBUFFERED=1 HPCINFER_OVERSUBSCRIBE=yes

start=$(date +%s.%N)
reports=$PWD/results/tests
rm -rf "$reports"
mkdir -p "$reports"

# Run one step under the name $1 and keep its exit status for the sum
steps=()
step() {
    local name=$1 status=0
    shift
    echo "== $name"
    "$@" </dev/null || status=$?
    steps+=("$name:$status")
}

# One rank's pytest: rank 0 prints and reports, the others write to their log
on_rank='
    report=$1
    shift
    rank=${PMI_RANK:-${PMIX_RANK:-${OMPI_COMM_WORLD_RANK:-${SLURM_PROCID:-0}}}}
    if [ "$rank" = 0 ]; then
        set -- --junitxml="$report.xml" --counts="$report.json" "$@"
    else
        exec >>"$report.rank-$rank.log" 2>&1
    fi
    exec python -m pytest --with-mpi --color=no -p no:cacheprovider --record="$report.record" "$@"'

# The suite as $1 on $2 ranks, with the logs of the others if it fails
suite() {
    local report=$reports/$1 ranks=$2 log status=0 job give_up=
    shift 2
    for job in 1 2 3 4 5 6 7 8 9; do
        [ "$job" -lt 9 ] || give_up=--give-up
        status=0
        timeout --foreground --kill-after=10 "$(scaled "${HPCINFER_TEST_SESSION_LIMIT:-1800}")" \
            bash jobs/site.sh "$ranks" sh -c "$on_rank" sh "$report" --durations=10 $give_up \
            --timeout="${HPCINFER_TEST_LIMIT:-60}" "$@" || status=$?

        # Go on after the test in which the job has ended
        if [ -e "$report.json" ] || [ ! -e "$report.record" ]; then break; fi
        [ "$status" != 124 ] && [ "$status" != 137 ] || give_up=--give-up
        echo "tests: the job has ended with status $status; a new one runs what is left"
    done
    if [ "$status" != 0 ] && [ "$status" != 5 ]; then
        for log in "$report".rank-*.log; do
            [ ! -s "$log" ] || printf '\n---- %s (end)\n%s\n' "$log" "$(tail -n 100 "$log")"
        done
    fi
    return "$status"
}

# $1 seconds, as this machine needs them
scaled() {
    awk -v s="$1" -v factor="$HPCINFER_TEST_SLOWDOWN" 'BEGIN { print s * factor }'
}

export HPCINFER_TEST_SLOWDOWN=${HPCINFER_TEST_SLOWDOWN:-$(python tests/helpers/speed.py)}
echo "== limits: times $HPCINFER_TEST_SLOWDOWN (1 on two quiet cores)"

# Ranks of MPICH that wait give way by sleeping 50 us: needed beside other load, slow without
case "$HPCINFER_TEST_SLOWDOWN" in 1 | 1.[0-2]) export MPIR_CVAR_ENABLE_HEAVY_YIELD=0 ;; esac
# Another MPI than the default: what concerns MPI, and jobs of the command line
case "${HPCINFER_MPI:-wheel}:$#" in
    openmpi:0 | intel:0)
        set -- tests/test_collectives.py tests/test_pieces.py tests/test_grid.py tests/test_harness.py \
            tests/parallel tests/engine/test_replicas.py tests/cli/test_machine.py
        ;;
esac

step ruff ruff check --output-format=concise .
step types mypy
step floors lint-imports
ranks=${HPCINFER_TEST_RANKS:-1 2 3 4}

# Let kernels be tested beside the rest of the first session, which seldom takes more than a core
if [ "$#" = 0 ] && [ "${ranks%% *}" = 1 ]; then
    echo "== ranks-1-ops (beside ranks-1)"
    set -m
    (
        renice -n 5 "$BASHPID" >/dev/null
        suite ranks-1-ops 1 --timeout=$((2 * ${HPCINFER_TEST_LIMIT:-60})) tests/ops
    ) >"$reports/ranks-1-ops.log" 2>&1 </dev/null &
    beside=$!
    set +m
    trap 'kill -- -"$beside" 2>/dev/null || true' EXIT
    step ranks-1 suite ranks-1 1 --ignore=tests/ops
    status=0
    wait "$beside" || status=$?
    cat "$reports/ranks-1-ops.log"
    steps+=("ranks-1-ops:$status")
    ranks=${ranks#1}
fi
for n in $ranks; do
    step "ranks-$n" suite "ranks-$n" "$n" "$@"
done
python tests/total.py "$reports" "$start" "${steps[@]}"
