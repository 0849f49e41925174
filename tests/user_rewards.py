"""Reward functions as users write them, good and bad, for tests of the loader and of the workers."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

not_callable = 3.0
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def length(prompt: str, response: str, answer: str) -> float:
    return len(response) / 10.0


def equal(prompt: str, response: str, answer: str) -> bool:
    return response == answer


def in_order(question: str, text: str, expected: str) -> float:
    return float((question, text, expected) == ("prompt", "a", "x"))


def by_name(token_ids: list[int], level: int, finish_reason: str, *, missing: str = "default") -> float:
    return len(token_ids) + 10 * level + 100 * (finish_reason == "length") + 1000 * (missing == "default")


async def asynchronous(response: str) -> float:
    return float(response == "a")


def raises(prompt: str, response: str, answer: str) -> float:
    raise KeyError(f"no {response}")


def raises_on_request(response: str) -> float:
    if response == "raise":
        raise KeyError("on request")
    return 1.0


def hangs_on_request(prompt: str, response: str, answer: str) -> float:
    while response == "hang":
        time.sleep(60.0)
    return 1.0


class BrokenError(Exception):
    """Can't be shown and can't be pickled."""

    def __str__(self) -> str:
        raise RuntimeError("not even this")

    def __reduce__(self) -> Any:
        raise TypeError("can't be pickled")


class BrokenValue:
    """Can't be shown."""

    def __repr__(self) -> str:
        raise SystemExit(4)


def misbehaves(response: str) -> Any:
    """Does what the response names."""
    match response:
        case "exit":
            raise SystemExit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "os._exit":
            print("the last words")
            os._exit(7)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "real-time signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 3)
        case "broken error":
            raise BrokenError
        case "broken value":
            return BrokenValue()
        case "surrogate":
            raise ValueError("\ud800")
        case "forked":
            # Both processes come back from here.
            os.fork()
            return 0.5
        case "noisy grandchild":
            # Writes for ever into what the worker leaves behind.
            subprocess.Popen(["yes"], start_new_session=True)
            os._exit(8)
        case "closes all files":
            os.closerange(0, 256)
            return 0.5
        case "writes much":
            print("x" * 1_000_000)
            return 0.5
    return 1.0


def with_children(response: str) -> float:
    """Leaves processes behind: in its own session, in another one, and as a daemon's grandchild."""
    subprocess.Popen(SLEEPER)
    subprocess.Popen(SLEEPER, start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(SLEEPER[0], SLEEPER)
        os._exit(0)
    while response == "hang":
        time.sleep(60.0)
    if response == "die":
        os._exit(1)
    return 1.0


def half(value: float) -> float:
    return value / 2.0


def with_a_pool(response: str) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return sum(pool.map(half, [1.0, 2.0]))


def meets(response: str, answer: str) -> float:
    """Waits in the directory `answer` for as many calls as `response` says, each in a process of its own."""
    (Path(answer) / str(os.getpid())).touch()
    while len(os.listdir(answer)) < int(response):
        time.sleep(0.01)
    return 1.0


def process_id(prompt: str, response: str, answer: str) -> int:
    return os.getpid()


def even_bytes(prompt: str, response: str, answer: str) -> float:
    """1 for about half of all texts, whatever a model writes."""
    return float(sum(response.encode()) % 2 == 0)


def first_answer(prompt: str, response: str, answer: str) -> float:
    """1 if the first `Answer: N` of the response is the reference."""
    found = re.search(r"Answer: (-?\d+)", response)
    return float(found is not None and found.group(1) == answer)


def even_bytes_for_a_while(prompt: str, response: str, answer: str) -> float:
    """As `even_bytes`; once there is a file `slow` in the directory that the environment names, half a minute each."""
    while os.path.exists(os.path.join(os.environ["E3RL_TEST_DIRECTORY"], "slow")):
        time.sleep(30.0)
    return even_bytes(prompt, response, answer)
