"""Which process of which machine something belongs to, and whether that process still runs."""

import contextlib
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process that something belongs to.

    Attributes:
        host: its name, for people.
        process: its number.
        process_started: tells it from a later process of the same number.
        machine: what sees that process: this start of the machine, and the container.
        since: UTC time when it took it.
        token: of this ownership alone.
    """

    host: str
    process: int
    process_started: str
    machine: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host!r}"


def this_process() -> Owner:
    """This one, as the owner of something from now on."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Owner(socket.gethostname(), os.getpid(), started(os.getpid()) or "", machine(), since, uuid.uuid4().hex)


def machine() -> str:
    """This start of this machine and, in a container, the container: processes see each other within it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    import psutil

    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def started(process: int) -> str | None:
    """When a process of this machine was started; None where it does not run any more."""
    import psutil  # here: most commands end, or begin to read, without

    try:
        found = psutil.Process(process)
        if found.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        with contextlib.suppress(OSError):  # in ticks since the boot, which no change of the clock moves
            return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return f"{found.create_time():.0f}"
    except psutil.NoSuchProcess:
        return None
