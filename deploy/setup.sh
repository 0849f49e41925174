#!/usr/bin/env bash
# Creates .venv from the target's lock file, or completes one that was interrupted. `make setup` calls it.
#   TARGET=cpu|gpu   default: that of the .venv that is there, else gpu where nvidia-smi is installed, else cpu
#   PYTHON=...       default: the first of python3.12, python3.11, python3 that runs and is 3.11 or 3.12
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

venv=.venv
stamp=$venv/.e3rl-setup
log=$venv/setup.log

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

[[ $(uname -sm) == "Linux x86_64" ]] || fail "the lock files are for Linux on x86_64, and this is $(uname -sm)"

# An environment that is there is kept as it is: only a TARGET that was given makes it anew.
target=${TARGET:-}
if [[ -z $target && -s $venv/.e3rl-target ]]; then
    target=$(<"$venv/.e3rl-target")
elif [[ -z $target ]]; then
    if command -v nvidia-smi >/dev/null; then target=gpu; else target=cpu; fi
fi
lock=deploy/locks/$target.txt
[[ -f $lock ]] || fail "TARGET is '$target'; it must be cpu or gpu"

# "3.11" or "3.12" if the interpreter runs, is one of these and can make environments; else nothing.
version_of() {
    local version
    version=$("$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    [[ $version == 3.11 || $version == 3.12 ]] && printf '%s' "$version"
}

# Packages that pip builds with a C compiler, and what needs them: left out where there is none.
compiled='pycosat|reasoning-gym'
compiles() {
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || return 1
    [[ -f $("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h ]]
}

key() {
    printf '%s %s ' "$target" "$PWD"
    compiles "$venv/bin/python" && printf 'compiler '
    cat "$lock" pyproject.toml deploy/setup.sh deploy/check_install.py | sha256sum | cut -d' ' -f1
}

# True if .venv is there, runs, and is what PYTHON asks for (if it asks).
venv_runs() {
    [[ -x $venv/bin/python ]] || return 1
    local have want
    have=$(version_of "$venv/bin/python") || return 1
    [[ -z ${PYTHON:-} ]] && return 0
    want=$(version_of "$PYTHON") || return 0  # a wrong PYTHON is refused below, with the reason
    [[ $have == "$want" ]]
}

done_already() { [[ -f $stamp && $(<"$stamp") == "$(key)" ]] && venv_runs; }

if [[ -n ${PYTHON:-} ]] && ! version_of "$PYTHON" >/dev/null; then
    fail "PYTHON=$PYTHON does not run, is not Python 3.11 or 3.12, or lacks the venv module"
fi
done_already && exit 0

exec 9>.venv.lock
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "another setup is running in this folder; waiting for it (at most 30 minutes)"
    flock --timeout 1800 9 || fail "the other setup has not finished after 30 minutes"
fi
done_already && exit 0

choose_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
        if version_of "$candidate" >/dev/null; then printf '%s' "$candidate"; return; fi
    done
    fail "no Python 3.11 or 3.12 with the venv module was found" \
        "install one (on Debian and Ubuntu also its -venv package), or name it: make setup PYTHON=/path/to/python3.12"
}

# Turns pip's lines into a few of ours (in bash, because some awks read a pipe in large blocks).
progress() {
    local total=$1 count=0 line
    while IFS= read -r line; do
        case $line in
            'Collecting '* | 'Processing '* | 'Requirement already '*)
                count=$((count + 1))
                if ((total && count % 40 == 0)); then say "  $count of $total packages"; fi ;;
            'Installing collected'*) say "  all there, unpacking" ;;
        esac
    done
}

# pip with its output in the log; shows how far it is, and the end of the log when it fails.
pip() {
    local total=$1 advice=$2
    shift 2
    if ! "$venv/bin/python" -m pip "$@" 2>&1 | tee -a "$log" | progress "$total"; then
        grep -v '^WARNING: Location' "$log" | tail -n 15 >&2
        fail "pip failed; the whole log is $log" "$advice" "Running the same command again continues from here."
    fi
}
offline="Is the package index reachable? pip's settings, such as PIP_INDEX_URL and PIP_EXTRA_INDEX_URL, are respected."

if [[ -f $venv/.e3rl-target && $(<"$venv/.e3rl-target") != "$target" ]]; then
    say "$venv was made for $(<"$venv/.e3rl-target"); making it anew for $target"
    rm -rf "$venv"
fi
rm -f "$stamp"
if ! { venv_runs && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    python=$(choose_python)
    say "making $venv with $("$python" --version) for the $target target"
    "$python" -m venv --clear "$venv"
fi
printf '%s' "$target" >"$venv/.e3rl-target"
: >"$log"

count=$(grep -c == "$lock")
damaged=$("$venv/bin/python" deploy/check_install.py damaged)
if [[ -n $damaged ]]; then
    say "completing what was interrupted: ${damaged//$'\n'/, }"
    pins=$venv/damaged.txt
    # An interrupted package has no list of its files, so that pip can only write over it.
    grep -E "^($(paste -sd'|' <<<"$damaged"))==" "$lock" >"$pins" || true
    [[ -s $pins ]] && pip 0 "$offline" install --no-deps --ignore-installed -r "$pins"
    rm -f "$pins"
fi
say "installing $count packages from $lock (a few minutes the first time)"
pins=$venv/pins.txt
cp "$lock" "$pins"
if ! compiles "$venv/bin/python"; then
    say "without a C compiler and Python's headers, ${compiled//|/ and } are left out: data of the kind reasoning_gym and"
    say "\`make test\` need them. Install both (on Debian and Ubuntu gcc and python3-dev) and run \`make setup\` again."
    grep -vE "^($compiled)==" "$lock" >"$pins"
fi
pip "$count" "$offline" install --no-deps -r "$pins"
rm -f "$pins"

if [[ $target == cpu ]]; then
    traps=$("$venv/bin/python" deploy/check_install.py traps)
    if [[ -n $traps ]]; then
        say "removing ${traps//$'\n'/, }: these builds break transformers beside a CPU torch"
        # shellcheck disable=SC2086 # one argument for each name
        pip 0 "$offline" uninstall -y $traps
    fi
    torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
    if [[ $torch != *+cpu ]]; then
        say "pip found no CPU build of torch for this Python, so the CUDA build is used on the CPU: its libraries are"
        say "needed too (some 3 GB more). To avoid it, name PyTorch's CPU wheel index in PIP_EXTRA_INDEX_URL."
        grep -E '^(cuda|nvidia)-' deploy/locks/gpu.txt >"$venv/cuda.txt"
        pip 0 "$offline" install "torch==$torch" --constraint "$venv/cuda.txt"
    fi
fi

say "installing the project itself"
pip 0 "$offline" install --no-deps --no-build-isolation -e .

say "checking that everything imports"
if ! problems=$("$venv/bin/python" deploy/check_install.py imports); then
    fail "$problems"
fi
key >"$stamp"
say "$venv is ready: $("$venv/bin/python" --version), $target target"
