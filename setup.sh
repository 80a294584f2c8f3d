# shellcheck shell=bash
# The other scripts source this file. Afterwards `python` has every package of requirement.txt.
# This takes about a minute the first time, and a few milliseconds from then on.
#
# It uses the virtual or conda environment that is active, else it makes .venv beside this file. If
# the compiler, Java, or (with NPROC above 1) Open MPI is missing, root installs it through apt-get;
# for other users, an error message names it.

set -euo pipefail

setup_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
setup_python_tried="3.11 3.10 3.9 3.12"  # the first is preferred
setup_gxx_tried="12"
setup_java_tried="17 21"

setup_say() { echo "setup: $*" >&2; }
setup_fail() { echo "error: $*" >&2; exit 1; }

# The folder of the environment to use: the active one, or our own, which may not exist yet.
# Conda's `base` is not used, because conda itself runs in it and fails with other versions.
setup_choose_environment() {
    if [[ -x "${VIRTUAL_ENV:-}/bin/python" ]]; then
        echo "$VIRTUAL_ENV"
    elif [[ -x "${CONDA_PREFIX:-}/bin/python" && "${CONDA_DEFAULT_ENV:-}" != base ]]; then
        echo "$CONDA_PREFIX"
    else
        echo "$setup_root/.venv"
    fi
}

# What PYTHON lacks, as Debian package names without "pythonX.Y-": "dev" for the headers and
# pythonX.Y-config, which Jittor needs to compile itself; "venv" to make environments.
setup_python_lacks() {  # PYTHON
    "$1" - <<'END'
import importlib.util, os, sys, sysconfig
config = "python%d.%d-config" % sys.version_info[:2]
bins = [os.path.dirname(os.path.realpath(sys.executable)), os.path.dirname(sys.executable),
        "/usr/bin", "/usr/local/bin"]
if not (os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
        and any(os.path.isfile(os.path.join(folder, config)) for folder in bins)):
    print("dev")
if sys.prefix == sys.base_prefix and not (importlib.util.find_spec("venv")
                                          and importlib.util.find_spec("ensurepip")):
    print("venv")
END
}

setup_python_version() {  # PYTHON
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null
}

# Prints the Python for a new environment: the first complete one of the versions tried, else the
# first that apt can complete, else any other Python 3. Prints nothing if there is none.
setup_find_python() {
    local version candidate incomplete=""
    for version in $setup_python_tried; do
        candidate="$(command -v "python$version")" || continue
        # A pyenv shim is on the PATH even if its version is not activated.
        [[ "$(setup_python_version "$candidate")" == "$version" ]] || continue
        [[ -n "$(setup_python_lacks "$candidate")" ]] || { echo "$candidate"; return; }
        incomplete="${incomplete:-$candidate}"
    done
    candidate="$(command -v python3)" && setup_python_version "$candidate" > /dev/null ||
        candidate=""
    echo "${incomplete:-$candidate}"
}

setup_install_system_packages() {  # DEBIAN_PACKAGE...
    local log
    if [[ "$(id -u)" != 0 ]] || ! command -v apt-get > /dev/null; then
        setup_fail "missing on this machine: $*; install them (on Debian or Ubuntu:" \
            "sudo apt-get install $*), then run this again"
    fi
    setup_say "installing $* through apt-get (about a minute) ..."
    log="$(mktemp)"
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y \
            --no-install-recommends "$@"; } < /dev/null > "$log" 2>&1; then
        tail -n 20 "$log" >&2
        setup_fail "apt-get could not install $* (see above, all of it in $log);" \
            "install them, then run this again"
    fi
    rm -f "$log"
}

# Warns of each version with which this project has not been tried.
setup_warn_of_untried() {
    local version
    version="$(setup_python_version python)"
    [[ " $setup_python_tried " == *" $version "* ]] ||
        setup_say "warning: Python $version is untried (tried: $setup_python_tried)"
    version="$(g++ -dumpversion)"
    [[ " $setup_gxx_tried " == *" ${version%%.*} "* ]] ||
        setup_say "warning: g++ $version is untried (tried: $setup_gxx_tried)"
    version="$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p')"
    [[ " $setup_java_tried " == *" $version "* ]] ||
        setup_say "warning: Java ${version:-of unknown version} is untried" \
            "(tried: $setup_java_tried)"
}

# Installs FILE's packages unless the stamp in the environment shows that this was done already.
# The INCLUDED files are those that FILE includes.
setup_install_packages() {  # TIME FILE [INCLUDED...]
    local took="$1" file="$2" stamp hash log
    shift
    stamp="$setup_environment/.installed-$file"
    hash="$(cd "$setup_root" && cat -- "$@" | sha256sum)"
    if [[ -f "$stamp" && "$(< "$stamp")" == "$hash" ]]; then
        return
    fi
    setup_say "installing the packages of $file into $setup_environment ($took) ..."
    log="$setup_environment/install.log"
    if ! { python -m pip --version || python -m ensurepip; } > "$log" 2>&1 ||
            ! python -m pip install --disable-pip-version-check \
                -r "$setup_root/$file" < /dev/null >> "$log" 2>&1; then
        sed '/^WARNING/d' "$log" | tail -n 20 >&2
        setup_fail "pip could not install $file (see above, all of it in $log);" \
            "check the network or pip's index, then run this again"
    fi
    echo "$hash" > "$stamp"
}

setup_main() {
    local python base="" version part need=()
    setup_environment="$(setup_choose_environment)"
    python="$setup_environment/bin/python"
    command -v g++ > /dev/null || need+=(g++)
    command -v java > /dev/null || need+=(default-jre-headless)
    if (( ${NPROC:-1} > 1 )) && ! { command -v mpirun && command -v mpicc; } > /dev/null; then
        need+=(openmpi-bin libopenmpi-dev)
    fi
    if ! "$python" -c "" 2> /dev/null; then  # not made yet, or its Python was removed
        base="$(setup_find_python)"
        [[ -n "$base" ]] || need+=(python3 python3-dev python3-venv)
    elif [[ ! -f "$setup_environment/.installed-requirement.txt" ]]; then
        base="$python"
    fi
    if [[ -n "$base" ]]; then
        version="$(setup_python_version "$base")"
        for part in $(setup_python_lacks "$base"); do
            need+=("python$version-$part")
        done
    fi
    if (( ${#need[@]} )); then
        setup_install_system_packages "${need[@]}"
    fi
    if ! "$python" -c "" 2> /dev/null; then
        base="${base:-$(setup_find_python)}"
        setup_say "making $setup_environment with $base ..."
        "$base" -m venv --clear "$setup_environment" ||
            setup_fail "$base -m venv $setup_environment failed (see above)"
    fi
    export PATH="$setup_environment/bin:$PATH"
    [[ -f "$setup_environment/.installed-requirement.txt" ]] || setup_warn_of_untried
    setup_install_packages "about a minute" requirement.txt
}

setup_main
