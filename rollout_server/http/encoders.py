"""Answers as bytes: completions and chat completions, whole and as server-sent events, and rollouts as NDJSON."""

import json
from abc import ABC, abstractmethod
from typing import Any, Protocol

from rollout_server.http.choice import Choice, Chunk
from rollout_server.http.detokenize import TokenTexts
from rollout_server.http.errors import ApiError
from rollout_server.http.logprobs import chat_logprobs, completion_logprobs

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
DONE = b"data: [DONE]\n\n"


class Encoder(Protocol):
    """How one kind of request is answered."""

    media_type: str

    def chunk(self, choice: Choice, chunk: Chunk) -> bytes:
        """What is new of a choice."""
        ...

    def end(self, choices: list[Choice]) -> bytes:
        """The end of a stream."""
        ...

    def error(self, error: ApiError) -> bytes:
        """An error in mid-stream, and the end."""
        ...

    def whole(self, choices: list[Choice]) -> bytes:
        """The answer to a request that does not stream."""
        ...


def dump(value: Any) -> bytes:
    """Compact JSON; refuses what JSON has not. ASCII, because some clients end a line at U+2028 and its like."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class OpenAIEncoder(ABC):
    """What completions and chat completions have in common."""

    media_type = SSE
    object = ""
    chunk_object = ""

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        prompt_tokens: int,
        texts: TokenTexts,
        *,
        logprobs: bool,
        token_ids: bool,
        segments: bool,
        usage: bool,
    ) -> None:
        self._id = request_id
        self._created = created
        self._model = model
        self._prompt_tokens = prompt_tokens
        self.texts = texts
        self.logprobs = logprobs
        self._token_ids = token_ids
        self._segments = segments
        self._usage = usage
        head = {"id": request_id, "object": self.chunk_object, "created": created, "model": model, "choices": []}
        self._before = b"data: " + dump(head)[:-2]
        self._after = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def chunk(self, choice: Choice, chunk: Chunk) -> bytes:
        fields: dict[str, Any] = {"index": choice.index, **self.new_text(choice, chunk)}
        fields["finish_reason"] = choice.finish_reason if chunk.final else None
        if self._token_ids:
            fields["token_ids"] = chunk.token_ids
        if chunk.erased is not None:
            fields["erasure"] = {
                "event": "erase",
                "segment": chunk.erased.index,
                "attempt": chunk.erased.attempt,
                "retract_characters": chunk.retract,
            }
            if self._token_ids:
                fields["erasure"]["retract_tokens"] = chunk.retract_tokens
        elif chunk.final:
            fields["erasure"] = {"event": "finish", **self.report(choice)}
        return self._before + dump(fields) + self._after

    @abstractmethod
    def new_text(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        """The part of a chunk that differs between the two kinds."""

    @abstractmethod
    def whole_text(self, choice: Choice) -> dict[str, Any]:
        """The part of a choice that differs between the two kinds."""

    def end(self, choices: list[Choice]) -> bytes:
        if not self._usage:
            return DONE
        tail = dump({"usage": self.usage(choices)})[1:]
        return self._before + b"]," + tail + b"\n\n" + DONE

    def error(self, error: ApiError) -> bytes:
        return b"data: " + dump(error.body()) + b"\n\n" + DONE

    def whole(self, choices: list[Choice]) -> bytes:
        answers = []
        for choice in choices:
            answer = {"index": choice.index, **self.whole_text(choice), "finish_reason": choice.finish_reason}
            if self._token_ids:
                answer["token_ids"] = choice.token_ids
            answers.append({**answer, "erasure": self.report(choice)})
        return dump(
            {
                "id": self._id,
                "object": self.object,
                "created": self._created,
                "model": self._model,
                "choices": answers,
                "usage": self.usage(choices),
            }
        )

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """`Usage`."""
        completion = sum(len(choice.token_ids) for choice in choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "completion_tokens_details": {"erased_tokens": sum(choice.erased_tokens for choice in choices)},
        }

    def report(self, choice: Choice) -> dict[str, Any]:
        """`ErasureReport`."""
        report: dict[str, Any] = {
            "policy_version": choice.policy_version,
            "generated_tokens": len(choice.token_ids) + choice.erased_tokens,
            "erased_tokens": choice.erased_tokens,
            "reused_prefix_tokens": choice.reused_prefix_tokens,
        }
        if self._segments:
            report["segments"] = [
                {
                    "index": segment.index,
                    "attempt": segment.attempt,
                    "start": segment.start,
                    "end": segment.end,
                    "uncertainty": segment.uncertainty,
                    "base": segment.base,
                    "extreme": segment.extreme,
                    "gradient": segment.gradient,
                    "baseline": segment.baseline,
                    "penalty": segment.penalty,
                    "modulation": segment.modulation,
                    "threshold": segment.threshold,
                    "verdict": "erased" if segment.erased else "accepted",
                    "text": segment.text,
                    "token_ids": segment.token_ids,
                }
                for segment in choice.segments
            ]
        return report


class CompletionEncoder(OpenAIEncoder):
    """`POST /v1/completions`."""

    object = "text_completion"
    chunk_object = "text_completion"

    def new_text(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and chunk.entries:
            logprobs = completion_logprobs(chunk.entries, self.texts, choice.logprob_offset)
            choice.logprob_offset += sum(map(len, logprobs["tokens"]))
        if chunk.erased is not None:
            kept = choice.token_ids[: chunk.erased.start]
            choice.logprob_offset = sum(len(self.texts[token_id]) for token_id in kept)
        return {"text": chunk.text, "logprobs": logprobs}

    def whole_text(self, choice: Choice) -> dict[str, Any]:
        logprobs = completion_logprobs(choice.entries, self.texts, 0) if self.logprobs else None
        return {"text": choice.text, "logprobs": logprobs}


class ChatEncoder(OpenAIEncoder):
    """`POST /v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def chunk(self, choice: Choice, chunk: Chunk) -> bytes:
        if choice.introduced:
            return super().chunk(choice, chunk)
        choice.introduced = True
        first = {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._before + dump(first) + self._after + super().chunk(choice, chunk)

    def new_text(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        logprobs = chat_logprobs(chunk.entries, self.texts) if self.logprobs and chunk.entries else None
        return {"delta": {"content": chunk.text}, "logprobs": logprobs}

    def whole_text(self, choice: Choice) -> dict[str, Any]:
        logprobs = chat_logprobs(choice.entries, self.texts) if self.logprobs else None
        return {"message": {"role": "assistant", "content": choice.text}, "logprobs": logprobs}


class RolloutEncoder:
    """`POST /v1/rollouts`: a line with the trajectory of each response as it finishes."""

    media_type = NDJSON

    def chunk(self, choice: Choice, chunk: Chunk) -> bytes:
        if not chunk.final or choice.trajectory is None:
            return b""
        trajectory = choice.trajectory.model_copy(update={"text": choice.text})
        return trajectory.model_dump_json(ensure_ascii=True).encode() + b"\n"

    def end(self, choices: list[Choice]) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        return dump(error.body()) + b"\n"

    def whole(self, choices: list[Choice]) -> bytes:
        raise NotImplementedError("rollouts are always streamed")
