#!/usr/bin/env bash
# The whole suite: style, floors, then every test on 1, 2, 3 and 4 ranks.
#
#   run      bash tests/run.sh                 all of it
#            bash tests/run.sh -k ring         arguments go to pytest
#   ends     with pytest's summary line for the sum of all runs; exit status 0 only if all passed
#   files    results/tests: per rank count N a report ranks-N.xml, and ranks-N.rank-R.log of rank R > 0
#
# HPCINFER_TEST_RANKS="1 2 3 4"        rank counts
# HPCINFER_TEST_LIMIT=60               seconds that one test may take
# HPCINFER_TEST_SESSION_LIMIT=1080     seconds that the tests on one rank count may take
# HPCINFER_TEST_DEVICE=all             all cases of tests/device/test_device_engine.py
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
        set -- --junitxml="$report.xml" "$@"
    else
        exec >"$report.rank-$rank.log" 2>&1
    fi
    exec python -m pytest --with-mpi --color=no -p no:cacheprovider "$@"'

# The suite on $1 ranks, with the logs of the others if it fails
suite() {
    local ranks=$1 log status=0
    shift
    timeout --foreground --kill-after=10 "${HPCINFER_TEST_SESSION_LIMIT:-1080}" \
        bash jobs/site.sh "$ranks" sh -c "$on_rank" sh "$reports/ranks-$ranks" \
        --timeout="${HPCINFER_TEST_LIMIT:-60}" "$@" || status=$?
    if [ "$status" != 0 ] && [ "$status" != 5 ]; then
        for log in "$reports/ranks-$ranks".rank-*.log; do
            [ ! -s "$log" ] || printf '\n---- %s (end)\n%s\n' "$log" "$(tail -n 100 "$log")"
        done
    fi
    return "$status"
}

step ruff ruff check --output-format=concise .
step floors lint-imports
for ranks in ${HPCINFER_TEST_RANKS:-1 2 3 4}; do
    step "ranks-$ranks" suite "$ranks" "$@"
done
python tests/total.py "$reports" "$start" "${steps[@]}"
