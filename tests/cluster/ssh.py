"""sshd on two machines, and keys for it: what `deepspeed --hostfile` needs beside pdsh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.cluster.machines import start_pair

PROGRAMS = ["sshd", "ssh", "ssh-keygen", "pdsh"]

SERVER = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile /run/sshd.pid
StrictModes no
PermitRootLogin yes
UsePAM no
SetEnv GLOO_SOCKET_IFNAME={interface} PATH={path} OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR={built}
"""

# Keep-alives: ssh notices within six seconds that the other side is gone, instead of waiting for ever.
CLIENT = """
Host *
    IdentityFile {folder}/user_key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
    ConnectTimeout 3
    ServerAliveInterval 2
    ServerAliveCountMax 3
"""


class Hosts:
    """Two machines that log in to each other; node1 is where the launcher runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        client = folder / "ssh_config"
        client.write_text(CLIENT.format(folder=folder))
        self.nodes = start_pair(folder)
        for node in self.nodes:
            node.run("mount", "--bind", str(client), "/etc/ssh/ssh_config")
            server = folder / f"sshd-{node.name}"
            inherited = {"path": os.environ["PATH"], "built": os.environ["TORCH_EXTENSIONS_DIR"]}
            server.write_text(SERVER.format(folder=folder, interface=node.interface, **inherited))
            node.run("mkdir", "/run/sshd")
            node.run("/usr/sbin/sshd", "-f", str(server), "-E", f"{server}.log")
        for node in self.nodes:
            self.nodes[0].run("ssh", node.name, "true")

    def cut(self) -> None:
        """Pull the cable out of node2."""
        self.nodes[1].run("ip", "link", "set", self.nodes[1].interface, "down")

    def mend(self) -> None:
        """Put it back in."""
        self.nodes[1].run("ip", "link", "set", self.nodes[1].interface, "up")

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
