"""Reward functions as users write them, good and bad, for tests of the loader and its time limit."""

import os
import re
import time

not_callable = 3.0


def length(prompt: str, response: str, answer: str) -> float:
    return len(response) / 10.0


def equal(prompt: str, response: str, answer: str) -> bool:
    return response == answer


def text(prompt: str, response: str, answer: str) -> str:
    return "good"


def infinite(prompt: str, response: str, answer: str) -> float:
    return float("nan")


def raises(prompt: str, response: str, answer: str) -> float:
    raise KeyError(f"no {response}")


def hangs_on_request(prompt: str, response: str, answer: str) -> float:
    while response == "hang":
        time.sleep(60.0)
    return 1.0


def exits(prompt: str, response: str, answer: str) -> float:
    raise SystemExit(3)


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
