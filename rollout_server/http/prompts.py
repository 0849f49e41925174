"""Prompts as token ids: from texts, token ids or conversations."""

import asyncio
from typing import Any

from jinja2.exceptions import TemplateError

from rollout_server.http.errors import bad_request
from rollout_server.http.schema.chat import Message

LONG_TEXT = 20_000
"""Characters from which on tokenizing is worth a thread, so that other requests go on."""


async def completion_prompts(tokenizer: Any, prompt: Any, vocabulary: int) -> list[list[int]]:
    """Token ids of each prompt of a completion request.

    Raises:
        ApiError: 400 for a prompt without tokens, or with ids that the model does not have.
    """
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    prompts = []
    for number, one in enumerate(prompt):
        token_ids = await _tokenized(tokenizer, one, special=True) if isinstance(one, str) else list(one)
        where = "prompt" if len(prompt) == 1 else f"prompt[{number}]"
        check_token_ids(token_ids, vocabulary, where)
        prompts.append(token_ids)
    return prompts


async def chat_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation, ready for the assistant's turn.

    Raises:
        ApiError: 400 if the model has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise bad_request(
            "this model has no chat template: use /v1/completions, or serve a model with a chat template",
            "messages",
            "no_chat_template",
        )
    conversation = [message.for_template() for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise bad_request(f"the model's chat template refuses these messages: {error}", "messages") from error
    token_ids = await _tokenized(tokenizer, text, special=False)
    if not token_ids:
        raise bad_request("the conversation has no tokens", "messages")
    return token_ids


def check_token_ids(token_ids: list[int], vocabulary: int, where: str) -> None:
    """400 unless there are token ids and all are the model's."""
    if not token_ids:
        raise bad_request(f"{where} has no tokens", where)
    if max(token_ids) >= vocabulary:
        raise bad_request(f"{where} holds token id {max(token_ids)}, but the model's are below {vocabulary}", where)


async def _tokenized(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    def tokenize() -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    return await asyncio.to_thread(tokenize) if len(text) > LONG_TEXT else tokenize()
