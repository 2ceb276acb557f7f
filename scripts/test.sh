#!/usr/bin/env bash
# Set up and run the tests: scripts/test.sh [pytest arguments]. Needs no GPU; with one, tests/gpu run too.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$project"
prepare_environment demo,extract,dev
install_cluster_packages

say "ruff, mypy"
ruff format --check .
ruff check .
mypy

say "tests"
# One thread each: two workers share the cores, and sums do not depend on how many there are.
export OMP_NUM_THREADS=1
exec pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
