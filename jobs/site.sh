# Everything that is particular to a machine: modules, launcher, threads. Edit it for your site.
#
#   source jobs/site.sh                      defines launch RANKS COMMAND...
#   bash jobs/site.sh RANKS COMMAND...       the same as one command
#
# HPCINFER_LAUNCHER      mpirun (default) or srun (default of jobs/*.slurm)
# HPCINFER_SRUN_MPI      value of srun --mpi= (default: pmi2 with the MPICH wheel, else the site's)
# OMP_NUM_THREADS        threads per rank (default: cores of the node / ranks on the node)

# Load the modules of the site here, for example:
#   module load openmpi cuda

# Cores that this process may use on this node, control groups included.
site_cores() {
    local cores quota period
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
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

    # Open MPI: accept root (containers), and leave the threads of a rank free to use any core
    if [ "$(id -u)" = 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none

    # More ranks than cores: accept it (Open MPI 4, 5), and give way while waiting (MPICH, Intel MPI)
    if [ "$ranks" -gt "$cores" ]; then
        export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
        export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
        export MPIR_CVAR_ENABLE_HEAVY_YIELD=1 I_MPI_PIN=0 I_MPI_WAIT_MODE=1
    fi
}

# Become a command on $1 ranks.
launch_here() {
    local ranks=$1 mpi
    shift
    site_settings "$ranks"
    case "${HPCINFER_LAUNCHER:-mpirun}" in
        mpirun) exec mpirun -n "$ranks" "$@" ;;
        srun)
            mpi=${HPCINFER_SRUN_MPI:-}
            [ -n "$mpi" ] || [ "${HPCINFER_MPI:-wheel}" = site ] || mpi=pmi2
            exec srun --ntasks="$ranks" --kill-on-bad-exit=1 ${mpi:+--mpi="$mpi"} \
                ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@"
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
