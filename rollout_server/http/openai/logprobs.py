"""Log-probs of committed tokens in the shapes of OpenAI's two kinds of completions, as pieces of JSON."""

from collections.abc import Iterable, Iterator
from typing import Any

from rollout_server.engine.detokenize import Texts
from rollout_server.engine.listener import PromptScores
from rollout_server.http.openai.entries import Entries, Rows
from rollout_server.http.openai.json_pieces import list_pieces

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not."""


def completion_logprobs(rows: Rows, texts: Texts, offset: int) -> Iterator[bytes]:
    """`CompletionLogprobs` of tokens whose first one starts at `offset` of the text."""
    yield b'{"text_offset":'
    yield from list_pieces(_offsets(rows.token_ids, texts, offset))
    yield b',"token_logprobs":'
    yield from list_pieces(None if logprob is None else max(logprob, LOWEST) for logprob in rows.logprobs)
    yield b',"tokens":'
    yield from list_pieces(texts[token_id] for token_id in rows.token_ids)
    yield b',"top_logprobs":'
    entries = zip(rows.token_ids, rows.logprobs, rows.likeliest(), strict=True)
    yield from list_pieces(_by_text(*entry, texts) for entry in entries)
    yield b"}"


def _offsets(token_ids: Iterable[int], texts: Texts, offset: int) -> Iterator[int]:
    for token_id in token_ids:
        yield offset
        offset += len(texts[token_id])


def _by_text(
    token_id: int, logprob: float | None, likeliest: dict[int, float] | None, texts: Texts
) -> dict[str, float] | None:
    """Log-probs of the sampled token and the most likely ones; of tokens with one text, the first."""
    if logprob is None or likeliest is None:
        return None
    result: dict[str, float] = {}
    for one, value in {token_id: logprob, **likeliest}.items():
        result.setdefault(texts[one], max(value, LOWEST))
    return result


def prompt_logprobs(scores: PromptScores, texts: Texts) -> Iterator[bytes]:
    """`PromptLogprobs`."""
    yield from list_pieces(_prompt_logprob(known, texts) for known in scores)


def _prompt_logprob(known: dict[int, tuple[float, int]] | None, texts: Texts) -> dict[str, Any] | None:
    if known is None:
        return None
    return {
        str(token_id): {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": texts[token_id]}
        for token_id, (logprob, rank) in known.items()
    }


def chat_logprobs(rows: Entries, texts: Texts) -> Iterator[bytes]:
    """`ChatLogprobs`."""
    yield b'{"content":'
    entries = zip(rows.token_ids, rows.logprobs, rows.likeliest(), strict=True)
    yield from list_pieces(_chat_entry(*entry, texts) for entry in entries)
    yield b"}"


def _chat_entry(token_id: int, logprob: float, likeliest: dict[int, float], texts: Texts) -> dict[str, Any]:
    others = [_token(texts[one], value) for one, value in likeliest.items()]
    return {**_token(texts[token_id], logprob), "top_logprobs": others}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode())}
