"""Answers as bytes: completions and chat completions, whole and as server-sent events, and rollouts as NDJSON."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from rollout_server.engine.detokenize import Texts
from rollout_server.http.openai.choice import Choice, Chunk
from rollout_server.http.openai.errors import ApiError
from rollout_server.http.openai.logprobs import chat_logprobs, completion_logprobs, prompt_scores, with_prompt

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


def dump_list(values: Iterable[Any]) -> bytes:
    """A long list, value by value, so that other threads have their turns."""
    return b"[" + b",".join(map(dump, values)) + b"]"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer holds. `echoes`: texts of the prompts, if answers begin with them; `logprobs`: null for none.

    `prompt_tokens`: of all prompts. `per_prompt`: choices of each. `usage`: whether a stream ends with it, and
    `continuous_usage` whether each chunk holds it. `prompt_logprobs`: the request names them, not only `echo`.
    """

    request_id: str
    created: int
    model: str
    prompt_tokens: int
    per_prompt: int = 1
    logprobs: int | None = None
    token_ids: bool = False
    segments: bool = True
    usage: bool = False
    continuous_usage: bool = False
    prompt_logprobs: bool = False
    echoes: tuple[str, ...] = ()


class OpenAIEncoder(ABC):
    """What completions and chat completions have in common."""

    media_type = SSE
    object = ""
    chunk_object = ""

    def __init__(self, form: AnswerForm, texts: Texts) -> None:
        self.form = form
        self.texts = texts
        self._head = {"id": form.request_id, "created": form.created, "model": form.model}
        head = {**self._head, "object": self.chunk_object, "choices": []}
        self.before = b"data: " + dump(head)[:-2]

    def chunk(self, choice: Choice, chunk: Chunk) -> bytes:
        fields: dict[str, Any] = {"index": choice.index, **self.new_text(choice, chunk)}
        fields["finish_reason"] = choice.finish_reason if chunk.final else None
        if chunk.final:
            fields["stop_reason"] = choice.stop_reason
        choice.told_tokens += len(chunk.token_ids) - chunk.retract_tokens
        if self.form.token_ids:
            fields["token_ids"] = chunk.token_ids
        if chunk.erased is not None:
            fields["erasure"] = {
                "event": "erase",
                "segment": chunk.erased.index,
                "attempt": chunk.erased.attempt,
                "retract_characters": chunk.retract,
            }
            if self.form.token_ids:
                fields["erasure"]["retract_tokens"] = chunk.retract_tokens
        elif chunk.final:
            fields["erasure"] = {"event": "finish", **self.report(choice)}
        return self.line(choice, fields)

    def line(self, choice: Choice, fields: dict[str, Any], **beside: Any) -> bytes:
        """A chunk with one choice's `fields`; `beside` are the chunk's own."""
        if self.form.usage:
            beside["usage"] = self._usage_so_far(choice) if self.form.continuous_usage else None
        after = b"," + dump(beside)[1:] if beside else b"}"
        return self.before + dump(fields) + b"]" + after + b"\n\n"

    @abstractmethod
    def new_text(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        """The part of a chunk that differs between the two kinds."""

    @abstractmethod
    def whole_text(self, choice: Choice) -> dict[str, Any]:
        """The part of a choice that differs between the two kinds."""

    def end(self, choices: list[Choice]) -> bytes:
        if not self.form.usage:
            return DONE
        tail = dump({"usage": self.usage(choices)})[1:]
        return self.before + b"]," + tail + b"\n\n" + DONE

    def error(self, error: ApiError) -> bytes:
        return b"data: " + dump(error.body()) + b"\n\n" + DONE

    def whole(self, choices: list[Choice]) -> bytes:
        answers = b",".join(map(self.whole_choice, choices))
        head = dump({**self._head, "object": self.object, "usage": self.usage(choices)})
        return head[:-1] + b',"choices":[' + answers + b"]}"

    def whole_choice(self, choice: Choice) -> bytes:
        """A choice of a whole answer."""
        answer = {"index": choice.index, **self.whole_text(choice), "finish_reason": choice.finish_reason}
        answer["stop_reason"] = choice.stop_reason
        if self.form.token_ids:
            answer["token_ids"] = choice.token_ids
        return dump({**answer, "erasure": self.report(choice)})

    def about_prompt(self, choice: Choice) -> bytes:
        """What is told of a choice's prompt: members of an object, each after a comma."""
        told = b""
        if self.form.token_ids:
            told += b',"prompt_token_ids":' + dump(choice.request.prompt_token_ids)
        if self.form.prompt_logprobs and choice.prompt_logprobs is not None:
            scores = (prompt_scores(known, self.texts) for known in choice.prompt_logprobs)
            told += b',"prompt_logprobs":' + dump_list(scores)
        return told

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """`Usage`."""
        completion = sum(len(choice.token_ids) for choice in choices)
        return self._usage(completion, sum(choice.erased_tokens for choice in choices))

    def _usage_so_far(self, choice: Choice) -> dict[str, Any]:
        return self._usage(choice.told_tokens, choice.erased_tokens)

    def _usage(self, completion: int, erased: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self.form.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.form.prompt_tokens + completion,
            "completion_tokens_details": {"erased_tokens": erased},
        }

    def report(self, choice: Choice) -> dict[str, Any]:
        """`ErasureReport`."""
        report: dict[str, Any] = {
            "policy_version": choice.policy_version,
            "generated_tokens": len(choice.token_ids) + choice.erased_tokens,
            "erased_tokens": choice.erased_tokens,
            "reused_prefix_tokens": choice.reused_prefix_tokens,
        }
        if self.form.segments:
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

    def chunk(self, choice: Choice, chunk: Chunk) -> bytes:
        if choice.introduced or not (self.form.echoes or self.form.token_ids):
            return super().chunk(choice, chunk)
        choice.introduced = True
        logprobs = None
        if self.form.echoes and self.form.logprobs is not None:
            logprobs = self._with_prompt(choice, None)
            choice.logprob_offset = self._echoed(choice)
        first = {"index": choice.index, "text": self._echo(choice), "logprobs": logprobs, "finish_reason": None}
        if self.form.token_ids:
            first |= {"prompt_token_ids": choice.request.prompt_token_ids, "token_ids": []}
        return self.line(choice, first) + super().chunk(choice, chunk)

    def new_text(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        logprobs = None
        if self.form.logprobs is not None and chunk.entries:
            logprobs = completion_logprobs(chunk.entries, self.texts, choice.logprob_offset)
            choice.logprob_offset += sum(map(len, logprobs["tokens"]))
        if chunk.erased is not None:
            kept = choice.token_ids[: chunk.erased.start]
            choice.logprob_offset = self._echoed(choice) + sum(len(self.texts[token_id]) for token_id in kept)
        return {"text": chunk.text, "logprobs": logprobs}

    def whole_text(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if self.form.logprobs is not None:
            logprobs = completion_logprobs(choice.entries, self.texts, 0)
            if self.form.echoes:
                logprobs = self._with_prompt(choice, logprobs)
        return {"text": self._echo(choice) + choice.text, "logprobs": logprobs}

    def whole_choice(self, choice: Choice) -> bytes:
        return super().whole_choice(choice)[:-1] + self.about_prompt(choice) + b"}"

    def _echo(self, choice: Choice) -> str:
        return self.form.echoes[choice.index // self.form.per_prompt] if self.form.echoes else ""

    def _echoed(self, choice: Choice) -> int:
        """Characters of the prompt's tokens, if log-probs begin with them."""
        if not self.form.echoes or self.form.logprobs is None:
            return 0
        return sum(len(self.texts[token_id]) for token_id in choice.request.prompt_token_ids)

    def _with_prompt(self, choice: Choice, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        prompt, top = choice.request.prompt_token_ids, self.form.logprobs or 0
        return with_prompt(prompt, choice.prompt_logprobs or [], top, logprobs, self.texts)


class ChatEncoder(OpenAIEncoder):
    """`POST /v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, form: AnswerForm, texts: Texts) -> None:
        super().__init__(form, texts)
        self._told_prompt = False

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
        return self.line(choice, first, **self._prompt_once(choice)) + super().chunk(choice, chunk)

    def _prompt_once(self, choice: Choice) -> dict[str, Any]:
        told, self._told_prompt = self._told_prompt, True
        return {"prompt_token_ids": choice.request.prompt_token_ids} if self.form.token_ids and not told else {}

    def new_text(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        logprobs = None
        if self.form.logprobs is not None and chunk.entries:
            logprobs = chat_logprobs(chunk.entries, self.texts)
        return {"delta": {"content": chunk.text}, "logprobs": logprobs}

    def whole_text(self, choice: Choice) -> dict[str, Any]:
        logprobs = None if self.form.logprobs is None else chat_logprobs(choice.entries, self.texts)
        return {"message": {"role": "assistant", "content": choice.text}, "logprobs": logprobs}

    def whole(self, choices: list[Choice]) -> bytes:
        return super().whole(choices)[:-1] + self.about_prompt(choices[0]) + b"}"


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
