#!/usr/bin/env bash
# A SLURM cluster on one machine: a real slurmctld, and a real slurmd for each simulated node.
#
#   install  bash tests/slurm/cluster.sh install         the packages of Debian or Ubuntu, as root
#   start    bash tests/slurm/cluster.sh start FOLDER    FOLDER is new, and its path short
#   use      export SLURM_CONF=FOLDER/slurm.conf         then sbatch, squeue, scontrol talk to it
#   stop     bash tests/slurm/cluster.sh stop FOLDER     ends jobs and daemons, removes FOLDER
#   hold     bash tests/slurm/cluster.sh hold FOLDER     start, say "ready", stop when the input ends
#   cost     install about 20 s and 30 MB; start and stop about 1 s each; idle next to nothing
#
# CLUSTER_NODES=4      nodes n1, n2, ...
# CLUSTER_CPUS=4       CPUs that each node claims to have
# CLUSTER_GPUS=2       GPUs that each node claims to have; CUDA_VISIBLE_DEVICES is set, nothing is behind
#
# Needs no root but to install, and no systemd, control groups or database. Everything stands in
# FOLDER: configuration, key, state, logs. The ports are free ones, so several clusters do not meet.
# `stop` ends the daemons that `start` has recorded, each checked against its start time, and what
# their jobs have left.
set -euo pipefail

fail() {
    echo "cluster: $*" >&2
    exit 1
}

# Install, and start none of the packages' own services.
install() {
    local packages=(slurmctld slurmd slurm-client munge)
    local options=(-y -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    apt-get install "${options[@]}" --no-install-recommends "${packages[@]}" ||
        { apt-get update "${options[@]}" &&
            apt-get install "${options[@]}" --no-install-recommends "${packages[@]}"; }
}

# First of $1 ports in a row at which nobody listens, below those the kernel gives to clients.
free_ports() {
    local first port
    for _ in {1..50}; do
        first=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        for ((port = first; port < first + $1; port++)); do
            ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
        done
        echo "$first"
        return
    done
    fail "ports: got none of $1 in a row, need them free; stop other clusters"
}

# Write slurm.conf and gres.conf for the nodes of this cluster.
configure() {
    local host port n user
    host=$(hostname -s) user=$(id -un) port=$(free_ports $((nodes + 1)))
    cat >"$SLURM_CONF" <<END
ClusterName=simulated
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: the shortest time that SLURM takes
AuthInfo=socket=$folder/munge/socket,cred_expire=5

StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
MailProg=/bin/true

# MPICH names shared memory by the number of the job: other clusters on this machine have others
FirstJobId=$((RANDOM * 1000 + RANDOM % 1000 + 1))

# Neither control groups nor a database
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none

# Look for work at once; nodes are what they say they are
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
KillWait=15
TreeWidth=65533
GresTypes=gpu
END
    for ((n = 1; n <= nodes; n++)); do
        echo "NodeName=n$n NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + n))" \
            "CPUs=$cpus RealMemory=4000 Gres=gpu:$gpus State=UNKNOWN"
    done >>"$SLURM_CONF"
    echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP" >>"$SLURM_CONF"

    # A GPU is a file that exists
    for ((n = 0; n < gpus; n++)); do
        ln -s /dev/null "$folder/gpu$n"
        echo "NodeName=n[1-$nodes] Name=gpu File=$folder/gpu$n"
    done >"$folder/gres.conf"
}

# Start time of process $1 in ticks, which tells it from another of the same number; fails if it is
# gone or only waits to be collected.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -r -a stat <<<"${stat##*) }"
    [ "${stat[0]}" != Z ] && echo "${stat[19]}"
}

# Start command $2... as the daemon $1.
daemon() {
    local name=$1
    shift
    setsid "$@" >"$folder/log/$name.out" 2>&1 </dev/null &
    echo "$! $(start_time $!)" >"$folder/pids/$name" || true
}

# Numbers of the recorded daemons that still run.
daemons() {
    local file number since
    for file in "$folder"/pids/*; do
        { read -r number since <"$file"; } 2>/dev/null || continue
        [ "$(start_time "$number")" != "$since" ] || echo "$number"
    done
}

# Numbers of the processes that belong to jobs of this cluster.
leftovers() {
    local process
    for process in /proc/[0-9]*; do
        grep -qszxF "SLURM_CONF=$SLURM_CONF" "$process/environ" || continue
        grep -qszE '^SLURM_JOB_ID=' "$process/environ" ||
            grep -qsx slurmstepd "$process/comm" || continue
        echo "${process#/proc/}"
    done
}

# Wait up to $1 s until command $2... succeeds.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.05
    done
}

nodes_are_idle() { [ "$(timeout 5 sinfo -h -N -o %T 2>/dev/null | grep -cx idle)" = "$nodes" ]; }
no_jobs() { [ -z "$(timeout 5 squeue -h 2>/dev/null)" ]; }
no_processes() { [ -z "$(daemons)$(leftovers)" ]; }

start() {
    local n
    [ ! -e "$folder" ] || fail "folder: got $folder, which exists, need a new one"
    command -v slurmctld slurmd munged sinfo >/dev/null ||
        fail "programs: got none of slurmctld, slurmd, munged or sinfo, need all; run '$0 install'"
    mkdir -p "$folder"/{pids,run,log}
    mkdir -m 700 "$folder"/{state,munge}
    for ((n = 1; n <= nodes; n++)); do mkdir -p "$folder/spool/n$n"; done

    # The key of this cluster, and the daemon that signs with it
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
    daemon munged munged --foreground --force --num-threads=2 --key-file="$folder/munge/key" \
        --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"
    wait_until 10 test -S "$folder/munge/socket" || give_up munged

    # The controller and the nodes
    configure
    daemon slurmctld slurmctld -D -f "$SLURM_CONF"
    for ((n = 1; n <= nodes; n++)); do daemon "slurmd-n$n" slurmd -D -f "$SLURM_CONF" -N "n$n"; done
    wait_until 30 nodes_are_idle || give_up nodes
}

# Say what the daemons said, stop them, and fail because $1 did not come up.
give_up() {
    tail -n 5 "$folder"/log/* >&2 || true
    stop
    fail "$1: did not come up; see the lines above"
}

stop() {
    local signal
    [ -d "$folder/pids" ] || return 0

    # End the jobs in order as far as the controller still answers
    if timeout 10 scancel --quiet --user="$(id -un)" 2>/dev/null; then
        wait_until 5 no_jobs || true
    fi

    # End the daemons, and what is left of the jobs
    for signal in TERM KILL; do
        daemons | xargs -r kill "-$signal" 2>/dev/null || true
        leftovers | xargs -r kill "-$signal" 2>/dev/null || true
        ! wait_until 5 no_processes || break
    done
    rm -rf "$folder"
}

# Stop when the input ends, as it does when the process at its other end is gone.
hold() {
    trap stop EXIT
    trap 'exit 143' HUP INT TERM
    start
    echo ready
    cat >/dev/null
}

export PATH=$PATH:/usr/sbin:/sbin
nodes=${CLUSTER_NODES:-4} cpus=${CLUSTER_CPUS:-4} gpus=${CLUSTER_GPUS:-2}
folder=$(realpath -m "${2:-}" 2>/dev/null) || true
export SLURM_CONF=$folder/slurm.conf
case "${1:-}:${2:+folder}" in
    install:) install ;;
    start:folder | stop:folder | hold:folder) "$1" ;;
    *) fail "usage: $0 install | start FOLDER | stop FOLDER | hold FOLDER" ;;
esac
