"""vLLM's processes end with the process that started them, however that ended.

vLLM ends its engine process when it is told to. A process that was killed tells nothing, and its engine would keep
its memory, on a GPU nearly all of it, until somebody finds it.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time

log = logging.getLogger("e3rl.engine")
EVERY_SECONDS = 1.0


def end_with_parent() -> None:
    """Kill this process once its parent is gone: a thread looks every `EVERY_SECONDS`.

    Does nothing in a process that multiprocessing did not start: its parent may be a shell that it should outlive.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    threading.Thread(target=_watch, args=(parent.pid,), daemon=True, name="e3rl-orphan-watch").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY_SECONDS)
    log.error("the process that started this engine (pid %d) is gone: ending", parent)
    os.kill(os.getpid(), signal.SIGKILL)
