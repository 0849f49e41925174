"""When a stream shows its first text: the server's default policy against plain generation.

    python -m tests.benchmarks.first_text [--model runs/models/smollm2] [--tokens 160]

One client, one request at a time; the ways to ask take turns. Without `--model` a random model of two layers with the
tokenizer of a usual chat model is made.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.http_server import running_server
from tests.models import everyday_llama

PROMPTS = (
    "The history of the bicycle begins in the early nineteenth century.",
    "Question: What is photosynthesis?\nAnswer:",
    "Once upon a time there was a small village by the sea.",
    "How to bake bread:\n1.",
    "The three most important things about money are these.",
    "Dear Anna,\n",
)
LONG = " ".join(PROMPTS) * 6
"""A prompt of some 450 tokens."""

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"enabled": False},
    "default, live": {"stream": "live"},
    "default, commit": {},
    "lines, commit": {"segmentation": {"mode": "delimiter", "delimiter": "\n", "min_length": 16, "max_length": 128}},
    "fixed 512, commit": {"segmentation": {"mode": "fixed", "length": 512}},
}
ROUNDS = 2


def first_text(client: httpx.Client, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds until a stream's first text, and tokens that came with it."""
    started = time.perf_counter()
    tokens = 0
    with client.stream("POST", "/v1/completions", json={**body, "stream": True, "return_token_ids": True}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            tokens += len(choice.get("token_ids") or [])
            if choice["text"]:
                break
    return time.perf_counter() - started, tokens


def measure(model: Path, tokens: int, directory: Path, threads: str) -> list[str]:
    """A Markdown table's rows."""
    rows = []
    with running_server(model, directory, "--max-length", "1024", OMP_NUM_THREADS=threads) as server:
        for name, prompts in (("short", PROMPTS), ("long", (LONG,))):
            found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
            for round_ in range(ROUNDS):
                for number, prompt in enumerate(prompts):
                    # A prefix of its own for each request, so that none finds another's in the cache.
                    for way, erasure in WAYS.items():
                        body = {"model": server.model, "max_tokens": tokens, "seed": round_, "erasure": erasure}
                        body |= {"prompt": f"{way} {round_} {number}: {prompt}", "ignore_eos": True}
                        found[way].append(first_text(server.client, body))
                        # A client that left must not slow the next one down.
                        server.settle()
            plain = statistics.median(seconds for seconds, _ in found["plain"])
            for way, pairs in found.items():
                seconds = statistics.median(seconds for seconds, _ in pairs)
                count = statistics.median(count for _, count in pairs)
                rows.append(f"| {name} | {way} | {seconds:.3f} | {seconds / plain:.1f} | {count:g} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--threads", default="1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = options.model or everyday_llama(Path(place, "everyday"))
        rows = measure(model, options.tokens, Path(place), options.threads)
    print("| prompt | how | seconds to the first text (median) | over plain | tokens by then (median) |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
