"""Log-probs of committed tokens in the shapes of OpenAI's two kinds of completions."""

from typing import Any

from rollout_server.engine.detokenize import Texts
from rollout_server.engine.listener import PromptScores
from rollout_server.http.openai.choice import TokenEntry

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not."""


def completion_logprobs(entries: list[TokenEntry], texts: Texts, offset: int) -> dict[str, Any]:
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


def with_prompt(
    prompt: list[int], scores: PromptScores, top: int, logprobs: dict[str, Any] | None, texts: Texts
) -> dict[str, Any]:
    """`CompletionLogprobs` of a prompt's tokens, of which `top` likeliest are told, and then `logprobs`."""
    result: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    offset = 0
    for token_id, known in zip(prompt, scores, strict=True):
        result["text_offset"].append(offset)
        result["tokens"].append(texts[token_id])
        offset += len(texts[token_id])
        if known is None:
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        logprob = known[token_id][0]
        likeliest = {token: value for token, (value, rank) in known.items() if rank <= top}
        result["token_logprobs"].append(max(logprob, LOWEST))
        result["top_logprobs"].append(_by_text(TokenEntry(token_id, logprob, likeliest), texts))
    for name, values in (logprobs or {}).items():
        result[name] += [value + offset for value in values] if name == "text_offset" else values
    return result


def prompt_scores(known: dict[int, tuple[float, int]] | None, texts: Texts) -> dict[str, Any] | None:
    """One entry of `PromptLogprobs`."""
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


def chat_logprobs(entries: list[TokenEntry], texts: Texts) -> dict[str, Any]:
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
