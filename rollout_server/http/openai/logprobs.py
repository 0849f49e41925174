"""Log-probs of committed tokens in the shapes of OpenAI's two kinds of completions, as pieces of JSON."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rollout_server.engine.detokenize import Texts
from rollout_server.http.openai.choice import PromptScores, TokenEntry
from rollout_server.http.openai.json_pieces import list_pieces

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not."""
Row = tuple[int, float | None]
"""A token and its log-prob; null for the first token of a prompt."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of tokens. `entries` are gone through once."""

    tokens: list[Row]
    entries: Iterable[TokenEntry | None]

    @classmethod
    def of(cls, entries: list[TokenEntry]) -> "Rows":
        """Of a response's tokens."""
        return cls([(entry.token_id, entry.logprob) for entry in entries], entries)

    @classmethod
    def of_prompt(cls, prompt: list[int], scores: PromptScores, top: int) -> "Rows":
        """Of a prompt's tokens, of which the `top` likeliest are told."""
        pairs = list(zip(prompt, scores, strict=True))
        tokens = [(token_id, None if known is None else known[token_id][0]) for token_id, known in pairs]
        return cls(tokens, (_prompt_entry(token_id, known, top) for token_id, known in pairs))

    def followed_by(self, others: "Rows") -> "Rows":
        return Rows(self.tokens + others.tokens, chain(self.entries, others.entries))


def _prompt_entry(token_id: int, known: dict[int, tuple[float, int]] | None, top: int) -> TokenEntry | None:
    if known is None:
        return None
    likeliest = {token: value for token, (value, rank) in known.items() if rank <= top}
    return TokenEntry(token_id, known[token_id][0], likeliest)


def completion_logprobs(rows: Rows, texts: Texts, offset: int) -> Iterator[bytes]:
    """`CompletionLogprobs` of tokens whose first one starts at `offset` of the text."""
    yield b'{"text_offset":'
    yield from list_pieces(_offsets(rows.tokens, texts, offset))
    yield b',"token_logprobs":'
    yield from list_pieces(None if logprob is None else max(logprob, LOWEST) for _, logprob in rows.tokens)
    yield b',"tokens":'
    yield from list_pieces(texts[token_id] for token_id, _ in rows.tokens)
    yield b',"top_logprobs":'
    yield from list_pieces(None if entry is None else _by_text(entry, texts) for entry in rows.entries)
    yield b"}"


def _offsets(rows: Sequence[Row], texts: Texts, offset: int) -> Iterator[int]:
    for token_id, _ in rows:
        yield offset
        offset += len(texts[token_id])


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


def _by_text(entry: TokenEntry, texts: Texts) -> dict[str, float]:
    """Log-probs of the sampled token and the most likely ones; of tokens with one text, the first."""
    result: dict[str, float] = {}
    for token_id, logprob in {entry.token_id: entry.logprob, **entry.top}.items():
        result.setdefault(texts[token_id], max(logprob, LOWEST))
    return result


def chat_logprobs(entries: Sequence[TokenEntry], texts: Texts) -> Iterator[bytes]:
    """`ChatLogprobs`."""
    yield b'{"content":'
    yield from list_pieces(_chat_entry(entry, texts) for entry in entries)
    yield b"}"


def _chat_entry(entry: TokenEntry, texts: Texts) -> dict[str, Any]:
    likeliest = [_token(texts[token_id], logprob) for token_id, logprob in entry.top.items()]
    return {**_token(texts[entry.token_id], entry.logprob), "top_logprobs": likeliest}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode())}
