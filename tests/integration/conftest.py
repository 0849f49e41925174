"""Servers that several modules use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import ServerProcess, running_server
from tests.models import tiny_qwen3


@pytest.fixture(scope="session")
def http_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and beside it one of the same shape with other weights."""
    directory = tmp_path_factory.mktemp("models")
    tiny_qwen3(directory / "other", seed=1)
    return tiny_qwen3(directory / "tiny", seed=0)


@pytest.fixture(scope="session")
def server(http_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server without keys."""
    # Few KV blocks, which a load soon has touched: further growth of its memory is not that of the KV cache.
    flags = ("--log-format", "json", "--num-gpu-blocks-override", "768")
    with running_server(http_model, tmp_path_factory.mktemp("server"), *flags) as process:
        yield process
