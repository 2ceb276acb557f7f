# Sourced by the job scripts: everything around the command that is the same in all of them.
# Takes PROJECT and MODULES; leaves the shell in the project's folder with its Python environment.

say() { echo "== $(date +%T) $*"; }

cd "$PROJECT" || exit 2
if [ ! -e scripts/train_clip_reproduction.py ]; then
    say "$PROJECT is not the project's folder: submit from there, or set PROJECT" >&2
    exit 2
fi

# Modules, where the cluster has them.
if command -v module >/dev/null; then
    # shellcheck disable=SC2086
    module load $MODULES || exit 2
fi
[ -e .venv/bin/activate ] && source .venv/bin/activate
python -c 'import blip3o_ds, blip3o_kernels' || { say "install the project first: scripts/README.md" >&2; exit 2; }

# srun has not taken this over from sbatch since SLURM 22.05; without it every rank would share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# Compiled kernels go to the node's own disk: ranks that compile into one network folder wait for its locks. C++
# extensions get a folder for each start: a job killed while compiling leaves a lock there that nobody ever opens.
cache=${TMPDIR:-/tmp}/blip3o-ds-$(id -un)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}}

# NCCL. What is set already, by a module or by the caller, stays.
# Say why a connection failed; silent otherwise.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Ranks find each other over this network; on many nodes the first interface is a bridge for virtual machines, which
# leads nowhere. Where several are left, name one: ib0, eno1.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}
# InfiniBand waits 4.1 us * 2^22, seven times over: two minutes, which outlive the restart of a switch's port.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# When a collective times out, each rank writes down what it was waiting for; beside the log, not on the node's /tmp,
# where nobody can look after the job's end.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$SLURM_SUBMIT_DIR/nccl_trace_${SLURM_JOB_ID}_rank_}
