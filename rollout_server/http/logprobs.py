"""Log-probs of committed tokens in the shapes of OpenAI's two kinds of completions."""

from typing import Any

from rollout_server.http.choice import TokenEntry
from rollout_server.http.detokenize import TokenTexts

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not."""


def completion_logprobs(entries: list[TokenEntry], texts: TokenTexts, offset: int) -> dict[str, Any]:
    """`CompletionLogprobs` of tokens whose first one starts at `offset` of the text."""
    offsets, tokens = [], []
    for entry in entries:
        text = texts[entry.token_id]
        offsets.append(offset)
        tokens.append(text)
        offset += len(text)
    return {
        "text_offset": offsets,
        "token_logprobs": [max(entry.logprob, LOWEST) for entry in entries],
        "tokens": tokens,
        "top_logprobs": [_by_text(entry, texts) for entry in entries],
    }


def _by_text(entry: TokenEntry, texts: TokenTexts) -> dict[str, float]:
    """Log-probs of the sampled token and the most likely ones; of tokens with one text, the first."""
    result: dict[str, float] = {}
    for token_id, logprob in {entry.token_id: entry.logprob, **entry.top}.items():
        result.setdefault(texts[token_id], max(logprob, LOWEST))
    return result


def chat_logprobs(entries: list[TokenEntry], texts: TokenTexts) -> dict[str, Any]:
    """`ChatLogprobs`."""
    return {
        "content": [
            {
                **_token(texts[entry.token_id], entry.logprob),
                "top_logprobs": [_token(texts[token_id], logprob) for token_id, logprob in entry.top.items()],
            }
            for entry in entries
        ]
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode())}
