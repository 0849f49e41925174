"""A server in a process of its own, for tests: started on free ports, with what it prints and logs at hand."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
import psutil

ROOT = Path(__file__).parents[1]
START_SECONDS = 240.0
STOP_SECONDS = 60.0
FIRST_TOKENS = "e3rl_first_token_seconds_count"
"""Counts streams, and where there are traces all requests, that have begun to generate."""
WAIT_SECONDS = 60.0
Result = TypeVar("Result")


class ServerProcess:
    """A running server. `printed`: its standard output so far, by name; `log`: the file of its standard error."""

    def __init__(
        self, process: "subprocess.Popen[str]", printed: dict[str, str], log: Path, key: str | None = None
    ) -> None:
        self.process = process
        self.printed = printed
        self.log = log
        self.url = printed["public"]
        self.admin = printed["admin"]
        self.model = printed["model"]
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=self.url, timeout=120.0, headers=headers)
        self.admin_client = httpx.Client(base_url=self.admin, timeout=120.0, headers=headers)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.client.post(route, json={"model": self.model, **body})

    def complete(self, prompt: Any = "Hello", **body: Any) -> dict[str, Any]:
        """The answer to a completion request that must succeed."""
        answer = self.post("/v1/completions", prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"there is no metric {name}"
        return sum(map(float, values))

    def blocks_in_use(self) -> float:
        """Share of KV blocks that requests hold. The engine reports after a step, so one short request makes it."""
        self.complete("x", max_tokens=1, erasure={"enabled": False})
        deadline = time.monotonic() + 2.0
        while (usage := self.metric("vllm:kv_cache_usage_perc")) > 0.0 and time.monotonic() < deadline:
            time.sleep(0.05)
        return usage

    def wait_for(self, metric: str, value: float) -> None:
        """Wait until a metric has this value."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (now := self.metric(metric)) != value:
            assert time.monotonic() < deadline, f"{metric} is {now} after {WAIT_SECONDS:g} s and not {value}"
            time.sleep(0.02)

    def wait_for_log(self, text: str) -> None:
        """Wait until the log has this text: a request's line is written once its answer is sent."""
        deadline = time.monotonic() + WAIT_SECONDS
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, f"{text} is not in the log after {WAIT_SECONDS:g} s"
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until no request is under way; all KV blocks must then be free."""
        self.wait_for("e3rl_requests_active", 0)
        assert self.metric("e3rl_responses_active") == 0
        assert self.blocks_in_use() == 0

    def stop(self) -> int:
        """SIGTERM, and the exit code; fails if a process of the server is left."""
        self.client.close()
        self.admin_client.close()
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(STOP_SECONDS)
        _, left = psutil.wait_procs(family, timeout=5.0)
        assert not left, f"the server left behind {left}"
        return code


class Background(Generic[Result]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._future: Future[Result] = Future()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._call())
        except BaseException as error:
            self._future.set_exception(error)

    def is_pending(self, seconds: float = 0.5) -> bool:
        """Whether it has not returned `seconds` from now."""
        return not wait((self._future,), seconds).done

    def result(self, seconds: float = WAIT_SECONDS) -> Result:
        """What it returns; raises what it raises, and `TimeoutError` if it does neither in time."""
        return self._future.result(seconds)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the repository on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **extra}


@contextmanager
def running_server(model: Path, directory: Path, *flags: str, **variables: str) -> Iterator[ServerProcess]:
    """A server on `model` with free ports; `directory` receives its log."""
    log = directory / "server.log"
    command = [sys.executable, "-m", "rollout_server", "--model", str(model), "--port", "0", "--admin-port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(**variables), cwd=ROOT
        )
    try:
        server = ServerProcess(process, _read_banner(process, log), log, variables.get("E3RL_API_KEY"))
        with server.client, server.admin_client:
            yield server
            if process.poll() is None:
                assert server.stop() == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _read_banner(process: "subprocess.Popen[str]", log: Path) -> dict[str, str]:
    """What the server prints when it is ready; its last line is `keys`."""
    printed: dict[str, str] = {}
    if process.stdout is None:
        raise RuntimeError("the server's output is not captured")
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + START_SECONDS
    while "keys" not in printed:
        line = process.stdout.readline()
        if line:
            name, value = line[:18].strip(), line[18:].strip()
            printed[name] = value
        elif process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the server did not start; its log ends:\n{log.read_text()[-3000:]}")
        else:
            time.sleep(0.05)
    return printed


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events; it must end with `[DONE]`."""
    for line in lines:
        if not line:
            continue
        assert line.startswith("data: "), line
        if line == "data: [DONE]":
            assert not any(lines), "something follows [DONE]"
            return
        yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def texts(chunks: list[dict[str, Any]], choices: int) -> list[str]:
    """The text of each choice of a stream, with retractions applied."""
    result = [""] * choices
    for chunk in chunks:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            index = choice["index"]
            erasure = choice.get("erasure") or {}
            if erasure.get("event") == "erase":
                assert piece == ""
                result[index] = result[index][: len(result[index]) - erasure["retract_characters"]]
            result[index] += piece
    return result
