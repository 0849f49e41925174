"""How many tokens a request took."""

from rollout_server.http.openai.schema.base import AnswerModel


class CompletionTokensDetails(AnswerModel):
    """Tokens that were generated and are not in the answer."""

    erased_tokens: int


class Usage(AnswerModel):
    """`completion_tokens`: committed ones, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails
