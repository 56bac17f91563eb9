# Everything that is particular to a machine: modules, launcher, threads, GPUs. Edit it for your site.
#
#   source jobs/site.sh                      defines launch RANKS COMMAND...
#   bash jobs/site.sh RANKS COMMAND...       the same as one command
#
# HPCINFER_LAUNCHER            mpirun (default) or srun (default of jobs/*.slurm)
# HPCINFER_SRUN_MPI            value of srun --mpi= (default: pmi2 with the MPICH wheel, else the
#                              site's); pmix with most builds of Open MPI; srun --mpi=list names them
# HPCINFER_LAUNCHER_OPTIONS    more words for the launcher, such as "--cpu-bind=cores"
# HPCINFER_OVERSUBSCRIBE               yes: more ranks than cores are meant, give no advice about it
# OMP_NUM_THREADS              threads per rank (default: --cpus-per-task, else cores / ranks of a node)
#
# GPUs: rank number i of a node takes GPU number i of those it sees, so --gres=gpu:4 with 4 ranks per
# node needs nothing more. Where a site lets each rank see its own GPU only (--gpus-per-task=1,
# --gpu-bind=single:1), it takes that one; GPU-aware MPI inside a node may need to see all.

# Load the modules of the site here, for example:
#   module load openmpi cuda

# Cores that this process may use on this node: of the allocation, control groups included.
site_cores() {
    local cores quota period
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    quota=${SLURM_CPUS_ON_NODE:-$cores}
    cores=$((quota < cores ? quota : cores))
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        quota=$(((quota + period - 1) / period))
        cores=$((quota < cores ? quota : cores))
    fi
    echo "$cores"
}

# Set what the numerical libraries and the MPI need for $1 ranks.
site_settings() {
    local cores nodes=${SLURM_JOB_NUM_NODES:-1} ranks threads
    cores=$(site_cores)
    ranks=$((($1 + nodes - 1) / nodes))
    threads=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$((cores > ranks ? cores / ranks : 1))}}
    export OMP_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=$threads MKL_NUM_THREADS=$threads

    # Open MPI (4, 5): accept root (containers), a rank per thread of a core and more, and leave the
    # threads of a rank free to use any core
    if [ "$(id -u)" = 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
    export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe

    # More ranks than cores: give way while waiting
    if [ "$ranks" -gt "$cores" ]; then
        export OMPI_MCA_mpi_yield_when_idle=1
        export MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-1}
        export I_MPI_PIN=0 I_MPI_WAIT_MODE=1
    fi
}

# Remove shared memory that killed ranks have left on the nodes of a job that was started again: MPICH
# names it by job and step, and new ranks that find it hang. What a process has mapped stays.
site_clean() {
    srun --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 --mpi=none bash -c '
        left=$(find /dev/shm -maxdepth 1 -user "$(id -un)" -name "mpich_sh*")
        used=$(cat /proc/[0-9]*/maps 2>/dev/null | grep -o "/dev/shm/mpich_sh[^ ]*" | sort -u)
        for file in $left; do
            case $used in *"$file"*) ;; *) rm -f "$file" ;; esac
        done' || true
}

# Name the mpirun to take. Intel's is a script that hands no signal on, so that ranks would outlive it:
# what it starts is taken, but where it reads the hosts of a batch system.
site_mpirun() {
    local mpirun others=${PBS_ENVIRONMENT:-}${LSB_JOBID:-}${PE_HOSTFILE:-}${LOADL_HOSTFILE:-}
    mpirun=$(command -v mpirun || echo mpirun)
    if [ -z "$others" ] && [ -x "${mpirun%/*}/mpiexec.hydra" ] && [ "$(head -c 2 "$mpirun")" = '#!' ]; then
        mpirun=${mpirun%/*}/mpiexec.hydra
    fi
    echo "$mpirun"
}

# Become a command on $1 ranks.
launch_here() {
    local ranks=$1 mpi options
    shift
    read -r -a options <<<"${HPCINFER_LAUNCHER_OPTIONS:-}"
    site_settings "$ranks"
    case "${HPCINFER_LAUNCHER:-mpirun}" in
        mpirun)
            [ -z "${SLURM_JOB_ID:-}" ] || export I_MPI_HYDRA_BOOTSTRAP=${I_MPI_HYDRA_BOOTSTRAP:-slurm}
            exec "$(site_mpirun)" -n "$ranks" "${options[@]}" "$@"
            ;;
        srun)
            mpi=${HPCINFER_SRUN_MPI:-}
            case "${mpi:-${HPCINFER_MPI:-wheel}}" in
                wheel | intel) mpi=pmi2 ;;
                openmpi) mpi=pmix ;;
            esac

            # SLURM's pmi2 cuts lines at 1 KiB, which MPICH over UCX exceeds at random; OFI's are short
            [ "$mpi" != pmi2 ] || export MPIR_CVAR_CH4_NETMOD=${MPIR_CVAR_CH4_NETMOD:-ofi}
            [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || site_clean

            # Ranks that end with a code of their own may do so; 15 s after the first, all are ended
            exec srun --ntasks="$ranks" --kill-on-bad-exit=0 --wait=15 ${mpi:+--mpi="$mpi"} \
                ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
                "${options[@]}" "$@"
            ;;
        *)
            echo "hpcinfer: launcher: got $HPCINFER_LAUNCHER, need mpirun or srun" >&2
            exit 2
            ;;
    esac
}

# Run a command on $1 ranks.
launch() (
    launch_here "$@"
)

# Run as a command, not sourced: this process becomes the launcher, which then gets its signals
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    launch_here "$@"
fi
