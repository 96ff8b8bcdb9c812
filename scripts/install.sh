# Sourced by quickstart.sh and test.sh: makes .venv with the pinned packages, once.
# Expects to be in the repository's root; defines `step`, which runs a command with its name and time.

step() { # step NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || { local code=$?; printf '== %s: failed with exit code %s\n' "$name" "$code" >&2; exit "$code"; }
    printf '== %s: %s s\n' "$name" "$((SECONDS - start))"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2
    return 1
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# The CPU build of torch is not in the default package index, where the same version is the CUDA build: pip finds
# it only where a local index offers it; otherwise uv knows where it lives.
install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if has_gpu || [ "$(uname -s)" != Linux ] || [ "$(uname -m)" != x86_64 ]; then
        .venv/bin/python -m pip install --quiet "torch==$version"
    else
        .venv/bin/python -m pip install --quiet "torch==$version+cpu" 2>/dev/null ||
            { .venv/bin/python -m pip install --quiet uv &&
                .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu "torch==$version"; }
    fi
}

install_packages() {
    local python
    python=$(find_python) || return 1
    [ -x .venv/bin/python ] || "$python" -m venv .venv ||
        { echo "error: cannot make .venv (Debian and Ubuntu: apt install python3-venv)" >&2; return 1; }
    install_torch &&
        .venv/bin/python -m pip install --quiet -r requirements.txt -c constraints.txt &&
        fingerprint >.venv/installed
}

fingerprint() { cat requirements.txt constraints.txt | cksum; }

install() {
    if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$(fingerprint)" ]; then
        echo "packages: already in .venv"
        return
    fi
    if has_gpu; then
        echo "An NVIDIA GPU was found: about 3.5 GB of packages will be downloaded into .venv (8 GB on the disk)."
    else
        echo "No NVIDIA GPU was found: about 0.4 GB of packages will be downloaded into .venv (1.5 GB on the disk)."
    fi
    step "packages" install_packages
}
