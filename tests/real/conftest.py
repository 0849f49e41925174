"""The pretrained model that `make real-model` makes, and one server on it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import ROOT, ServerProcess, running_server

MODEL = Path(os.environ.get("E3RL_REAL_MODEL", ROOT / "runs" / "models" / "smollm2"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"{MODEL} holds no model: run `make real-model`, or `make test-real`, which does")
    return MODEL


@pytest.fixture(scope="session")
def real_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With the server's defaults, but for a shorter context: nothing is said of sentinels."""
    flags = ("--max-length", "1024", "--max-concurrent-responses", "16")
    # With more threads than there are free cores it would be many times slower.
    with running_server(smollm2, tmp_path_factory.mktemp("server"), *flags, OMP_NUM_THREADS="1") as process:
        yield process
