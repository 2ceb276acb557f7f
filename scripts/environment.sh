# Sourced by other scripts: creates .venv in the project, with the right build of torch, and activates it.
# prepare_environment EXTRAS installs the project with these extras, unless that is already done.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# Python's venv module, and a C++ compiler with Python's headers: DeepSpeed compiles a small reduction on first use.
missing_system_packages() {
    local missing=()
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    command -v g++ >/dev/null || missing+=(g++)
    python3 -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_paths()["include"] + "/Python.h")' \
        2>/dev/null || missing+=(python3-dev)
    echo "${missing[@]}"
}

# The programs of which tests/cluster builds a cluster, with their packages.
missing_cluster_packages() {
    local missing=() pair
    for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2 sshd:openssh-server \
        ssh:openssh-client pdsh:pdsh pgrep:procps; do
        PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    echo "${missing[@]}"
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
    say "installing $*"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

install_system_packages() {
    local packages
    packages=$(missing_system_packages)
    [ -z "$packages" ] && return
    # shellcheck disable=SC2086
    if may_install; then
        apt_install $packages
        return
    fi
    echo "missing: $packages. Install them first: sudo apt-get install $packages" >&2
    exit 1
}

# Without them the tests in tests/cluster are skipped, so a failure here is only reported.
install_cluster_packages() {
    local packages
    packages=$(missing_cluster_packages)
    [ -z "$packages" ] && return
    # shellcheck disable=SC2086
    if may_install; then
        apt_install $packages || echo "could not install $packages: the tests of tests/cluster will skip" >&2
    fi
}

torch_requirement() { grep '^torch==' "$project/constraints.txt"; }

# True if the torch that pip would install depends on CUDA. Reads only metadata, downloads no wheel.
default_torch_has_cuda() {
    pip install --dry-run --no-deps --ignore-installed --quiet --report - "$(torch_requirement)" | python -c '
import json, sys
[torch] = json.load(sys.stdin)["install"]
needs = torch["metadata"].get("requires_dist", [])
sys.exit(not any(n.startswith(("nvidia", "cuda")) for n in needs) or "+cpu" in torch["metadata"]["version"])'
}

install_torch() {
    python -c 'import torch' 2>/dev/null && return
    if has_nvidia_gpu || ! default_torch_has_cuda; then
        pip install --quiet "$(torch_requirement)"
    else # no NVIDIA driver: the CPU build, without gigabytes of CUDA
        pip install --quiet --index-url https://download.pytorch.org/whl/cpu "$(torch_requirement)"
    fi
}

prepare_environment() {
    local extras=$1 stamp
    stamp=$(cat "$project/pyproject.toml" "$project/constraints.txt" <(echo "$extras") | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$project/.venv/installed-$extras" 2>/dev/null)" != "$stamp" ]; then
        install_system_packages
        say "installing into $project/.venv (a minute or two)"
        [ -x "$project/.venv/bin/python" ] || python3 -m venv "$project/.venv"
        source "$project/.venv/bin/activate"
        install_torch
        DS_BUILD_OPS=0 pip install --quiet -c "$project/constraints.txt" -e "$project[$extras]"
        echo "$stamp" >"$project/.venv/installed-$extras"
    fi
    source "$project/.venv/bin/activate"
    if ! has_nvidia_gpu; then
        export DS_ACCELERATOR=cpu
    fi
}
