"""How a `ResponseRequest` becomes what vLLM, or the monitor, samples with."""

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from common.trajectory import NO_EXTRAS, ResponseRequest
from rollout_server.monitor.adjustments import Adjustments
from rollout_server.monitor.spec import PLAIN_ARG


def plain_params(
    request: ResponseRequest, eos_token_ids: tuple[int, ...], uid: int, *, listened: bool
) -> SamplingParams:
    """What plain vLLM samples with. `listened`: outputs are wanted as they come, with log-probs."""
    extras = request.extras
    structured = None
    if extras.json_schema is not None:
        structured = StructuredOutputsParams(json=extras.json_schema)
    return SamplingParams(
        **_common(request),
        temperature=request.temperature,
        logprobs=request.top_logprobs if listened else None,
        seed=request.seed,
        max_tokens=request.max_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=list(request.stop_ids(eos_token_ids)),
        min_tokens=extras.min_tokens,
        presence_penalty=extras.presence_penalty,
        frequency_penalty=extras.frequency_penalty,
        repetition_penalty=extras.repetition_penalty,
        logit_bias=extras.logit_bias or None,
        allowed_token_ids=None if extras.allowed_token_ids is None else list(extras.allowed_token_ids),
        bad_words=list(extras.bad_words),
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA if listened else RequestOutputKind.FINAL_ONLY,
        extra_args={PLAIN_ARG: uid},
    )


def score_params(top: int, uid: int) -> SamplingParams:
    """For the log-probs of a prompt: one token is sampled, to no use."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=top,
        # In flat lists: vLLM makes them in the event loop, and an object for each log-prob takes several times as long.
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={PLAIN_ARG: uid},
    )


def submission_params(
    request: ResponseRequest,
    sentinel_ids: tuple[int, int],
    *,
    temperature: float,
    seed: int | None,
    max_tokens: int,
    wants_tokens: bool,
    stream_interval: int | None,
    output_kind: RequestOutputKind,
    extra_args: dict[str, Any],
) -> SamplingParams:
    """What one submission of a monitored response is sampled with; all that is not here the monitor does."""
    return SamplingParams(
        **_common(request),
        temperature=temperature,
        logprobs=request.top_logprobs if wants_tokens else None,
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=True,
        stop_token_ids=list(sentinel_ids),
        output_kind=output_kind,
        stream_interval=stream_interval,
        extra_args=extra_args,
    )


def _common(request: ResponseRequest) -> dict[str, Any]:
    truncation = {"top_p": request.top_p, "top_k": request.top_k, "min_p": request.min_p}
    return {**truncation, "detokenize": False, "skip_clone": True}


def adjustments(request: ResponseRequest, eos_token_ids: tuple[int, ...], tokenizer: Any) -> Adjustments | None:
    """What the monitor applies to the logits of a response's submissions; None if there is nothing."""
    extras = request.extras
    if extras == NO_EXTRAS:
        return None
    bad_words: list[list[int]] = []
    if extras.bad_words:
        params = SamplingParams(bad_words=list(extras.bad_words))
        params.update_from_tokenizer(tokenizer)
        bad_words = params.bad_words_token_ids or []
    return Adjustments(
        min_tokens=extras.min_tokens,
        stops=(*eos_token_ids, *extras.stop_token_ids) if extras.min_tokens else (),
        presence_penalty=extras.presence_penalty,
        frequency_penalty=extras.frequency_penalty,
        repetition_penalty=extras.repetition_penalty,
        logit_bias=tuple(extras.logit_bias.items()),
        allowed_token_ids=extras.allowed_token_ids,
        bad_words=tuple(map(tuple, bad_words)),
    )
