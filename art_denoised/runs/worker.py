"""What a worker process runs. It imports little, so that it ignores Ctrl-C before torch is read."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


def serve(connection: Connection, plan: bytes, device: str | None, threads: int) -> None:
    """Answer work until the driver goes away; it alone decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group of processes
    work: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, work), daemon=True).start()
    from art_denoised.runs.workers import Replica

    replica = Replica(plan, device, threads)
    try:
        connection.send(replica.hello())
        while True:
            connection.send(replica.answer(work.get()))
    except OSError:  # the driver has gone
        return


def _read(connection: Connection, work: SimpleQueue[Any]) -> None:
    """Take messages from the pipe at once, so that the driver never waits to send one."""
    try:
        while True:
            work.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # the driver has gone; the network may compute for long
