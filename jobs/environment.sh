# Make the Python environment of hpcinfer once, then use it.
#
#   source jobs/environment.sh     in a script
#   bash jobs/environment.sh       once on a login node, so that jobs need no network
#
# PYTHON=...             interpreter to build from, 3.11 or later (default: the first on PATH)
# HPCINFER_VENV=...      folder of the environment (default .venv, with another MPI .venv-site, ...);
#                        "active" takes the activated virtual or conda environment; "none" takes
#                        python, hpcinfer and mpirun as they are on PATH, and installs nothing
# HPCINFER_MPI=site      use the MPI on PATH; "openmpi", "intel": those of the package index; default
#                        "wheel": MPICH from there
# HPCINFER_EXTRAS=...    more extras of setup.py, beside cpu, separated by spaces:
#                        cuda12, cuda13, plot, test, parity
#
# The package is installed in editable form. A stamp in the environment, keyed by setup.py and the
# extras, says that all is in place: from then on this file takes a few milliseconds.

hpcinfer_fail() {
    echo "hpcinfer: $*" >&2
    exit 1
}

# Print the first interpreter that is new enough.
hpcinfer_python() {
    local name names=(python3 python3.14 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        "$name" -c 'import sys; sys.version_info < (3, 11) and sys.exit(1); print(sys.executable)' \
            2>/dev/null && return
    done
    hpcinfer_fail "Python: got none of 3.11 or later as ${names[*]}, need one; set PYTHON=/path/to/python3"
}

# Make an empty environment with pip in folder $1 from interpreter $2.
hpcinfer_make_venv() {
    local folder=$1 python=$2 packages
    if "$python" -c 'import ensurepip; ensurepip.version()' 2>/dev/null; then
        "$python" -m venv "$folder"
    elif "$python" -m virtualenv --version >/dev/null 2>&1; then
        "$python" -m virtualenv --quiet "$folder"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        # Debian without python3-venv: the environment takes its pip from the one outside
        "$python" -m venv --without-pip "$folder"
        packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        PIP_USER=0 PIP_ROOT_USER_ACTION=ignore "$python" -m pip install -qq \
            --disable-pip-version-check --target "$packages" pip
    elif command -v virtualenv >/dev/null; then
        virtualenv --quiet --python "$python" "$folder"
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --python "$python" "$folder"
    else
        hpcinfer_fail "Python: got $python without venv and pip, need one of them;" \
            "install python3-venv (apt-get install python3-venv), or set PYTHON to another Python"
    fi
}

# True if folder $1 holds an environment that works here: one of this checkout, or one made by hand.
hpcinfer_usable() {
    local root
    root=$(cat "$1/.hpcinfer-root" 2>/dev/null) || root=$HPCINFER_ROOT
    [ "$root" = "$HPCINFER_ROOT" ] && "$1/bin/python" -m pip --version >/dev/null 2>&1
}

# Bring folder $1 to the state that stamp $2 stands for: the package with extras $3 (a,b).
hpcinfer_install() {
    local folder=$1 stamp=$2 extras=$3 python
    [ ! -e "$stamp" ] || return 0

    # Make the environment, unless there is one; remove nothing but our own
    if ! hpcinfer_usable "$folder"; then
        case "$folder" in
            "$HPCINFER_ROOT"/.venv | "$HPCINFER_ROOT"/.venv-*) rm -rf "$folder" ;;
            *) [ ! -e "$folder" ] || rmdir "$folder" 2>/dev/null ||
                hpcinfer_fail "Python: got $folder, which is no environment with pip for this" \
                    "checkout, need one; remove it, install pip in it, or set HPCINFER_VENV" ;;
        esac
        python=$(hpcinfer_python) || exit 1
        echo "hpcinfer: making $folder with $python"
        hpcinfer_make_venv "$folder" "$python" ||
            hpcinfer_fail "Python: $python could not make $folder; see the lines above"
        echo "$HPCINFER_ROOT" >"$folder/.hpcinfer-root"
    fi

    # Install the package
    echo "hpcinfer: installing the package with [$extras] in $folder (once, about a minute)"
    PIP_USER=0 PIP_ROOT_USER_ACTION=ignore "$folder/bin/python" -m pip install -qq \
        --disable-pip-version-check --config-settings editable_mode=compat \
        --editable "$HPCINFER_ROOT${extras:+[$extras]}" ||
        hpcinfer_fail "Python: pip could not install the package; see the lines above"

    # Let two ranks meet: a launcher and a library of different MPIs do not
    export PATH="$folder/bin:$PATH"
    if command -v mpirun >/dev/null; then
        bash "$HPCINFER_ROOT/jobs/site.sh" 2 "$folder/bin/python" -c \
            'from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != 2)' </dev/null ||
            hpcinfer_fail "MPI: got no job of two ranks from $(command -v mpirun)," \
                "need an mpirun that fits the MPI library; load one MPI module, or unset HPCINFER_MPI"
    fi
    touch "$stamp"
}

# Say where the environment is, install if its stamp is missing, and put it on PATH.
hpcinfer_environment() {
    local folder stamp extras="cpu ${HPCINFER_EXTRAS:-}"
    if [ "${HPCINFER_VENV:-}" = none ]; then
        command -v hpcinfer >/dev/null || hpcinfer_fail "Python: got HPCINFER_VENV=none and no" \
            "hpcinfer on PATH, need it; load its module or container, or unset HPCINFER_VENV"
        return
    fi
    case "${HPCINFER_MPI:-wheel}" in
        wheel) extras="mpi $extras" folder=$HPCINFER_ROOT/.venv ;;
        site)
            command -v mpirun >/dev/null || command -v srun >/dev/null ||
                hpcinfer_fail "MPI: got HPCINFER_MPI=site and no mpirun or srun on PATH, need one;" \
                    "load the MPI module of the site, or unset HPCINFER_MPI"
            folder=$HPCINFER_ROOT/.venv-site
            ;;
        openmpi | intel) extras="$HPCINFER_MPI $extras" folder=$HPCINFER_ROOT/.venv-$HPCINFER_MPI ;;
        *) hpcinfer_fail "MPI: got HPCINFER_MPI=$HPCINFER_MPI, need wheel, site, openmpi or intel" ;;
    esac
    case "${HPCINFER_VENV:-}" in
        "") ;;
        active)
            folder=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
            [ -n "$folder" ] || hpcinfer_fail "Python: got HPCINFER_VENV=active and no activated" \
                "environment, need one; activate it, or unset HPCINFER_VENV"
            ;;
        /*) folder=$HPCINFER_VENV ;;
        *) folder=$PWD/$HPCINFER_VENV ;;
    esac
    unset PYTHONHOME
    export PYTHONNOUSERSITE=1

    # The stamp stands for this checkout, its setup.py, the extras and the kind of MPI
    extras=$(printf '%s\n' $extras | sort -u | paste -sd, -)
    stamp=$(cat "$HPCINFER_ROOT/setup.py" - <<<"$HPCINFER_ROOT ${HPCINFER_MPI:-wheel}" | sha256sum)
    stamp=$folder/.hpcinfer-stamp-$extras-${stamp:0:16}
    if ! [ -e "$stamp" ] || ! [ -x "$folder/bin/python" ]; then
        rm -f "$stamp"
        (
            ! command -v flock >/dev/null || flock 9
            hpcinfer_install "$folder" "$stamp" "$extras"
        ) 9>"$HPCINFER_ROOT/.venv.lock" || exit 1
    fi
    export VIRTUAL_ENV=$folder PATH="$folder/bin:$PATH"
}

HPCINFER_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
hpcinfer_environment
source "$HPCINFER_ROOT/jobs/site.sh"
