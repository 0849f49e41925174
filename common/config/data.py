"""Where prompts come from and how responses are rewarded."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from common.config.base import StrictModel, Temperature


class ChainData(StrictModel):
    """The demo's task: chains of single-digit operations modulo 10, made by code from a seed."""

    source: Literal["chain"] = "chain"
    length: int = Field(default=24, ge=1, le=26, description="Operations in a chain.")
    train_problems: int = Field(default=4096, ge=1)
    test_problems: int = Field(default=256, ge=1)


class ColumnMapping(StrictModel):
    """Which columns of a data set hold what; dots lead into columns that hold objects: `reward_model.ground_truth`.

    `id` null: the row's number.
    """

    prompt: str = "question"
    answer: str = "answer"
    id: str | None = None


_TEMPLATE_ARGUMENTS = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip
"""Arguments of `apply_chat_template` that are no variables of a template, or that change what a prompt is."""


class _Prompts(StrictModel):
    """How a problem becomes a prompt.

    `system_prompt`: a message of its own before a prompt that is text; a prompt that is a list of messages has its own.
    `chat_template_kwargs`: what the chat template gets besides the messages, such as `enable_thinking`, in training and
    in evaluation.
    """

    chat: bool = Field(default=True, description="Apply the tokenizer's chat template to the prompt.")
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _system_prompt_has_a_template(self) -> Self:
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt needs chat: true; without the chat template it would be left out")
        return self

    @model_validator(mode="after")
    def _template_has_its_own_options(self) -> Self:
        if self.chat_template_kwargs and not self.chat:
            raise ValueError("chat_template_kwargs need chat: true; without the chat template they would be left out")
        if taken := _TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs can't set {', '.join(sorted(taken))}: training needs its own")
        return self


class _Rows(_Prompts):
    """What data sets of rows have in common.

    `on_bad_row`: a row that can't be used ends the run before it begins, or is left out and counted.
    """

    columns: ColumnMapping = ColumnMapping()
    on_bad_row: Literal["fail", "skip"] = "fail"


class FileData(_Rows):
    """Local JSONL or Parquet files; the ending of the name decides."""

    source: Literal["file"] = "file"
    train_path: str
    test_path: str


class HuggingFaceData(_Rows):
    """A data set of the Hugging Face hub, by name. `test_split` null holds out `test_problems` of the train split."""

    source: Literal["huggingface"] = "huggingface"
    name: str
    subset: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    test_problems: int = Field(default=500, ge=1)
    max_train_problems: int | None = Field(default=None, ge=1)


class ReasoningGymData(_Prompts):
    """Problems of a task of the package `reasoning-gym`, made from a seed. `config`: options of the task itself.

    `size` and `test_size`: distinct training and held-out problems; no problem is in both. `seed` null: the run's.
    """

    source: Literal["reasoning_gym"] = "reasoning_gym"
    name: str = Field(min_length=1)
    config: dict[str, Any] = Field(default_factory=dict)
    size: int = Field(default=4096, ge=1, le=10_000_000)
    test_size: int = Field(default=256, ge=1, le=1_000_000)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    generate_seconds: float = Field(default=600.0, gt=0.0, description="Deadline for making the problems.")

    @model_validator(mode="after")
    def _problems_are_drawn_here(self) -> Self:
        if taken := {"seed", "size"} & self.config.keys():
            raise ValueError(f"config can't set {', '.join(sorted(taken))}: data.seed and data.size do")
        return self


def kind_as_source(given: Any) -> Any:
    """Settings of a data set whose `source` may be called `kind`, as rewards have it. Raises ValueError for both."""
    if not isinstance(given, dict) or "kind" not in given:
        return given
    if given.get("source", given["kind"]) != given["kind"]:
        raise ValueError(f"source ({given['source']}) and kind ({given['kind']}) are the same setting: give one")
    return {"source": given["kind"]} | {name: value for name, value in given.items() if name != "kind"}


Data = Annotated[
    Annotated[ChainData | FileData | HuggingFaceData | ReasoningGymData, Field(discriminator="source")],
    BeforeValidator(kind_as_source),
]


class ChainReward(StrictModel):
    """1 if every written step of the chain is right, else 0."""

    kind: Literal["chain"] = "chain"


class _WorkerReward(StrictModel):
    """Rewards that are computed in worker processes, each of which is killed when a call's time is up.

    A reward that raises, is no finite number or ends its process has failed. `on_error`: `zero` gives its response 0,
    counts it, and ends the run once more than `max_error_share` of a step's (or an evaluation's) rewards failed, a part
    of one counted as one; `fail` ends the run at the first. `workers` null: one a core, 8 at most. `start_seconds`:
    the deadline for a worker to load the reward.
    """

    timeout_seconds: float = Field(gt=0.0, le=3600.0)
    workers: int | None = Field(default=None, ge=1, le=1024)
    on_error: Literal["zero", "fail"] = "zero"
    max_error_share: float = Field(default=0.1, ge=0.0, le=1.0)
    start_seconds: float = Field(default=120.0, gt=0.0, le=3600.0)


class MathReward(_WorkerReward):
    """1 if the response's final answer (its last box) equals the reference, by `math-verify`, else 0."""

    kind: Literal["math"] = "math"
    timeout_seconds: float = Field(default=5.0, gt=0.0, le=600.0)


class FunctionReward(_WorkerReward):
    """A user's `module:function`, called as `function(prompt, response, answer)`; more by name (`docs`)."""

    kind: Literal["function"] = "function"
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    timeout_seconds: float = Field(default=30.0, gt=0.0, le=3600.0)


class ReasoningGymReward(_WorkerReward):
    """What the task's own scorer gives an answer, from 0 to 1. For data of `reasoning_gym`, where it is the default.

    `answer_tag`: the answer is what the response's last element of this name holds, `<answer>7</answer>`; the whole
    response where there is none, and always with null.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    answer_tag: str | None = Field(default="answer", pattern=r"^[A-Za-z_][\w-]*$")
    timeout_seconds: float = Field(default=10.0, gt=0.0, le=3600.0)


Reward = Annotated[ChainReward | MathReward | FunctionReward | ReasoningGymReward, Field(discriminator="kind")]


class ShareFixed(StrictModel):
    """The same share of every group is treated."""

    mode: Literal["fixed"] = "fixed"
    share: float = Field(ge=0.0, le=1.0)


class ShareAdaptive(StrictModel):
    """The share applies while plain responses rarely succeed, else 0; it can switch back. Source: ours.

    The success rate is a running mean over steps, `decay` old and `1 - decay` new.
    """

    mode: Literal["adaptive"] = "adaptive"
    share: float = Field(default=0.5, gt=0.0, lt=1.0)
    success_threshold: float = Field(default=0.10, ge=0.0, le=1.0)
    decay: float = Field(default=0.7, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _threshold_can_be_crossed(self) -> "ShareAdaptive":
        if self.success_threshold == 0.0:
            raise ValueError("success_threshold 0 never applies the share; use mode 'fixed' with share 0")
        return self


GroupShare = Annotated[ShareFixed | ShareAdaptive, Field(discriminator="mode")]


class ErasureTreatment(StrictModel):
    """The treated share of a group is generated with erasure."""

    kind: Literal["erasure"] = "erasure"


class TemperatureTreatment(StrictModel):
    """The control: the treated share is sampled at another temperature, and nothing is erased."""

    kind: Literal["temperature"] = "temperature"
    temperature: Temperature = Field(default=0.5, gt=0.0)


Treatment = Annotated[ErasureTreatment | TemperatureTreatment, Field(discriminator="kind")]
