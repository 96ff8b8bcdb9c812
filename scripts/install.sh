# Sourced by quickstart.sh and test.sh: makes .venv with the pinned packages, once.
# Expects to be in the repository's root; defines `step`, which runs a command with its name and time.
# Bash ignores `set -e` in what is called before `||`, so these functions check every command themselves.

uv_version=0.13.9

# Commands differ in how they end on Ctrl-C: without this, some would let the script go on.
trap 'echo "interrupted: run the same command again to go on" >&2; exit 130' INT

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

has_gpu() {
    case "$(nvidia-smi -L 2>/dev/null)" in
        GPU*) ;;
        *) return 1 ;;
    esac
}

# Which build of torch this machine needs: the default package index has no CPU build for Linux on x86_64.
torch_build() {
    if [ "$(uname -sm)" = "Linux x86_64" ] && ! has_gpu; then echo cpu; else echo default; fi
}

venv_works() { .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

fingerprint() { { torch_build && cat requirements.txt constraints.txt; } | cksum; }

# pip finds the CPU build only where a local index offers it; otherwise uv knows where it lives.
install_torch() {
    local version pip=".venv/bin/python -m pip install --quiet"
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if [ "$(torch_build)" = default ]; then
        # Forced, because pip would keep a CPU build of the same version.
        $pip --force-reinstall "torch==$version"
    else
        $pip "torch==$version+cpu" 2>/dev/null ||
            { $pip "uv==$uv_version" &&
                .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu "torch==$version"; }
    fi || { echo "error: cannot install torch $version ($(torch_build) build); is the network there?" >&2; return 1; }
}

install_packages() {
    local python
    python=$(find_python) || return 1
    venv_works || "$python" -m venv --clear .venv ||
        { echo "error: cannot make .venv (Debian and Ubuntu: apt install python3-venv)" >&2; return 1; }
    rm -f .venv/installed
    install_torch &&
        .venv/bin/python -m pip install --quiet -r requirements.txt -c constraints.txt &&
        fingerprint >.venv/installed
}

install() {
    if venv_works && [ "$(cat .venv/installed 2>/dev/null)" = "$(fingerprint)" ]; then
        echo "packages: already in .venv"
        return
    fi
    if has_gpu; then
        echo "An NVIDIA GPU was found: about 3.6 GB of packages will be downloaded into .venv (8.5 GB on the disk)."
    else
        echo "No NVIDIA GPU was found: about 0.5 GB of packages will be downloaded into .venv (2 GB on the disk)."
    fi
    step "packages" install_packages
}
