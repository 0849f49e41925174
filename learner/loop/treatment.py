"""Which responses of a group are treated, and the requests that follow from it (`algorithm.md`, section 6)."""

from collections.abc import Sequence

from common.config.data import ErasureTreatment, GroupShare, ShareAdaptive, TemperatureTreatment
from common.config.run import RunConfig
from common.packed import Group
from common.seeds import derive_seed
from common.trajectory import ResponseRequest
from learner.environments.step_checks import checks_steps
from learner.loop.ledger import Draw


class TreatedShare:
    """Whether the configured share applies to the next step. Source: ours.

    `success_rate` is the running success rate of plain responses, 0 before the first step; it is part of a checkpoint.
    """

    def __init__(self, share: GroupShare, success_rate: float = 0.0) -> None:
        self._share = share
        self.success_rate = success_rate

    @property
    def applies(self) -> bool:
        """True while the share applies: always if fixed, else while plain responses rarely succeed."""
        if isinstance(self._share, ShareAdaptive):
            return self.success_rate < self._share.success_threshold
        return True

    def update(self, plain_successes: int, plain_responses: int) -> None:
        """Take in a step's plain responses. Without any (all responses treated) the rate stays as it is."""
        if plain_responses == 0:
            return
        decay = self._share.decay if isinstance(self._share, ShareAdaptive) else ShareAdaptive().decay
        self.success_rate = decay * self.success_rate + (1.0 - decay) * plain_successes / plain_responses


def training_requests(config: RunConfig, draw: Draw, share_applies: bool) -> list[ResponseRequest]:
    """The requests of one turn's group: plain members first, then the treated ones.

    Plain members carry the policy without being erasable. They are generated token for token as by plain vLLM, and
    the monitor records what the learner needs: behaviour log-probs, and segments with their U, which feed the
    group's statistics.
    """
    rollout, prompt = config.rollout, draw.prompt
    first_treated = first_treated_sample(config, share_applies)
    treatment = rollout.treatment
    requests = []
    for sample in range(rollout.responses_per_group):
        is_treated = sample >= first_treated
        temperature = rollout.temperature
        if is_treated and isinstance(treatment, TemperatureTreatment):
            temperature = treatment.temperature
        requests.append(
            ResponseRequest(
                prompt_id=prompt.id,
                group_id=draw.group_id,
                group_size=rollout.responses_per_group,
                sample=sample,
                seed=derive_seed(config.seed, *draw.seed_place, sample),
                prompt_token_ids=prompt.token_ids,
                max_tokens=rollout.max_response_tokens,
                temperature=temperature,
                stop=rollout.stop,
                policy=rollout.erasure,
                attempt_texts=checks_steps(config),
                erasable=is_treated and isinstance(treatment, ErasureTreatment),
            )
        )
    return requests


def first_treated_sample(config: RunConfig, share_applies: bool) -> int:
    """Samples of a group from this index on are treated."""
    return config.rollout.responses_per_group - (config.treated_per_group if share_applies else 0)


def plain_outcome(groups: Sequence[Group], first_treated: Sequence[int], success_threshold: float) -> tuple[int, int]:
    """(successes, responses) of the plain members; `first_treated` is of each group."""
    pairs = zip(groups, first_treated, strict=True)
    rewards = [t.reward for group, first in pairs for t in group.trajectories if t.sample < first]
    return sum(is_success(reward, success_threshold) for reward in rewards), len(rewards)


def is_success(reward: float | None, success_threshold: float) -> bool:
    """Whether a reward counts as a right response."""
    return (reward or 0.0) >= success_threshold
