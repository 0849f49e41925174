"""The README's examples for the endpoint, run as they stand, with the addresses and the model's name replaced."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.http_server import ROOT, ServerProcess, environment

README = Path(os.environ.get("E3RL_README", ROOT / "README.md"))
MARK = "localhost:8000"


def examples(language: str) -> list[str]:
    """The code blocks of the README that call the endpoint."""
    if not README.is_file():
        return []
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if MARK in block and "rollout_server" not in block]


def adapted(block: str, server: ServerProcess) -> str:
    return (
        block.replace("http://localhost:8000", server.url)
        .replace("http://localhost:8001", server.admin)
        .replace('"demo"', f'"{server.model}"')
    )


def test_the_readme_shows_curl_the_client_and_a_stream() -> None:
    assert len(examples("bash")) >= 1
    assert len(examples("python")) >= 2


def test_curl_examples(server: ServerProcess) -> None:
    for block in examples("bash"):
        check_curl(adapted(block, server))


def check_curl(script: str) -> None:
    ended = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert '"choices"' in ended.stdout, ended.stdout
    assert '"error"' not in ended.stdout


def test_python_examples(server: ServerProcess) -> None:
    for block in examples("python"):
        check_python(adapted(block, server))


def check_python(script: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(OPENAI_API_KEY="none"),
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
