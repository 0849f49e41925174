"""For tasks whose steps can be checked one by one: first wrong step, cascade, recovery. Source of the terms: ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.config.data import ChainReward
from common.config.run import RunConfig
from common.trajectory import Group, Trajectory
from learner.environments.tasks import chain


class Decoder(Protocol):
    """What is needed of a Hugging Face tokenizer to get attempts' texts."""

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]: ...


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


def count_steps(config: RunConfig, groups: Sequence[Group], decoder: Decoder) -> StepCounts | None:
    """The counts over all responses, or None for a task whose steps can't be checked.

    Chains are such a task; another one joins them here.
    """
    if not isinstance(config.reward, ChainReward):
        return None
    cascaded = slips = recovered = responses = 0
    for group in groups:
        problem = chain.parse_prompt(group.prompt.text)
        for trajectory in group.trajectories:
            responses += 1
            cascaded += chain.check(problem, trajectory.text).cascaded
            if trajectory.erasable:
                found = _slips(problem, trajectory, decoder)
                slips += len(found)
                recovered += sum(found)
    return StepCounts(responses, cascaded, slips, recovered)


def _slips(problem: chain.ChainProblem, trajectory: Trajectory, decoder: Decoder) -> list[bool]:
    """For each slip of one response, whether the committed line is right."""
    attempts = trajectory.attempts
    texts = decoder.batch_decode([a.token_ids for a in attempts], skip_special_tokens=True)
    final = chain.check(problem, trajectory.text).step_right
    found = []
    prefix = ""
    for attempt, text in zip(attempts, texts, strict=True):
        if attempt.attempt == 0:
            step = _first_wrong_line(problem, prefix + text)
            if step is not None:
                found.append(step < len(final) and final[step])
        if attempt.verdict == "accepted":
            prefix += text
            if _first_wrong_line(problem, prefix) is not None:
                break
    return found


def _first_wrong_line(problem: chain.ChainProblem, text: str) -> int | None:
    """Index of the first wrong line among the whole lines of an unfinished response."""
    whole = text[: text.rfind("\n") + 1]
    return chain.check(problem, whole).first_wrong_step
