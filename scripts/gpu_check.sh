#!/usr/bin/env bash
# On a machine with a GPU, one command for all that needs one: scripts/gpu_check.sh [--out DIR] [--commit SHA] [--dry-run]
# Tests on hardware, launch configurations for this GPU (tuned.json of blip3o_kernels), benchmark. Under 8 minutes; each
# stage has a budget in seconds, below. Installs and downloads nothing; works in a plain copy of the tree.
#   --out DIR      where results and a copy of tuned.json go; default kernels/benchmarks/results/<GPU>
#   --commit SHA   of the code, where the tree has no git to ask
#   --dry-run      check what is needed, print the commands, run none of them; needs no GPU
# Exit 0: all stages passed. 1: one did not, or something is missing.
set -uo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
cd "$project" || exit 1

tests_budget=120
tune_budget=110
bench_budget=190

out="" commit="" dry_run=""
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=${2:?--out: give a folder} && shift 2 ;;
    --commit) commit=${2:?--commit: give the commit} && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    *) echo "gpu_check.sh: unknown argument $1; it takes --out DIR, --commit SHA, --dry-run" >&2 && exit 2 ;;
    esac
done

[ -f .venv/bin/activate ] && source .venv/bin/activate
python=$(command -v python3 || command -v python) || { echo "gpu_check.sh: no python on the PATH" >&2; exit 1; }
unset TRITON_INTERPRET BLIP3O_KERNELS
export PYTHONPATH="$project:$project/kernels${PYTHONPATH:+:$PYTHONPATH}"

missing=$("$python" - <<'PY'
from importlib.util import find_spec
needed = {"torch": "torch", "triton": "triton", "numpy": "numpy", "matplotlib": "matplotlib", "pydantic": "pydantic",
          "yaml": "pyyaml", "safetensors": "safetensors", "pytest": "pytest", "xdist": "pytest-xdist",
          "hypothesis": "hypothesis"}
print(" ".join(package for module, package in needed.items() if find_spec(module) is None))
PY
)
if [ -n "$missing" ]; then
    echo "gpu_check.sh: $python lacks $missing: pip install -c constraints.txt $missing" >&2
    exit 1
fi
if [ -z "$dry_run" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: no CUDA device that PyTorch can use; --dry-run shows what would run" >&2
    exit 1
fi

failed=0
stage() { # name, budget, command...
    local name=$1 budget=$2 started=$SECONDS
    shift 2
    echo "== $name (at most $budget s): $*"
    [ -n "$dry_run" ] && return
    timeout --kill-after=10 "$budget" "$@"
    local code=$?
    [ $code -eq 124 ] && echo "gpu_check.sh: $name did not end within $budget s" >&2
    [ $code -ne 0 ] && failed=1
    echo "== $name: exit $code after $((SECONDS - started)) s"
}

# Processes share the compiling; what is marked as one group stays in one of them.
stage tests "$tests_budget" "$python" -m pytest tests/gpu -q -n 10 --dist loadgroup -p no:cacheprovider
stage tune "$((tune_budget + 20))" "$python" scripts/tune_kernels.py --budget "$tune_budget"
stage bench "$((bench_budget + 40))" "$python" scripts/bench_kernels.py --budget "$bench_budget" \
    ${out:+--out "$out"} ${commit:+--commit "$commit"}
if [ -z "$dry_run" ] && [ -n "$out" ]; then
    mkdir -p "$out" && cp kernels/blip3o_kernels/tuned.json "$out/tuned.json"
fi
[ -n "$dry_run" ] || echo "gpu_check.sh: $([ $failed -eq 0 ] && echo all stages passed || echo FAILED) after $SECONDS s"
exit $failed
