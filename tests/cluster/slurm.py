"""A real SLURM on two machines: munged and slurmd on both, slurmctld on the first; jobs are driven by its commands."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from pathlib import Path

from tests.cluster.machines import Machine, start_pair, wait_until

PROGRAMS = ["slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "sinfo"]

# Timeouts are as short as SLURM takes them: a dead node is noticed, and a requeued job starts, within seconds.
CONFIGURATION = """
ClusterName=two
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%h.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=2
ReturnToService=2
NodeName=node1 NodeAddr=10.77.0.1 CPUs=4
NodeName=node2 NodeAddr=10.77.0.2 CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


class SlurmCluster:
    """A running cluster of two nodes with 4 CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes = start_pair(folder)
        self._slurmd: dict[str, subprocess.Popen] = {}
        settings = folder / "slurm"
        settings.mkdir()
        (settings / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        for node in self.nodes:
            node.run("mount", "--bind", str(settings), "/etc/slurm")
            node.run("mkdir", "-p", "/run/munge", "/run/slurm/state", "/run/slurm/spool")
            names = {"pid-file": "pid", "socket": "munge.socket.2", "log-file": "log", "seed-file": "seed"}
            node.run("munged", "--force", f"--key-file={key}", *(f"--{k}=/run/munge/{v}" for k, v in names.items()))
        self._daemon(self.nodes[0], "slurmctld", "-D")
        for number in (1, 2):
            self.start_slurmd(number)
        self.wait_for_nodes()

    def _daemon(self, node: Machine, *command: str) -> subprocess.Popen:
        with open(self.folder / f"{command[0]}-{node.name}.out", "ab") as output:
            return node.start(*command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def wait_for_nodes(self) -> None:
        """Until both nodes are idle."""
        wait_until(
            lambda: self.command("sinfo", "--noheader", "--format=%T %D", check=False).stdout.split() == ["idle", "2"],
            30,
            f"the nodes did not become idle; {self.daemon_logs()}",
        )

    def command(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run one of SLURM's commands on node1, the login node."""
        return self.nodes[0].run(*command, check=check)

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), environment: dict | None = None):
        """`sbatch OPTIONS script arguments`: the job's id."""
        passed = {**os.environ, **(environment or {})}
        done = self.nodes[0].run("sbatch", "--parsable", *options, str(script), *arguments, env=passed)
        return int(done.stdout.strip().split(";")[0])

    def job(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol show job` says, by field; a task of an array is `12_0`."""
        text = self.command("scontrol", "--oneliner", "show", "job", str(job_id)).stdout
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def wait_for_state(self, job_id: int | str, states: set[str], timeout: float) -> str:
        """Until the job is in one of these states; a requeued job is let go sooner than SLURM's two minutes."""
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in states:
            if job["Reason"] == "BeginTime":
                time.sleep(3)  # started in the second in which it was ended, it would be refused by the nodes
                self.command("scontrol", "update", f"JobId={job_id}", "StartTime=now")
            assert time.monotonic() < deadline, (
                f"job {job_id} is {job['JobState']} ({job['Reason']}) after {timeout} s, not {states}; its log:\n"
                f"{self.log(job_id)}\n{self.daemon_logs()}"
            )
            time.sleep(0.2)
        return job["JobState"]

    def wait(self, job_id: int | str, timeout: float = 240) -> str:
        """Wait for the job's end and return its last state: COMPLETED, FAILED, ..."""
        while True:
            state = self.wait_for_state(job_id, ENDED, timeout)
            time.sleep(2)  # on its way back to the queue a job shows the state in which it was ended
            if self.job(job_id)["JobState"] == state:
                return state

    def wait_for_log(self, job_id: int | str, pattern: str, timeout: float = 60) -> None:
        """Until the job's log has a line that matches."""
        wait_until(
            lambda: re.search(pattern, self.log(job_id)),
            timeout,
            f"job {job_id}: no line matches {pattern!r} after {timeout} s",
        )

    def log(self, job_id: int | str) -> str:
        """What the job wrote so far, all its starts together."""
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def cancel(self, job_id: int, step: int | None = None) -> None:
        self.command("scancel", str(job_id) if step is None else f"{job_id}.{step}")

    def requeue(self, job_id: int) -> None:
        self.command("scontrol", "requeue", str(job_id))

    def signal_batch(self, job_id: int, name: str) -> None:
        """Send the batch script a signal, as `--signal=B:NAME@SECONDS` does before the time limit."""
        self.command("scancel", "--batch", f"--signal={name}", str(job_id))

    def kill_slurmd(self, number: int) -> None:
        """SIGKILL the daemon of node `number` (1 or 2); the tasks there live on."""
        node = self.nodes[number - 1]
        node.run("sh", "-c", "kill -KILL $(cat /run/slurm/slurmd.pid)")
        self._slurmd.pop(node.name).wait()

    def start_slurmd(self, number: int) -> None:
        node = self.nodes[number - 1]
        self._slurmd[node.name] = self._daemon(node, "slurmd", "-D", "-N", node.name)

    def daemon_logs(self) -> str:
        """The last lines of the daemons, for messages of failed tests."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
