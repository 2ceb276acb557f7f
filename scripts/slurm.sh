# Sourced by the job scripts: the setup that they share.
# Takes PROJECT and MODULES; leaves the shell in the project folder with its Python environment.

say() { echo "== $(date +%T) $*"; }

cd "$PROJECT" || exit 2
if [ ! -e scripts/train_clip_reproduction.py ]; then
    say "$PROJECT is not the project folder: submit from there, or set PROJECT" >&2
    exit 2
fi

# Modules, if the cluster has them.
if command -v module >/dev/null; then
    # shellcheck disable=SC2086
    module load $MODULES || exit 2
fi
[ -e .venv/bin/activate ] && source .venv/bin/activate
python -c 'import blip3o_ds, blip3o_kernels' || { say "install the project first: scripts/README.md" >&2; exit 2; }

# Since SLURM 22.05 srun does not inherit this from sbatch; without it all ranks would share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# What is compiled goes to the node's own disk: it suits this processor, and no other node waits for its lock.
cache=${TMPDIR:-/tmp}/blip3o-ds-$(id -un)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
own_extensions() { python -c 'from blip3o_ds.training.compiling import extensions_folder as f; print(f())'; }
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(XDG_CACHE_HOME=$cache own_extensions)}

# NCCL. Variables that a module or the caller has set are kept.
# Report why a connection failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The network over which ranks find each other. On many nodes the first interface is a bridge for virtual machines,
# which reaches no other node. If several remain, name one: ib0, eno1.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}
# InfiniBand waits 4.1 us * 2^22, seven times: two minutes, longer than the restart of a switch port takes.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# When a collective times out, each rank writes what it was waiting for: next to the log, since the node's /tmp cannot
# be read after the job.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$SLURM_SUBMIT_DIR/nccl_trace_${SLURM_JOB_ID}_rank_}
