"""Two machines on one: Linux namespaces with their own network, host name, process tree and /run, joined by a cable.

They share the file system, as the nodes of a cluster do, and nothing else: a process on one reaches the other by its
address alone. The kernel ends them with the process that made them, whatever became of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Process 1 of a machine: adopts what daemons leave behind, as any init does.
INIT = """
import os, time
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.05)
"""


def missing_for(programs: list[str]) -> str | None:
    """Why machines with these programs cannot be made here, or None if they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [name for name in ["unshare", "nsenter", "setpriv", "ip", *programs] if not shutil.which(name)]
    if absent:
        return f"needs {', '.join(absent)} (scripts/test.sh installs them where it is root and has apt-get)"
    attempt = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return f"namespaces are not allowed here: {attempt.stderr.decode().strip()}" if attempt.returncode else None


@dataclass
class Machine:
    """A machine; `run` and `start` execute commands on it."""

    name: str
    address: str
    interface: str
    keeper: subprocess.Popen
    pid: int  # of its process 1, seen from outside
    environment: dict[str, str] = field(default_factory=dict)

    def _command(self, command: list[str]) -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wd={os.getcwd()}"]
        return [*enter, "env", *(f"{k}={v}" for k, v in self.environment.items()), *command]

    def run(self, *command: str, check: bool = True, timeout: float = 60, **options) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self._command(list(command)), capture_output=True, text=True, timeout=timeout, check=False, **options
        )
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done

    def start(self, *command: str, **options) -> subprocess.Popen:
        return subprocess.Popen(self._command(list(command)), **options)

    def processes(self, pattern: str) -> list[int]:
        """Ids, as the machine sees them, of the processes whose command line matches."""
        return [int(pid) for pid in self.run("pgrep", "--full", pattern, check=False).stdout.split()]

    def stop(self) -> None:
        self.keeper.kill()
        self.keeper.wait()


def start_machine(name: str, address: str, interface: str, etc: Path) -> Machine:
    """A machine without a network yet; the files of `etc` take the place of those in /etc."""
    separate = ["unshare", "--net", "--uts", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
    keeper = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *separate, sys.executable, "-S", "-c", INIT])
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
    wait_until(lambda: children.read_text().strip(), 10, f"{name} did not start")
    machine = Machine(name, address, interface, keeper, int(children.read_text()))
    machine.run("hostname", name)
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/run")
    for file in etc.iterdir():
        machine.run("mount", "--bind", str(file), f"/etc/{file.name}")
    return machine


def connect(first: Machine, second: Machine) -> None:
    """Lay a cable between two machines."""
    ends = [[machine.interface, "netns", str(machine.pid)] for machine in (first, second)]
    subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
    for machine in (first, second):
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", machine.interface)
        machine.run("ip", "link", "set", "lo", "up")
        machine.run("ip", "link", "set", machine.interface, "up")


def start_pair(folder: Path) -> tuple[Machine, Machine]:
    """Two connected machines, node1 and node2, that know each other by name."""
    addresses = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
    etc = folder / "etc"
    etc.mkdir()
    (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for name, a in addresses.items()))
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no DNS: nothing to wait for
    first, second = (start_machine(name, a, f"to-{name}", etc) for name, a in addresses.items())
    connect(first, second)
    return first, second


def wait_until(condition: Callable[[], object], seconds: float, complaint: str) -> None:
    """Poll until `condition()` is true; fail with `complaint` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.1)
