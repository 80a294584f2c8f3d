#!/usr/bin/env bash
# Runs set-up and a short experiment (encode, 40 steps of gpt2.nano, 40 steps of LoRA on a trained
# gpt2.nano, beam search, decode, scores) with several Pythons, compilers and surroundings, and
# compares the results:
#
#   bash tests/platforms.sh [--system SUITE] [PYTHON:G++:SURROUNDINGS ...]
#
# e.g. 3.9:12:plain. The surroundings are
#
#   plain   nothing special
#   named   a folder with a blank and Chinese characters in its name
#   c       LC_ALL=C
#   home    a HOME that cannot be written, and JITTOR_HOME
#
# Without combinations, it takes each Python 3.9 to 3.13 of this machine (on the PATH or pyenv's)
# with the default g++, and each other g++ 11 to 14 with the first of these Pythons (3.11 if it is
# there), in each of the surroundings in turn. --system does so in a Debian (bookworm, trixie) or an
# Ubuntu (jammy, noble) that debootstrap makes in the work folder; pyenv's Pythons can be used there,
# too. Only root can do that.
#
# The first combination that ran in the work folder is the reference, and trains the base for LoRA.
# Token ids, predictions and scores must be equal to its, and losses within 2e-5 (relative): a loss
# has sums of 50,257 float32 numbers, which compilers order in different ways; each differed from
# the same sum in float64 by up to 1e-5.
#
# A combination takes about five minutes on 2 cores; if it is run again, it uses its environment
# and compiled operators again. The last lines are the table of all that ran. The exit code is 0
# only if all combinations asked for gave the same as the reference. Variables:
#
#   PLATFORMS  the work folder [/tmp/platforms]; it needs 1 GB for each combination

set -euo pipefail
[[ " $* " != *\ @(-h|--help)\ * ]] || { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(realpath -m "${PLATFORMS:-/tmp/platforms}")"
source /etc/os-release
system="$ID${VERSION_ID:-}"
status=0

fail() { echo "error: $*" >&2; exit 1; }

# Prints the path of Python VERSION. pyenv has a program of this name on the PATH even if the
# version is not activated; it does not run then.
find_python() {  # VERSION
    local candidate
    for candidate in "$(command -v "python$1")" ~/.pyenv/versions/"$1".*/bin/"python$1"; do
        if [[ "$("$candidate" --version 2> /dev/null)" == "Python $1."* ]]; then
            echo "$candidate"
            return
        fi
    done
}

# Prints the combinations that this machine can run.
combinations() {
    local version pairs=() default number surroundings=(plain named c home)
    default="$(g++ -dumpversion | cut -d . -f 1)"
    for version in 3.11 3.9 3.10 3.12 3.13; do
        [[ -z "$(find_python "$version")" ]] || pairs+=("$version:$default")
    done
    for version in 11 12 13 14; do
        [[ "$version" == "$default" ]] || ! command -v "g++-$version" > /dev/null ||
            pairs+=("${pairs[0]%:*}:$version")
    done
    for number in "${!pairs[@]}"; do
        echo "${pairs[number]}:${surroundings[number % 4]}"
    done
}

# Runs the experiment in FOLDER, a copy of the repository, and copies its results to RESULTS.
run_experiment() {  # FOLDER PYTHON G++ SURROUNDINGS RESULTS
    local home="$1/home" environment file
    environment=(env -u VIRTUAL_ENV -u CONDA_PREFIX -u JITTOR_HOME DEVICE=cpu OMP_NUM_THREADS=1
        cc_path="$3" PIP_CACHE_DIR="$work/pip-$system")
    case "$4" in
    c) environment+=(HOME="$home" LC_ALL=C) ;;
    home) environment+=(HOME=/sys JITTOR_HOME="$home") ;;
    *) environment+=(HOME="$home") ;;
    esac
    rm -rf "$1/trained_models"
    mkdir -p "$home" "$1/trained_models/demo"
    cp -r "$work/source/." "$1"
    cd "$1"
    [[ -x .venv/bin/python ]] || "$2" -m venv .venv
    # With the base that the first combination has trained, work.sh does not train another.
    [[ ! -d "$work/base" ]] || cp -r "$work/base" trained_models/demo
    "${environment[@]}" BASE_STEPS=400 BATCH_SIZE=40 bash work.sh demo
    "${environment[@]}" .venv/bin/python src/gpt2_ft.py @data/demo/base.ini --max_step 40 \
        --train_data data/demo/work/base_train.jsonl --valid_data data/demo/work/base_valid.jsonl \
        --work_dir trained_models/whole
    [[ -d "$work/base" ]] || cp -r trained_models/demo/base "$work"
    cp data/demo/work/{train,test}.jsonl trained_models/demo/{base,lora}{.jsonl,_scores.txt} "$5"
    for file in {demo,whole}/metrics.csv; do
        cp "trained_models/$file" "$5/${file//\//_}"
    done
}

# Compares two folders of results; prints "ok" or what differs, and how far losses differ at most.
compare() {  # PYTHON RESULTS REFERENCE
    "$1" - "$2" "$3" << 'END'
import csv, sys
from pathlib import Path
folders = [Path(name) for name in sys.argv[1:]]
differing, furthest = [], 0.0
for file in sorted(path.name for path in folders[1].iterdir()):
    if file.endswith("metrics.csv"):
        mine, reference = [[float(row[column]) for row in csv.DictReader(open(folder / file))
                            for column in ("loss", "valid_loss") if row[column]]
                           for folder in folders]
        assert len(mine) == len(reference) >= 40
        furthest = max(furthest, *(abs(a - b) / b for a, b in zip(mine, reference)))
    elif (folders[0] / file).read_bytes() != (folders[1] / file).read_bytes():
        differing.append(file)
if furthest > 2e-5:
    differing.append("losses")
print("differs: " + ", ".join(differing) if differing else "ok", f"(losses {furthest:.0e})")
sys.exit(bool(differing))
END
}

# Runs a combination, compares its results and writes its row of the table; sets `status` if it
# failed. Must not be called in a condition, where `set -e` does nothing.
try() {  # PYTHON:G++:SURROUNDINGS
    local version gxx surroundings python name folder results said began=$SECONDS failed
    [[ "$1" =~ ^3\.[0-9]+:[0-9]+:(plain|named|c|home)$ ]] ||
        fail "$1: must be like 3.11:12:plain, see --help"
    IFS=: read -r version gxx surroundings <<< "$1"
    python="$(find_python "$version")"
    [[ -n "$python" ]] || fail "$1: no Python $version on this machine"
    gxx="$(command -v "g++-$gxx")" || fail "$1: no g++-$gxx on this machine"
    name="$system-${1//:/-}"
    folder="$work/$name"
    [[ "$surroundings" != named ]] || folder="$work/$name 我的项目"
    results="$work/results/$name"
    rm -rf "$results"
    mkdir -p "$folder" "$results"

    echo "== $name, log: $work/$name.log"
    set +e
    (set -e; run_experiment "$folder" "$python" "$gxx" "$surroundings" "$results") \
        > "$work/$name.log" 2>&1
    failed=$?
    set -e
    if (( failed )); then
        said="failed: $(tail -n 1 "$work/$name.log")"
    else
        [[ -e "$work/reference" ]] || ln -s "results/$name" "$work/reference"
        said="$(compare "$python" "$results" "$work/reference")" || failed=1
    fi
    (( failed == 0 )) || status=1
    printf '%s | %s | %s | %s | %s | %s | %d s | %s\n' "$(date +%F)" "$system" \
        "$("$python" -c 'import platform; print(platform.python_version())')" \
        "$("$gxx" -dumpfullversion)" \
        "$(java -version 2>&1 | sed -n 's/.* version "\([0-9.]*\).*/\1/p')" \
        "$surroundings" $((SECONDS - began)) "$said" | tee "$work/$name.row"
}

# Runs this script in another system, where the work folder is /platforms. The mounts end with it.
run_in_system() {  # SUITE [COMBINATION...]
    local root="$work/$1" ubuntu=() compilers script=/usr/share/debootstrap/scripts
    { [[ "$(id -u)" == 0 ]] && command -v debootstrap > /dev/null; } ||
        fail "--system needs root and debootstrap; apt-get install debootstrap"
    case "$1" in
    bookworm) compilers=g++-11,g++-12 ;;
    trixie) compilers=g++-12,g++-13,g++-14 ;;
    jammy) compilers=g++-11,g++-12 ubuntu=(http://archive.ubuntu.com/ubuntu "$script/jammy") ;;
    noble) compilers=g++-11,g++-12,g++-13,g++-14
        ubuntu=(http://archive.ubuntu.com/ubuntu "$script/jammy") ;;  # an old debootstrap has no other
    *) fail "--system $1: must be bookworm, trixie, jammy or noble" ;;
    esac
    if [[ ! -e "$root/made" ]]; then
        rm -rf "$root"
        debootstrap --variant=minbase ${ubuntu:+--components=main,universe} \
            --include="ca-certificates,python3-venv,python3-dev,default-jre-headless,g++,$compilers" \
            "$1" "$root" "${ubuntu[@]}"
        cp -L /etc/resolv.conf /etc/hosts "$root/etc"
        cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs"
        mkdir -p "$root/platforms" "$root$HOME/.pyenv"
        touch "$root/made"
    fi
    # shellcheck disable=SC2016  # for the inner shell
    unshare --mount bash -euc '
        for folder in proc sys dev; do mount --rbind "/$folder" "$1/$folder"; done
        mount --bind "$2" "$1/platforms"
        [[ ! -d ~/.pyenv ]] || mount --bind ~/.pyenv "$1$HOME/.pyenv"
        exec chroot "$1" env PATH=/usr/sbin:/usr/bin:/sbin:/bin PLATFORMS=/platforms \
            bash /platforms/source/tests/platforms.sh "${@:3}"
    ' - "$root" "$work" "${@:2}"
}

mkdir -p "$work/source" "$work/results"
if [[ ! "$PWD" -ef "$work/source" ]]; then  # in another system, this is that copy
    rm -rf "$work/source"
    mkdir "$work/source"
    git ls-files -z | tar -c --null -T - | tar -x -C "$work/source"
fi
if [[ "${1:-}" == --system ]]; then
    run_in_system "${@:2}"
    exit
fi
if (( $# == 0 )); then
    mapfile -t all < <(combinations)
    set -- "${all[@]}"
fi
for combination in "$@"; do
    try "$combination"
done
echo "date | system | Python | g++ | Java | surroundings | time | result"
cat "$work"/*.row
exit "$status"
