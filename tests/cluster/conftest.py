"""The cluster that the tests here share; they skip, saying why, where it cannot be made."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip3o_ds.training.compiling import extensions_folder
from tests.cluster import slurm as slurm_daemons
from tests.cluster import ssh
from tests.cluster.machines import missing_for
from tests.conftest import PROJECT


@pytest.fixture(scope="session", autouse=True)
def _this_project_on_every_machine() -> Iterator[None]:
    """Jobs find this interpreter and this checkout, and count no more threads than there are cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}")
        patch.setenv("PROJECT", str(PROJECT))
        patch.setenv("OMP_NUM_THREADS", "1")
        # What DeepSpeed compiled for the other tests; the job script would compile it again, into its own folder.
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
        yield


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_daemons.SlurmCluster]:
    """A SLURM of two nodes, node1 and node2."""
    if reason := missing_for(slurm_daemons.PROGRAMS):
        pytest.skip(reason)
    cluster = slurm_daemons.SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ssh.Hosts]:
    """Two machines, node1 and node2, that log in to each other by ssh."""
    if reason := missing_for(ssh.PROGRAMS):
        pytest.skip(reason)
    pair = ssh.Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        yield pair
    finally:
        pair.stop()
