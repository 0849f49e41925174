"""Prompts as token ids: from texts, token ids or conversations."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from common.slices import Slices
from rollout_server.http.openai.errors import bad_request
from rollout_server.http.openai.schema.chat_request import Message, TemplateOptions
from rollout_server.http.openai.schema.sampling import SamplingRequest

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens of a prompt are kept: `keep` of them, the last ones unless `side` is right."""

    keep: int
    side: str | None

    @classmethod
    def of(cls, body: SamplingRequest, max_length: int, max_tokens: int) -> "Truncation | None":
        """What a request asks for, on a model with `max_length` where the response may need `max_tokens`."""
        keep = body.truncate_prompt_tokens
        if keep is None or keep == 0:
            if keep == 0:
                raise bad_request("truncate_prompt_tokens 0 leaves no prompt", "truncate_prompt_tokens")
            return None
        if keep > max_length:
            text = f"truncate_prompt_tokens ({keep}) exceeds the model's length of {max_length} tokens"
            raise bad_request(text, "truncate_prompt_tokens")
        # One more place: of the sentinel that erasure needs.
        return cls(max(max_length - max_tokens - 1, 1) if keep == -1 else keep, body.truncation_side)

    def apply(self, token_ids: list[int]) -> list[int]:
        return token_ids[: self.keep] if self.side == "right" else token_ids[-self.keep :]


async def completion_prompts(
    tokenizer: Any, prompt: Any, vocabulary: int, truncation: Truncation | None = None, special: bool = True
) -> list[list[int]]:
    """Token ids of each prompt of a completion request. `special`: texts get the tokenizer's special tokens.

    Raises:
        ApiError: 400 for a prompt without tokens, or with ids that the model does not have.
    """
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        prompt = await _all_tokenized(tokenizer, prompt, special=special)
    prompts = []
    slices = Slices()
    for number, token_ids in enumerate(prompt):
        where = "prompt" if len(prompt) == 1 else f"prompt[{number}]"
        check_token_ids(token_ids, vocabulary, where)
        prompts.append(token_ids if truncation is None else truncation.apply(token_ids))
        await slices.turn()
    return prompts


async def chat_prompt(
    tokenizer: Any, messages: list[Message], options: TemplateOptions, special: bool = False
) -> list[int]:
    """Token ids of a conversation as the model's chat template renders it.

    Raises:
        ApiError: 400 if the model has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise bad_request(
            "this model has no chat template: use /v1/completions, or serve a model with a chat template",
            "messages",
            "no_chat_template",
        )
    text = await asyncio.to_thread(_rendered, tokenizer, messages, options)
    token_ids = await tokenized(tokenizer, text, special=special)
    if not token_ids:
        raise bad_request("the conversation has no tokens", "messages")
    return token_ids


def _rendered(tokenizer: Any, messages: list[Message], options: TemplateOptions) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            tools=[tool.for_template() for tool in options.tools] if options.tools else None,
            documents=options.documents,
            tokenize=False,
            add_generation_prompt=options.begins_a_turn,
            continue_final_message=options.continue_final_message,
            **options.template_variables,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        # A template is a program, which fails in its own way over what it does not expect.
        reason = " ".join(str(error).split())[:500]
        raise bad_request(f"the model's chat template refuses these messages: {reason}", "messages") from error
    return text


def check_token_ids(token_ids: list[int], vocabulary: int, where: str) -> None:
    """400 unless there are token ids and all are the model's."""
    if not token_ids:
        raise bad_request(f"{where} has no tokens", where)
    check_in_vocabulary(token_ids, vocabulary, where)


def check_in_vocabulary(token_ids: list[int], vocabulary: int, where: str) -> None:
    """400 unless all token ids are the model's."""
    if token_ids and max(token_ids) >= vocabulary:
        raise bad_request(f"{where} holds token id {max(token_ids)}, but the model's are below {vocabulary}", where)


LONG_TEXT = 20_000
"""Characters from which on tokenizing is worth a thread, so that other requests go on: Python's lock is free then."""


async def tokenized(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text."""
    (token_ids,) = await _all_tokenized(tokenizer, [text], special=special)
    return token_ids


async def _all_tokenized(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text."""

    def tokenize() -> list[list[int]]:
        return [_token_ids(tokenizer, text, special) for text in texts]

    return await aside(tokenize, sum(map(len, texts)))


def _token_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    unused = {"return_attention_mask": False, "return_token_type_ids": False}
    token_ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False, **unused)["input_ids"]
    return token_ids


async def aside(work: Callable[[], Result], size: int) -> Result:
    """What `work` returns, from a thread if its input of `size` is long."""
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()
