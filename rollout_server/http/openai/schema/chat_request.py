"""The request of `POST /v1/chat/completions`: messages, tools, and how the chat template renders them."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rollout_server.http.openai.schema.base import MAX_TOKENS, RequestModel, at_most
from rollout_server.http.openai.schema.neutral import Neutral
from rollout_server.http.openai.schema.sampling import (
    MAX_TOP_LOGPROBS,
    NO_MEDIA,
    NO_STORE,
    EmptyList,
    EmptyObject,
    Name,
    SamplingRequest,
)

EXAMPLE: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "7+5="}],
    "max_completion_tokens": 32,
    "temperature": 0.7,
    "erasure": {"threshold": 1.5, "max_erasures": 2, "segmentation": {"mode": "delimiter", "delimiter": "\n"}},
}
TEMPLATE_PARAMETERS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Names that `chat_template_kwargs` may not have: they steer how the template is used, or have parameters here."""
ToolName = Annotated[str, Field(min_length=1, max_length=256)]
FORCED = (
    "a tool call cannot be forced, and calls are not taken out of the text: give none or auto, and read the call from "
    "the message's content"
)


class TextPart(RequestModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(RequestModel):
    """`arguments`: JSON of an object."""

    name: ToolName
    arguments: str = ""


class ToolCall(RequestModel):
    """A call that the assistant made."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=1024)] | None = None


class Message(RequestModel):
    """One message of the conversation, for the model's chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)] | None = Field(
        default=None, description="null only of an assistant, which called tools."
    )
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    reasoning: str | None = Field(default=None, description="The assistant's, where the template shows it.")
    reasoning_content: str | None = Field(default=None, description="The older name of reasoning.")
    refusal: Annotated[Literal[""] | None, Neutral("the template knows no refusals: put the text into content")] = None
    audio: Annotated[EmptyObject | None, Neutral(NO_MEDIA)] = None
    function_call: Annotated[EmptyObject | None, Neutral("the older form of tool_calls")] = None
    annotations: Annotated[EmptyList | None, Neutral("the template knows no annotations")] = None

    @model_validator(mode="after")
    def _fields_belong_to_the_role(self) -> "Message":
        for name, role in (("tool_calls", "assistant"), ("reasoning", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise ValueError(f"{name} can only be given in messages with role {role}")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is required in messages with role {self.role}")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it, and as vLLM gives it to them: texts joined, a call's arguments as an object."""
        parts = [] if self.content is None else self.content
        content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        message: dict[str, Any] = {"role": self.role, "content": content}
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        reasoning = self.reasoning if self.reasoning is not None else self.reasoning_content
        if reasoning is not None:
            message["reasoning"] = message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [_call(call) for call in self.tool_calls]
        return message


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        # What a model once said: the conversation must be able to go on.
        arguments = {}
    function = {"name": call.function.name, "arguments": arguments}
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": function}


class Function(RequestModel):
    """A function that the model may call; `parameters`: a JSON schema."""

    name: ToolName
    description: Annotated[str, Field(max_length=65_536)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A tool, for the model's chat template."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it, and as vLLM gives it to them."""
        function = self.function
        described: dict[str, Any] = {
            "name": function.name,
            "description": function.description,
            "parameters": function.parameters,
        }
        if function.strict is not None:
            described["strict"] = function.strict
        return {"type": "function", "function": described}


class TemplateOptions(RequestModel):
    """What a chat template renders beside messages."""

    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = Field(
        default=None, description="Rendered by the chat template."
    )
    add_generation_prompt: bool | None = Field(default=None, description="null: unless continue_final_message.")
    continue_final_message: bool = Field(default=False, description="The model goes on with the last message.")
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = Field(
        default=None, description="Variables of the chat template."
    )
    documents: (
        Annotated[
            list[Annotated[dict[str, str], Field(max_length=64), at_most(64)]], Field(max_length=256, fail_fast=True)
        ]
        | None
    ) = Field(default=None, description="For templates that show documents.")
    chat_template: Annotated[
        Literal[""] | None, Neutral("a template is a program: the server runs only its model's own")
    ] = None
    media_io_kwargs: Annotated[EmptyObject | None, Neutral(NO_MEDIA)] = None
    mm_processor_kwargs: Annotated[EmptyObject | None, Neutral(NO_MEDIA)] = None

    @model_validator(mode="after")
    def _template_can_be_used(self) -> "TemplateOptions":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        for name in self.chat_template_kwargs or ():
            if name in TEMPLATE_PARAMETERS or not name.isidentifier():
                raise ValueError(f"chat_template_kwargs cannot hold {name[:64]!r}")
        return self

    @property
    def begins_a_turn(self) -> bool:
        given = self.add_generation_prompt
        return not self.continue_final_message if given is None else given

    @property
    def template_variables(self) -> dict[str, Any]:
        return dict(self.chat_template_kwargs or {})


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatRequest(SamplingRequest, TemplateOptions):
    """As OpenAI's, with the `erasure` object."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    messages: Messages
    max_completion_tokens: int | None = Field(
        default=None, ge=0, le=MAX_TOKENS, description="The newer name of max_tokens; give one of the two."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Needs logprobs: true.")
    tool_choice: Annotated[Literal["none", "auto"] | None, Neutral(FORCED)] = None
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted; calls are not taken out of the text.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="A variable of the chat template; enable_thinking is true unless it is none."
    )
    metadata: Annotated[dict[str, Name], Field(max_length=16), at_most(16)] | None = Field(
        default=None, description=f"Accepted without effect: {NO_STORE}."
    )
    safety_identifier: Name | None = Field(default=None, description="Accepted without effect.")
    prompt_cache_key: Name | None = Field(default=None, description="Accepted; every prefix is cached.")
    prompt_cache_retention: Annotated[
        Literal["in_memory", "in-memory"] | None, Neutral("prefixes are kept in memory only")
    ] = None
    prompt_cache_options: Annotated[
        EmptyObject | None, Neutral("every prefix is cached; use cache_salt to share none")
    ] = None
    store: Annotated[Literal[False] | None, Neutral(NO_STORE)] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Neutral("there is one service for all")] = None
    modalities: Annotated[Annotated[list[Literal["text"]], Field(max_length=1)] | None, Neutral(NO_MEDIA)] = None
    audio: Annotated[EmptyObject | None, Neutral(NO_MEDIA)] = None
    prediction: Annotated[EmptyObject | None, Neutral("nothing is predicted beforehand")] = None
    moderation: Annotated[EmptyObject | None, Neutral("there is no moderation")] = None
    verbosity: Annotated[
        Literal["medium"] | None, Neutral("the model has no such setting: ask for it in a message")
    ] = None
    web_search_options: Annotated[EmptyObject | None, Neutral("this server searches nothing")] = None
    functions: Annotated[EmptyList | None, Neutral("the older form of tools")] = None
    function_call: Annotated[Literal["none", "auto"] | None, Neutral("the older form of tool_choice")] = None
    echo: Annotated[
        Literal[False] | None, Neutral("use continue_final_message, and put the message before the answer")
    ] = None
    include_reasoning: Annotated[Literal[True] | None, Neutral("reasoning is not told from other text")] = None
    return_prompt_text: Annotated[Literal[False] | None, Neutral("use return_token_ids and /detokenize")] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs can only be given when logprobs is true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.length == 0 and self.prompt_logprobs is None:
            raise ValueError(f"{self.length_name} 0 scores a prompt: give prompt_logprobs with it")
        return self

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def length_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def template_variables(self) -> dict[str, Any]:
        variables = super().template_variables
        if self.reasoning_effort is not None:
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
            variables["reasoning_effort"] = self.reasoning_effort
        return variables
