"""Third-party output goes to a file; the terminal shows the run and nothing else."""

import gc
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOG_NAME = "driver.log"


@contextmanager
def quiet_output(log_directory: Path) -> Iterator[TextIO]:
    """Send standard output and error of this process and its children to a log file; yields the real terminal.

    The file descriptors themselves are redirected, so that libraries that print, C code and processes started from
    here are quiet too. Log records and warnings go to the same file.
    """
    path = log_directory / LOG_NAME
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    terminal = io.TextIOWrapper(os.fdopen(os.dup(1), "wb", buffering=0), write_through=True)
    log_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    handler = logging.StreamHandler(os.fdopen(os.dup(log_file), "a", buffering=1))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    os.close(log_file)
    try:
        yield terminal
    finally:
        # What complains when it is collected, such as a future that nobody waited for, is to do so in the log.
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)
            os.close(original)
        logging.captureWarnings(False)
        root.handlers[:], root.level = before
        handler.close()
        handler.stream.close()
        terminal.close()
