"""Answers as bytes: completions and chat completions, whole and as server-sent events, and rollouts as NDJSON."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from common.trajectory import MEASURED
from rollout_server.engine.detokenize import Texts
from rollout_server.http.openai.choice import Choice, Chunk
from rollout_server.http.openai.entries import Joined, PromptRows, Rows
from rollout_server.http.openai.errors import ApiError
from rollout_server.http.openai.json_pieces import dump, list_pieces
from rollout_server.http.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from rollout_server.http.openai.segments import JudgedSegment

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
DONE = b"data: [DONE]\n\n"


Pieces = Iterator[bytes]
"""Of an answer, in order. Each is made in a moment, so that a long answer need not hold the event loop."""
NOTHING = b"null"


class Encoder(Protocol):
    """How one kind of request is answered."""

    media_type: str

    def chunk(self, choice: Choice, chunk: Chunk) -> Pieces:
        """What is new of a choice."""
        ...

    def end(self, choices: list[Choice]) -> bytes:
        """The end of a stream."""
        ...

    def error(self, error: ApiError) -> bytes:
        """An error in mid-stream, and the end."""
        ...

    def whole(self, choices: list[Choice]) -> Pieces:
        """The answer to a request that does not stream."""
        ...


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

    def chunk(self, choice: Choice, chunk: Chunk) -> Pieces:
        fields: dict[str, Any] = {"index": choice.index, **self.new_text(chunk)}
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
        members = [(b"logprobs", self.new_logprobs(choice, chunk))]
        if chunk.final and chunk.erased is None:
            members.append((b"erasure", self.report(choice, event="finish")))
        yield from self.line(choice, fields, *members)

    def line(
        self, choice: Choice, fields: dict[str, Any], *members: tuple[bytes, Iterable[bytes]], **beside: Any
    ) -> Pieces:
        """A chunk with one choice's `fields` and further `members`; `beside` are the chunk's own."""
        if self.form.usage:
            beside["usage"] = self._usage_so_far(choice) if self.form.continuous_usage else None
        yield self.before + dump(fields)[:-1]
        for name, pieces in members:
            yield b',"' + name + b'":'
            yield from pieces
        yield b"}]" + (b"," + dump(beside)[1:] if beside else b"}") + b"\n\n"

    @abstractmethod
    def new_text(self, chunk: Chunk) -> dict[str, Any]:
        """The text of a chunk."""

    @abstractmethod
    def new_logprobs(self, choice: Choice, chunk: Chunk) -> Iterable[bytes]:
        """The log-probs of a chunk."""

    @abstractmethod
    def whole_text(self, choice: Choice) -> dict[str, Any]:
        """The text of a choice."""

    @abstractmethod
    def whole_logprobs(self, choice: Choice) -> Iterable[bytes]:
        """The log-probs of a choice, if they are told."""

    def end(self, choices: list[Choice]) -> bytes:
        if not self.form.usage:
            return DONE
        tail = dump({"usage": self.usage(choices)})[1:]
        return self.before + b"]," + tail + b"\n\n" + DONE

    def error(self, error: ApiError) -> bytes:
        return b"data: " + dump(error.body()) + b"\n\n" + DONE

    def whole(self, choices: list[Choice]) -> Pieces:
        head = dump({**self._head, "object": self.object, "usage": self.usage(choices)})
        yield head[:-1] + b',"choices":['
        for number, choice in enumerate(choices):
            yield b"," if number else b""
            yield from self.whole_choice(choice)
        yield b"]"
        yield from self.about_answer(choices)
        yield b"}"

    def whole_choice(self, choice: Choice) -> Pieces:
        """A choice of a whole answer."""
        answer = {"index": choice.index, **self.whole_text(choice), "finish_reason": choice.finish_reason}
        answer["stop_reason"] = choice.stop_reason
        yield dump(answer)[:-1] + b',"logprobs":'
        yield from (NOTHING,) if self.form.logprobs is None else self.whole_logprobs(choice)
        if self.form.token_ids:
            yield b',"token_ids":'
            yield from list_pieces(choice.token_ids)
        yield b',"erasure":'
        yield from self.report(choice)
        yield from self.about_choice(choice)
        yield b"}"

    def about_choice(self, choice: Choice) -> Iterable[bytes]:
        """Further members of a whole answer's choice, each after a comma."""
        return ()

    def about_answer(self, choices: list[Choice]) -> Iterable[bytes]:
        """Further members of a whole answer, each after a comma."""
        return ()

    def about_prompt(self, choice: Choice) -> Pieces:
        """What is told of a choice's prompt: members of an object, each after a comma."""
        if self.form.token_ids:
            yield b',"prompt_token_ids":'
            yield from list_pieces(choice.request.prompt_token_ids)
        if self.form.prompt_logprobs and choice.prompt_logprobs is not None:
            yield b',"prompt_logprobs":'
            yield from prompt_logprobs(choice.prompt_logprobs, self.texts)

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

    def report(self, choice: Choice, **event: str) -> Pieces:
        """`ErasureReport`."""
        report = {
            **event,
            "policy_version": choice.policy_version,
            "generated_tokens": len(choice.token_ids) + choice.erased_tokens,
            "erased_tokens": choice.erased_tokens,
            "reused_prefix_tokens": choice.reused_prefix_tokens,
        }
        yield dump(report)[:-1]
        if self.form.segments:
            yield b',"segments":'
            yield from list_pieces(map(_segment, choice.segments))
        yield b"}"


def _segment(segment: JudgedSegment) -> dict[str, Any]:
    """`Segment`."""
    return {
        "index": segment.index,
        "attempt": segment.attempt,
        "start": segment.start,
        "end": segment.end,
        **{name: getattr(segment.judgement, name) for name in MEASURED},
        "verdict": "erased" if segment.erased else "accepted",
        "text": segment.text,
        "token_ids": segment.token_ids,
    }


class CompletionEncoder(OpenAIEncoder):
    """`POST /v1/completions`."""

    object = "text_completion"
    chunk_object = "text_completion"

    def chunk(self, choice: Choice, chunk: Chunk) -> Pieces:
        if not choice.introduced and (self.form.echoes or self.form.token_ids):
            choice.introduced = True
            first = {"index": choice.index, "text": self._echo(choice), "finish_reason": None}
            if self.form.token_ids:
                first |= {"prompt_token_ids": choice.request.prompt_token_ids, "token_ids": []}
            logprobs: Iterable[bytes] = (NOTHING,)
            if self.form.echoes and self.form.logprobs is not None:
                logprobs = completion_logprobs(self._prompt_rows(choice), self.texts, 0)
                choice.logprob_offset = self._echoed(choice)
            yield from self.line(choice, first, (b"logprobs", logprobs))
        yield from super().chunk(choice, chunk)

    def new_text(self, chunk: Chunk) -> dict[str, Any]:
        return {"text": chunk.text}

    def new_logprobs(self, choice: Choice, chunk: Chunk) -> Iterable[bytes]:
        offset = choice.logprob_offset
        if chunk.erased is not None:
            kept = choice.token_ids[: chunk.erased.start]
            choice.logprob_offset = self._echoed(choice) + sum(len(self.texts[token_id]) for token_id in kept)
        if self.form.logprobs is None or not chunk.entries:
            return (NOTHING,)
        if chunk.erased is None:
            choice.logprob_offset += sum(len(self.texts[token_id]) for token_id in chunk.entries.token_ids)
        return completion_logprobs(chunk.entries, self.texts, offset)

    def whole_text(self, choice: Choice) -> dict[str, Any]:
        return {"text": self._echo(choice) + choice.text}

    def whole_logprobs(self, choice: Choice) -> Iterable[bytes]:
        rows: Rows = choice.entries
        if self.form.echoes:
            rows = Joined(self._prompt_rows(choice), rows)
        return completion_logprobs(rows, self.texts, 0)

    def about_choice(self, choice: Choice) -> Iterable[bytes]:
        return self.about_prompt(choice)

    def _echo(self, choice: Choice) -> str:
        return self.form.echoes[choice.index // self.form.per_prompt] if self.form.echoes else ""

    def _echoed(self, choice: Choice) -> int:
        """Characters of the prompt's tokens, if log-probs begin with them."""
        if not self.form.echoes or self.form.logprobs is None:
            return 0
        return sum(len(self.texts[token_id]) for token_id in choice.request.prompt_token_ids)

    def _prompt_rows(self, choice: Choice) -> PromptRows:
        return PromptRows(choice.request.prompt_token_ids, choice.prompt_logprobs or [], self.form.logprobs or 0)


class ChatEncoder(OpenAIEncoder):
    """`POST /v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, form: AnswerForm, texts: Texts) -> None:
        super().__init__(form, texts)
        self._told_prompt = False

    def chunk(self, choice: Choice, chunk: Chunk) -> Pieces:
        if not choice.introduced:
            choice.introduced = True
            delta = {"role": "assistant", "content": ""}
            first = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield from self.line(choice, first, **self._prompt_once(choice))
        yield from super().chunk(choice, chunk)

    def _prompt_once(self, choice: Choice) -> dict[str, Any]:
        told, self._told_prompt = self._told_prompt, True
        return {"prompt_token_ids": choice.request.prompt_token_ids} if self.form.token_ids and not told else {}

    def new_text(self, chunk: Chunk) -> dict[str, Any]:
        return {"delta": {"content": chunk.text}}

    def new_logprobs(self, choice: Choice, chunk: Chunk) -> Iterable[bytes]:
        is_told = self.form.logprobs is not None and chunk.entries
        return chat_logprobs(chunk.entries, self.texts) if is_told else (NOTHING,)

    def whole_text(self, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text}}

    def whole_logprobs(self, choice: Choice) -> Iterable[bytes]:
        return chat_logprobs(choice.entries, self.texts)

    def about_answer(self, choices: list[Choice]) -> Iterable[bytes]:
        return self.about_prompt(choices[0])


class RolloutEncoder:
    """`POST /v1/rollouts`: a line with the trajectory of each response as it finishes."""

    media_type = NDJSON

    def chunk(self, choice: Choice, chunk: Chunk) -> Pieces:
        if not chunk.final or choice.trajectory is None:
            return
        trajectory = choice.trajectory.model_copy(update={"text": choice.text})
        yield trajectory.model_dump_json(exclude={"attempts"}, ensure_ascii=True).encode()[:-1] + b',"attempts":['
        for number, attempt in enumerate(trajectory.attempts):
            yield b"," if number else b""
            yield attempt.model_dump_json(ensure_ascii=True).encode()
        yield b"]}\n"

    def end(self, choices: list[Choice]) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        return dump(error.body()) + b"\n"

    def whole(self, choices: list[Choice]) -> Pieces:
        raise NotImplementedError("rollouts are always streamed")
