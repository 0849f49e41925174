"""For tasks whose steps can be checked one by one: first wrong step, cascade, recovery. Source of the terms: ours."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.config.data import ChainReward
from common.config.run import RunConfig
from common.packed import Group, PackedResponse
from learner.environments.tasks import chain


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Sums over responses.

    `cascaded`: responses with a wrong step after which every written step is wrong too.
    `slips`: steps whose first attempt was wrong although everything committed before it was right, in erasable
    responses. `recovered`: those of them whose committed line is right.
    """

    responses: int
    cascaded: int
    slips: int
    recovered: int

    @property
    def cascade_rate(self) -> float:
        """Share of all responses that were lost to a cascade."""
        return self.cascaded / self.responses if self.responses else 0.0

    @property
    def recovered_rate(self) -> float | None:
        """Share of the slips of erasable responses that erasure put right; None without slips."""
        return self.recovered / self.slips if self.slips else None


def checks_steps(config: RunConfig) -> bool:
    """Whether the task's steps can be checked. Chains are such a task; another one joins them here."""
    return isinstance(config.reward, ChainReward)


def count_steps(config: RunConfig, groups: Sequence[Group]) -> StepCounts | None:
    """The counts over all responses, or None for a task whose steps can't be checked.

    Raises ValueError for an erasable response whose attempts' texts were not asked for.
    """
    if not checks_steps(config):
        return None
    cascaded = slips = recovered = responses = 0
    for group in groups:
        problem = chain.parse_prompt(group.prompt.text)
        for response in group.trajectories:
            responses += 1
            cascaded += chain.check(problem, response.text).cascaded
            if response.erasable:
                found = _slips(problem, response)
                slips += len(found)
                recovered += sum(found)
    return StepCounts(responses, cascaded, slips, recovered)


def _slips(problem: chain.ChainProblem, response: PackedResponse) -> list[bool]:
    """For each slip of one response, whether the committed line is right."""
    if response.attempt_texts is None:
        raise ValueError(f"response {response.sample} to prompt {response.prompt_id!r} lacks its attempts' texts")
    final = chain.check(problem, response.text).step_right
    attempts = response.attempts
    found = []
    prefix = ""
    for number, erased, text in zip(
        attempts.numbers[:, 1].tolist(), attempts.erased.tolist(), response.attempt_texts, strict=True
    ):
        if number == 0:
            step = _first_wrong_line(problem, prefix + text)
            if step is not None:
                found.append(step < len(final) and final[step])
        if not erased:
            prefix += text
            if _first_wrong_line(problem, prefix) is not None:
                break
    return found


def _first_wrong_line(problem: chain.ChainProblem, text: str) -> int | None:
    """Index of the first wrong line among the whole lines of an unfinished response."""
    whole = text[: text.rfind("\n") + 1]
    return chain.check(problem, whole).first_wrong_step
