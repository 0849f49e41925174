"""Names of the metrics in `metrics.jsonl` and TensorBoard. Other tools read them: they are an interface.

`metrics.jsonl` has one object a training step, with each of these names; those in `OPTIONAL` only where a setting asks
for them. A mean over nothing is null. Rates and shares are from 0 to 1, log-probs and U in nats, times in seconds.
"""

STEP = "step"
POLICY_VERSION = "policy/version"

REWARD_MEAN = "reward/mean"
REWARD_PLAIN = "reward/plain"
REWARD_TREATED = "reward/treated"
REWARD_SPREAD = "reward/spread"
"""Standard deviation of a group's rewards, mean over groups."""
REWARD_TIMEOUTS = "reward/timeouts"
"""Rewards that were not ready in time, and are 0."""
REWARD_ERRORS = "reward/errors"
"""Rewards that raised or were no number, and are 0."""
REWARD_UNUSABLE_ANSWERS = "reward/unusable_answers"
"""Responses whose reference answer can't be compared with anything, and whose reward is 0."""

GENERATED_TOKENS = "rollout/generated_tokens"
"""Committed and erased tokens of the step."""
TOTAL_GENERATED_TOKENS = "rollout/generated_tokens_total"
"""The same since the run began, evaluations left out."""
ERASED_TOKENS = "rollout/erased_tokens"
ERASURES = "rollout/erasures"
ERASE_RATE = "rollout/erase_rate"
"""Erased attempts over all attempts of erasable responses."""
REUSED_PREFIX_TOKENS = "rollout/reused_prefix_tokens"
"""Tokens that the prefix cache gave back after an erasure."""
RESPONSE_TOKENS = "rollout/response_tokens_mean"
TRUNCATED_SHARE = "rollout/truncated_share"
"""Responses that were cut off at the token limit."""
REPEATED_SHARE = "rollout/repeated_share"
"""Sequences of 8 tokens that were in the response before, over all; mean over responses."""
ENTROPY = "policy/entropy"
"""Of the distribution that was sampled from, at its temperature: mean of minus the log-prob of all sampled tokens."""
WARNINGS = "warnings"
"""Thresholds of the setting `warnings` that the step is past."""
SIGNAL_SHARE = "rollout/signal_share"
"""Groups whose responses got different rewards, so that they have something to teach."""
TREATED_SHARE = "rollout/treated_share"
PLAIN_SUCCESS_RATE = "rollout/plain_success_ema"
"""Running success rate of plain responses, which decides whether the treated share applies."""
CASCADE_RATE = "rollout/cascade_rate"
RECOVERED_RATE = "rollout/recovered_rate"
UNCERTAINTY_MEAN = "rollout/uncertainty_mean"
THRESHOLD_MEAN = "rollout/threshold_mean"
TOKENS_PER_SECOND = "rollout/tokens_per_second"

LOSS = "learner/loss"
GRADIENT_NORM = "learner/gradient_norm"
"""Before clipping."""
LEARNING_RATE = "learner/learning_rate"
CLIP_SHARE = "learner/clip_share"
RATIO_MIN = "learner/ratio_min"
"""Smallest importance ratio of a token in the step, against `learner.old_logprobs`."""
RATIO_MAX = "learner/ratio_max"
KL = "learner/kl"
LOGPROB_GAP_MEAN = "learner/logprob_gap_mean"
"""|policy's - behaviour's log-prob| of a token before any update: how far the sampling policy is from the learner's.

Of the first minibatch; of all of them with `learner.old_logprobs: recomputed`. 0 at most by rounding where the engine
held the learner's weights.
"""
LOGPROB_GAP_P50 = "learner/logprob_gap_p50"
"""Of this share of the tokens the gap is at most so large: to 1/16 above, never below. So the next three."""
LOGPROB_GAP_P90 = "learner/logprob_gap_p90"
LOGPROB_GAP_P99 = "learner/logprob_gap_p99"
LOGPROB_GAP_P999 = "learner/logprob_gap_p99.9"
LOGPROB_GAP_MAX = "learner/logprob_gap_max"
BEHAVIOUR_KL = "learner/behaviour_kl"
"""KL(behaviour || policy at the step's start) of a token, estimated as `exp(d) - d - 1`, of the tokens of the gaps."""
IMPORTANCE_WEIGHT_MEAN = "learner/importance_weight_mean"
"""Of a token, or with kind `sequence` of a response, as it was applied."""
IMPORTANCE_OUTLIER_SHARE = "learner/importance_outlier_share"
"""Weights that were truncated or masked."""
IMPORTANCE_EFFECTIVE_SHARE = "learner/importance_effective_share"
"""Effective sample size over the number of samples: (sum of weights)^2 / (their number x sum of squares)."""
PADDING_SHARE = "learner/padding_share"
LEARNER_TOKENS = "learner/tokens"
"""Prompt and response tokens that the learner ran, padding left out."""
SKIPPED_SHARE = "learner/skipped_share"
"""Samples that the learner did not run, because their advantages are all 0 and so is their loss."""

SYNC_SECONDS = "sync/seconds"
SYNC_BYTES = "sync/bytes"
"""Of one copy of the weights."""

STEP_SECONDS = "time/step_seconds"
"""The sum of rollout, training, sync and other; evaluations are left out."""
ROLLOUT_SECONDS = "time/rollout_seconds"
TRAIN_SECONDS = "time/train_seconds"
OTHER_SECONDS = "time/other_seconds"
CHECKPOINT_WAIT_SECONDS = "time/checkpoint_wait_seconds"
"""Of the other time, what training waited for the last step's checkpoint, and for the rollout side's statistics."""

ALL = frozenset(value for name, value in list(globals().items()) if name.isupper())
"""Every name of `metrics.jsonl`."""

OPTIONAL = frozenset({KL, IMPORTANCE_WEIGHT_MEAN, IMPORTANCE_OUTLIER_SHARE, IMPORTANCE_EFFECTIVE_SHARE})
"""`learner/kl`: with `kl_coefficient` above 0. The others: with `learner.importance_sampling`."""


def evaluation_name(mode: str, figure: str) -> str:
    """TensorBoard's name of an evaluation's figure, such as `evaluation/plain_avg_at_k`."""
    return f"evaluation/{mode}_{figure}"
