"""A server in a process of its own, for tests: started on free ports, with what it prints and logs at hand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
START_SECONDS = 240.0
STOP_SECONDS = 60.0


class ServerProcess:
    """A running server. `printed`: its standard output so far, by name; `log`: the file of its standard error."""

    def __init__(self, process: "subprocess.Popen[str]", printed: dict[str, str], log: Path) -> None:
        self.process = process
        self.printed = printed
        self.log = log
        self.url = printed["public"]
        self.admin = printed["admin"]
        self.model = printed["model"]
        self.client = httpx.Client(base_url=self.url, timeout=120.0)
        self.admin_client = httpx.Client(base_url=self.admin, timeout=120.0)

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

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.client.close()
        self.admin_client.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


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
        server = ServerProcess(process, _read_banner(process, log), log)
        yield server
        if process.poll() is None:
            server.stop()
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
