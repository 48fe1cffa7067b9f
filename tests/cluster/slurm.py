"""A real SLURM for a test session: munge, a controller and two nodes on this machine, without systemd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
CONFIGURATION = """
ClusterName=t
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
SelectType=select/cons_tres
AuthInfo=cred_expire=5
KillWait=3
SlurmdTimeout=5
MinJobAge=300
ReturnToService=2
MpiDefault=pmi2
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=p Nodes=ALL Default=YES PreemptMode=OFF
PartitionName=lo Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=hi Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no SLURM here; empty if there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in PROGRAMS if _program(name) is None]
    return f"no {', '.join(absent)} on this machine" if absent else ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing_namespaces() -> str:
    """Why nodes cannot be network namespaces here; empty if they can."""
    if absent := [name for name in ("ip", "nsenter", "unshare") if _program(name) is None]:
        return f"no {', '.join(absent)} on this machine"
    try:
        _ip("link", "add", "dstry", "type", "bridge")
        _ip("link", "del", "dstry")
    except subprocess.CalledProcessError as error:
        return f"no bridges on this machine: {error.stderr.strip()}"
    return ""


class Slurm:
    """Two nodes of eight CPUs, up from here to `close`."""

    address = "127.0.0.1"

    def __init__(self, folder: Path):
        self._folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", *(f"{kind}.n{node}" for kind in ("spool", "tmp") for node in (1, 2))):
            (folder / name).mkdir()
        port, port1, port2 = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(
            folder=folder, host=host, address=self.address, port=port, nodes=self._nodes(host, [port1, port2])
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._started_munge = _start_munge()
        self._run("slurmctld")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_until_idle()

    def _nodes(self, host: str, ports: list[int]) -> str:
        return "\n".join(
            f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8"
            for i, port in enumerate(ports)
        )

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._run("slurmd", "-N", node)

    def wait_until_idle(self) -> None:
        """Until both nodes can work."""
        end = time.monotonic() + 30
        while self._states() != {"idle"}:
            if time.monotonic() > end:
                log = (self._folder / "slurmctld.log").read_text()[-2000:]
                self.close()
                raise AssertionError(f"SLURM does not come up: {self._states()}\n{log}")
            time.sleep(0.1)

    def ask(self, program: str, *arguments: object) -> str:
        """What a command of SLURM's prints."""
        return self._run(program, *map(str, arguments)).strip()

    def _run(self, program: str, *arguments: str) -> str:
        found = _program(program)
        assert found is not None
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            [found, *arguments], env=environment, capture_output=True, text=True, check=True
        ).stdout

    def _states(self) -> set[str]:
        try:
            return {line.split()[1] for line in self._run("sinfo", "-h", "-N", "-o", "%N %t").splitlines()}
        except subprocess.CalledProcessError:
            return set()

    def close(self) -> None:
        """End the daemons."""
        for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self._folder / name).read_text()), signal.SIGTERM)
        if self._started_munge:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(Path("/run/munge/munged.pid").read_text()), signal.SIGTERM)


class IsolatedSlurm(Slurm):
    """Nodes as network namespaces, with names, processes and shared memory of their own: they can be lost."""

    address = "10.77.0.1"

    def __init__(self, folder: Path):
        self._nodes_up: dict[str, subprocess.Popen[bytes]] = {}
        _ip("link", "add", "dsbridge", "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", "dsbridge")
        _ip("link", "set", "dsbridge", "up")
        for i in (1, 2):
            _ip("netns", "add", f"dsn{i}")
            _ip("link", "add", f"dsv{i}", "type", "veth", "peer", "name", f"dsp{i}")
            _ip("link", "set", f"dsv{i}", "master", "dsbridge")
            _ip("link", "set", f"dsv{i}", "up")
            _ip("link", "set", f"dsp{i}", "netns", f"dsn{i}")
            _ip("-n", f"dsn{i}", "addr", "add", f"10.77.0.1{i}/24", "dev", f"dsp{i}")
            _ip("-n", f"dsn{i}", "link", "set", f"dsp{i}", "up")
            _ip("-n", f"dsn{i}", "link", "set", "lo", "up")
        super().__init__(folder)

    def _nodes(self, host: str, ports: list[int]) -> str:
        return "\n".join(
            f"NodeName=n{i} NodeHostname=n{i} NodeAddr=10.77.0.1{i} Port={ports[0]} CPUs=8" for i in (1, 2)
        )

    def start_node(self, node: str) -> None:
        inside = f"hostname {node}; mount -t tmpfs tmpfs /dev/shm; exec {_program('slurmd')} -D -N {node}"
        spaces = "--uts --pid --ipc --mount --fork --kill-child --mount-proc"
        self._nodes_up[node] = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/ds{node}", "unshare", *spaces.split(), "sh", "-c", inside],
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def crash(self, node: str) -> None:
        """End every process of a node at once."""
        self._nodes_up[node].kill()  # which takes all in its process namespace with it
        self._nodes_up[node].wait()

    def cut(self, node: str) -> None:
        """Take a node off the network; it works on."""
        _ip("link", "set", f"dsv{node[1:]}", "down")

    def mend(self, node: str) -> None:
        """Put a node back on the network."""
        _ip("link", "set", f"dsv{node[1:]}", "up")

    def close(self) -> None:
        super().close()
        for process in self._nodes_up.values():
            process.kill()
            process.wait()
        for i in (1, 2):
            _ip("link", "del", f"dsv{i}")
            _ip("netns", "del", f"dsn{i}")
        _ip("link", "del", "dsbridge")


def _ip(*arguments: str) -> None:
    program = _program("ip")
    assert program is not None
    subprocess.run([program, *arguments], check=True, capture_output=True, text=True)


def _start_munge() -> bool:
    """Whether it had to be started."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return False
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    munged = _program("munged")
    subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", str(munged)], check=True, capture_output=True)
    return True


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
