# shellcheck shell=bash
# The other scripts source this file. Afterwards `python` has every package of requirement.txt.
# This takes about a minute the first time, and a tenth of a second from then on.
#
# If the active virtual or conda environment has all packages, it is used as it is. Else .venv beside
# this file is made and used. SETUP_ENV=active installs into the active environment instead, and
# SETUP_ENV=own always uses .venv. A script that needs the packages of a further requirement file
# sets `setup_extra` to its name before.
#
# If the compiler, Java, or (with NPROC above 1) Open MPI is missing, root installs it through
# apt-get; for other users, an error message names it.
#
# If an NVIDIA driver finds a GPU that CUDA 13 supports and no CUDA toolkit for it can be used, a
# toolkit is installed by pip (requirement-cuda.txt, 0.7 GB). SETUP_CUDA=1 always installs it,
# SETUP_CUDA=0 never; neither is it with DEVICE=cpu.
#
# A set-up may be killed at any moment: the file .begun-WORK exists in the environment while WORK
# (venv, apt, or the name of a requirement file) is being done. If the next start finds it, that
# work is done again.

set -euo pipefail

setup_files=(requirement.txt ${setup_extra:+"$setup_extra"})
setup_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
setup_python_tried="3.11 3.10 3.9 3.12 3.13"  # the first is preferred
setup_gxx_tried="11 12 13 14"
setup_java_tried="17 21"

setup_say() { echo "setup: $*" >&2; }
setup_fail() { echo "error: $*" >&2; exit 1; }

# Locks FOLDER for NAME. The lock belongs to the open file, which every program started later
# inherits: it ends with the last of them, even if all are killed. If another run has it, this
# script ends with REMEDY, or waits if REMEDY is "wait".
setup_lock() {  # FOLDER NAME REMEDY
    local file="$1/.$2.lock" process="" host="" status=0
    { mkdir -p "$1" && exec {setup_descriptor}<> "$file"; } 2> /dev/null ||
        setup_fail "$1: cannot be written; check its permissions or choose another folder"
    flock -n "$setup_descriptor" 2> /dev/null || status=$?
    if (( status == 1 )); then
        read -r process host < "$file" || true
        if [[ "$3" == wait ]]; then
            setup_say "waiting for process $process on $host, which uses $1 ..."
            flock "$setup_descriptor"
        # If the script was killed, its programs may need some seconds to save their state and end.
        elif [[ -e "/proc/$process/exe" ]] || ! flock -w 10 "$setup_descriptor"; then
            setup_fail "$1: in use by process $process on $host or a program that it started; $3"
        fi
    elif (( status )); then
        setup_say "warning: $1 cannot be locked (no flock, or not on this file system);" \
            "do not start another run in it"
    fi
    echo "$$ $(< /proc/sys/kernel/hostname)" >&"$setup_descriptor"
}

setup_environment_lock=""
setup_lock_environment() {
    [[ -z "$setup_environment_lock" ]] || return 0
    setup_lock "$setup_environment" setup wait
    setup_environment_lock="$setup_descriptor"
}

setup_unlock_environment() {
    [[ -z "$setup_environment_lock" ]] || exec {setup_environment_lock}>&-
    setup_environment_lock=""
}

# The lines of requirement files and of the files that they include.
setup_requirements() {  # FILE...
    local file line
    for file; do
        while read -r line || [[ -n "$line" ]]; do  # the last line may have no line end
            if [[ "$line" == "-r "* ]]; then setup_requirements "${line#-r }"; else echo "$line"; fi
        done < "$setup_root/$file"
    done
}

# Prints the requirements that PYTHON's packages do not meet. Fails if PYTHON does not run.
setup_unmet() {  # PYTHON REQUIREMENTS
    "$1" - "$2" <<'END'
import importlib.metadata, platform, re, sys
values = {"python_version": sys.version_info[:2], "sys_platform": sys.platform,
          "platform_machine": platform.machine()}
for line in filter(None, sys.argv[1].splitlines()):
    requirement, _, marker = line.partition(" ; ")
    name, _, version = requirement.partition("==")
    if not marker or eval(re.sub(r'"(\d+)\.(\d+)"', r"(\1, \2)", marker), values):
        try:
            if importlib.metadata.version(name).split("+")[0] != version:
                print(requirement)
        except importlib.metadata.PackageNotFoundError:
            print(requirement)
END
}

# Sets setup_environment to the folder of the environment to use, which may not exist yet, and
# setup_is_ready if nothing is to be installed into it. Conda's `base` is not used, because conda
# itself runs in it and fails with other versions.
setup_choose_environment() {
    local active="" unmet begun
    if [[ -x "${VIRTUAL_ENV:-}/bin/python" ]]; then
        active="$VIRTUAL_ENV"
    elif [[ -x "${CONDA_PREFIX:-}/bin/python" && "${CONDA_DEFAULT_ENV:-}" != base ]]; then
        active="$CONDA_PREFIX"
    fi
    setup_environment="$setup_root/.venv"
    setup_is_ready=""
    case "${SETUP_ENV:-auto}" in
    own) ;;
    active)
        [[ -n "$active" ]] || setup_fail "SETUP_ENV=active: no environment is active (conda's base" \
            "is not used); activate one"
        setup_environment="$active" ;;
    auto)
        [[ -n "$active" && ! "$active" -ef "$setup_environment" ]] || return 0
        "$active/bin/python" -c "" 2> /dev/null ||
            setup_fail "$active/bin/python does not run; repair or deactivate it"
        unmet="$(setup_unmet "$active/bin/python" "$(setup_requirements "${setup_files[@]}")" \
            2> /dev/null)" || unmet="its Python is too old"
        for begun in "$active"/.begun-*; do  # of a set-up with SETUP_ENV=active that was killed
            [[ ! -e "$begun" ]] || unmet+=" (a set-up broke off)"
        done
        if [[ -z "$unmet" ]]; then
            setup_environment="$active"
            setup_is_ready=yes
        else
            setup_say "$active does not have the packages of ${setup_files[*]}" \
                "(${unmet//$'\n'/, }); using $setup_environment, or set SETUP_ENV=active to" \
                "install into the active one"
        fi ;;
    *) echo "error: SETUP_ENV=$SETUP_ENV: must be auto, active or own" >&2; exit 2 ;;
    esac
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
    local log begun="$setup_environment/.begun-apt"
    local -x DEBIAN_FRONTEND=noninteractive
    if [[ "$(id -u)" != 0 ]] || ! command -v apt-get > /dev/null; then
        setup_fail "missing on this machine: $*; install them (on Debian or Ubuntu:" \
            "sudo apt-get install $*), then run this again"
    fi
    setup_lock_environment
    setup_say "installing $* through apt-get (about a minute) ..."
    log="$(mktemp)"
    echo "$*" > "$begun"
    # After a dpkg that was killed, apt-get does nothing until dpkg has completed its work.
    if ! { dpkg --configure -a; apt-get update && apt-get install -y --no-install-recommends "$@"
            } < /dev/null > "$log" 2>&1; then
        rm -f "$begun"
        tail -n 20 "$log" >&2
        setup_fail "apt-get could not install $* (see above, all of it in $log);" \
            "install them, then run this again"
    fi
    rm -f "$log" "$begun"
}

# Warns of each version with which this project has not been tried.
setup_warn_of_untried() {
    local version
    version="$(setup_python_version python)"
    [[ " $setup_python_tried " == *" $version "* ]] ||
        setup_say "warning: Python $version is untried (tried: $setup_python_tried)"
    version="$("${cc_path:-g++}" -dumpversion)"
    [[ " $setup_gxx_tried " == *" ${version%%.*} "* ]] ||
        setup_say "warning: g++ $version is untried (tried: $setup_gxx_tried)"
    version="$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p')"
    [[ " $setup_java_tried " == *" $version "* ]] ||
        setup_say "warning: Java ${version:-of unknown version} is untried" \
            "(tried: $setup_java_tried)"
}

# Of the packages that pip was installing when it was killed, some files may be missing or cut off,
# and pip takes them for installed. This removes what pip knows of each such package, so that pip
# installs it again, and prints its name.
setup_forget_damaged_packages() {  # FILE_THAT_IS_OLDER_THAN_THEM
    python - "$1" <<'END'
import csv, shutil, sys, sysconfig
from pathlib import Path

def is_whole(info):
    """Whether RECORD's files have their sizes; pip writes INSTALLER last, *.pyc in other sizes."""
    try:
        rows = csv.reader((info / "RECORD").read_text(encoding="utf-8").splitlines())
        return (info / "INSTALLER").is_file() and all(
            Path(info.parent, name).stat().st_size == int(size)
            for name, _, size in rows if size and not name.endswith(".pyc"))
    except (OSError, ValueError):
        return False

began = Path(sys.argv[1]).stat().st_mtime
for site in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
    for info in site.glob("*.dist-info"):
        if info.stat().st_mtime >= began and not is_whole(info):
            print(info.stem)
            shutil.rmtree(info)
    if not any(site.glob("pip-*-info")):  # then setup_run_pip installs it
        shutil.rmtree(site / "pip", ignore_errors=True)
END
}

# Whether FILE's packages are installed, as the stamp in the environment shows.
setup_is_stamped() {  # FILE HASH
    local stamp="$setup_environment/.installed-$1"
    [[ ! -e "$setup_environment/.begun-$1" && -f "$stamp" && "$(< "$stamp")" == "$2" ]]
}

# PyPI's PyTorch for Linux needs CUDA libraries of several GB even on the CPU; the builds without
# them have an index of their own. If it cannot be reached, pip takes PyPI's.
setup_install_cpu_torch() {  # FILE
    local pins index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
    pins="$(setup_requirements "$1" | sed -n 's/^\(torch==[^ ]*\)/\1+cpu/p')"
    if [[ -z "$pins" || -z "$(setup_unmet python "${pins//+cpu/}")" ]]; then
        return 0
    fi
    python -m pip install --disable-pip-version-check --no-deps --retries 1 --timeout 20 \
        --index-url "$index" -r <(echo "$pins") < /dev/null 2>&1 ||
        setup_say "warning: no PyTorch for the CPU from $index; set TORCH_INDEX to a mirror of it," \
            "or pip may take one with CUDA libraries of several GB from its own index"
}

setup_run_pip() {  # TIME FILE
    local log="$setup_environment/install.log" begun="$setup_environment/.begun-$2" damaged
    setup_say "installing the packages of $2 into $setup_environment ($1) ..."
    if [[ -e "$begun" ]]; then
        damaged="$(setup_forget_damaged_packages "$begun")"
        [[ -z "$damaged" ]] || setup_say "the last set-up broke off; again: ${damaged//$'\n'/, }"
    else
        : > "$begun"
    fi
    if ! { python -m pip --version || python -m ensurepip; } > "$log" 2>&1 ||
            ! setup_install_cpu_torch "$2" >> "$log" ||
            ! python -m pip install --disable-pip-version-check \
                -r "$setup_root/$2" < /dev/null >> "$log" 2>&1; then
        sed '/^WARNING/d' "$log" | tail -n 20 >&2
        setup_fail "pip could not install $2 (see above, all of it in $log);" \
            "check the network or pip's index, then run this again"
    fi
}

# Installs FILE's packages unless that was done already.
setup_install_packages() {  # TIME FILE
    local took="$1" file="$2" hash
    hash="$(setup_requirements "$file" | sha256sum)"
    if ! setup_is_stamped "$file" "$hash"; then
        setup_lock_environment
        if ! setup_is_stamped "$file" "$hash"; then  # another process may have done it
            setup_run_pip "$took" "$file"
            echo "$hash" > "$setup_environment/.installed-$file"
            rm -f "$setup_environment/.begun-$file"
        fi
    fi
    setup_unlock_environment
}

# Adds requirement-cuda.txt to setup_files if a GPU lacks it, or if its installation has begun.
setup_look_for_gpu() {
    local obstacle
    if compgen -G "$setup_environment/.*-requirement-cuda.txt" > /dev/null; then
        setup_files+=(requirement-cuda.txt)
        return
    fi
    obstacle="$(python - "$setup_root/src" <<'END'
import sys
sys.path.insert(0, sys.argv[1])
from runtime.cuda_toolkit import needs_wheels
print(needs_wheels())
END
    )"
    if [[ -n "$obstacle" && -n "$setup_is_ready" ]]; then
        setup_say "$obstacle; SETUP_CUDA=1 makes $setup_root/.venv with CUDA 13"
    elif [[ -n "$obstacle" ]]; then
        setup_say "$obstacle; so CUDA 13 comes by pip (SETUP_CUDA=0 goes on without it)"
        setup_files+=(requirement-cuda.txt)
    fi
}

setup_is_made() {
    [[ ! -e "$setup_environment/.begun-venv" ]] && "$setup_environment/bin/python" -c "" 2> /dev/null
}

setup_make_environment() {  # PYTHON
    [[ "$setup_environment" == "$setup_root/.venv" ]] ||
        setup_fail "$setup_environment/bin/python does not run; repair or deactivate it"
    setup_lock_environment
    ! setup_is_made || return 0  # another process may have made it
    setup_say "making $setup_environment with $1 ..."
    : > "$setup_environment/.begun-venv"
    rm -rf "${setup_environment:?}"/* "$setup_environment"/.installed-*  # --clear removes the lock
    "$1" -m venv "$setup_environment" ||
        setup_fail "$1 -m venv $setup_environment failed (see above)"
    rm "$setup_environment/.begun-venv"
}

setup_main() {
    local python base="" version part file need=() time="about a minute"
    case "${SETUP_CUDA:-auto}" in
    auto | 0) ;;
    1) setup_files+=(requirement-cuda.txt) ;;
    *) echo "error: SETUP_CUDA=$SETUP_CUDA: must be auto, 1 or 0" >&2; exit 2 ;;
    esac
    setup_choose_environment
    python="$setup_environment/bin/python"
    if [[ -s "$setup_environment/.begun-apt" ]]; then
        read -ra need < "$setup_environment/.begun-apt" || true
    fi
    command -v "${cc_path:-g++}" > /dev/null || need+=("${cc_path:-g++}")
    command -v java > /dev/null || need+=(default-jre-headless)
    if [[ "${NPROC:-1}" =~ ^([2-9]|[1-9][0-9]+)$ ]] &&
            ! { command -v mpirun && command -v mpicc; } > /dev/null; then
        need+=(openmpi-bin libopenmpi-dev)
    fi
    if ! setup_is_made; then  # or its Python was removed
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
    setup_is_made || setup_make_environment "${base:-$(setup_find_python)}"
    export PATH="$setup_environment/bin:$PATH"
    [[ "${SETUP_CUDA:-auto}${DEVICE:-auto}" != autoauto ]] || setup_look_for_gpu
    [[ -z "$setup_is_ready" ]] || return 0
    [[ -f "$setup_environment/.installed-requirement.txt" ]] || setup_warn_of_untried
    # Jittor cannot read the arrays of NumPy 2.
    version="$(setup_python_version python)"
    (( ${version#3.} < 13 )) ||
        time="many minutes: NumPy 1 is compiled, PyPI has it only for Python 3.12 and older"
    for file in "${setup_files[@]}"; do
        case "$file" in
        requirement.txt) setup_install_packages "$time" "$file" ;;
        requirement-cuda.txt) setup_install_packages "a few minutes, 0.7 GB" "$file" ;;
        *) setup_install_packages "a few minutes, PyTorch is among them" "$file" ;;
        esac
    done
}

setup_main
