"""A real Slurm of one node, this machine: what `apt-get install slurm-wlm munge` brings, started by root in a folder.

python tests/lab/one_node.py FOLDER        starts it and prints SLURM_CONF
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={next_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
MinJobAge=30
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=15
InactiveLimit=0
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} CPUs={cores} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0 OverTimeLimit=0
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> str | None:
    """Why this machine cannot be a cluster."""
    lacking = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd must be started by root"


class Node:
    """The daemons, to be stopped and started again by a test of faults."""

    def __init__(self, folder: Path, port: int = 26817) -> None:
        self.folder, self.configuration = folder, folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.configuration.write_text(
            CONFIGURATION.format(host=host, folder=folder, port=port, next_port=port + 1, cores=os.cpu_count() or 1)
        )
        self.host = host
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.configuration), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(self, *names: str) -> None:
        for name in names or ("slurmctld", "slurmd"):
            with open(self.folder / f"{name}.out", "ab") as out:
                self.daemons[name] = subprocess.Popen([name, "-D"], env=self.environment, stdout=out, stderr=out)

    def kill(self, name: str) -> None:
        self.daemons[name].kill()
        self.daemons[name].wait()

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def wait_until_idle(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while "idle" not in (said := self.ask("sinfo", "--noheader", "--format=%T")):
            assert time.monotonic() < until, said + self.ask("tail", "-n", "20", str(self.folder / "slurmd.log"))
            time.sleep(0.5)


@contextmanager
def one_node(folder: Path) -> Iterator[Node]:
    """Munge and a Slurm of one node, until the block ends."""
    started_munge = None
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        Path("/run/munge").mkdir(mode=0o755, exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        started_munge = subprocess.Popen(["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground"])
        time.sleep(1)
    node = Node(folder)
    node.start()
    try:
        node.wait_until_idle()
        yield node
    finally:
        node.ask("scancel", "--user", "root")
        time.sleep(1)
        for daemon in reversed(list(node.daemons.values())):
            daemon.terminate()
            daemon.wait()
        if started_munge is not None:
            started_munge.terminate()
            started_munge.wait()


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    with one_node(Path(sys.argv[1]).absolute()) as node:
        print(f"export SLURM_CONF={node.configuration}", flush=True)
        while True:
            time.sleep(60)
