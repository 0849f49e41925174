"""What the log-prob check makes of gaps: noise, and causes of what is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config.run import ModelConfig
from common.packed import Group
from learner.check_logprobs import main
from learner.evaluation.logprob_check import (
    AFTER_ERASURE,
    COMMITTED,
    ERASED,
    NOISE_FACTOR,
    Comparison,
    Gaps,
    checked_config,
    compare,
    labelled_samples,
    limits,
    start_cause,
    sync_cause,
)
from learner.policy.model import load_policy
from learner.policy.probe import SampleLogprobs, measure
from tests.configs import run_config
from tests.models import tiny_llama, tiny_qwen3
from tests.trajectories import random_groups

QUIET = Gaps.of(np.zeros(3), np.full(3, 1e-6))
LOUD = Gaps.of(np.zeros(3), np.full(3, 0.1))
NOTHING = Gaps.of(np.zeros(0), np.zeros(0))


def comparison(**changes: object) -> Comparison:
    parts = {COMMITTED: QUIET, AFTER_ERASURE: QUIET, ERASED: QUIET}
    made = Comparison("test", QUIET, limits("float32", QUIET), parts, QUIET, QUIET, None)
    return replace(made, **changes)  # type: ignore[arg-type]


ALL_LOUD = {COMMITTED: LOUD, AFTER_ERASURE: LOUD, ERASED: LOUD}


def test_gaps_are_exact_quantiles_and_never_hide_what_is_no_number():
    generator = np.random.default_rng(0)
    gaps = np.abs(generator.normal(size=1000))
    found = Gaps.of(gaps, np.zeros(1000))
    ordered = np.sort(gaps)
    assert (found.p50, found.p99, found.p999, found.max) == (ordered[500], ordered[990], ordered[999], ordered[999])
    assert found.mean == pytest.approx(gaps.mean())
    for strange in (np.nan, np.inf):
        gaps[3] = strange
        assert Gaps.of(gaps, np.zeros(1000)).max == np.inf
        assert not Gaps.of(gaps, np.zeros(1000)).within(limits("bfloat16", QUIET))


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 5e-6), ("bfloat16", 2e-2)])
def test_noise_is_the_type_s_rounding_or_what_the_learner_has_itself(dtype: str, gap: float):
    small, large = (Gaps.of(np.zeros(100), np.full(100, value)) for value in (gap, 30.0 * gap))
    assert small.within(limits(dtype, Gaps.of(np.zeros(1), np.zeros(1))))
    assert not large.within(limits(dtype, Gaps.of(np.zeros(1), np.zeros(1))))
    assert large.within(limits(dtype, Gaps.of(np.zeros(1), np.full(1, 31.0 * gap / NOISE_FACTOR))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": ALL_LOUD, "raw": LOUD}, "compute the same weights differently"),
        ({"parts": ALL_LOUD}, "another distribution than it is asked to"),
        ({"parts": {COMMITTED: QUIET, AFTER_ERASURE: LOUD, ERASED: QUIET}, "raw": LOUD}, "erased attempt"),
    ],
)
def test_the_cause_of_a_gap_before_training_follows_from_where_it_is(changes: dict[str, object], words: str):
    wrong = comparison(**changes)
    assert not wrong.agrees
    assert words in start_cause(run_config(), wrong, wrong)
    assert "the engines loaded other weights than the learner" in start_cause(run_config(), wrong, comparison())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": ALL_LOUD, "raw": LOUD, "earlier_head": LOUD}, "whose checksum is right"),
        ({"parts": ALL_LOUD, "raw": LOUD}, "whose checksum is right"),
        ({"parts": ALL_LOUD, "raw": LOUD, "earlier_head": QUIET}, "the output head of the weights before"),
        ({"parts": ALL_LOUD, "earlier_head": LOUD}, "another distribution"),
    ],
)
def test_the_cause_of_a_gap_after_a_sync_follows_from_what_explains_it(changes: dict[str, object], words: str):
    assert words in sync_cause(comparison(**changes))


def test_a_part_without_tokens_does_not_count():
    assert comparison(parts={COMMITTED: QUIET, AFTER_ERASURE: NOTHING, ERASED: NOTHING}).agrees


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return random_groups(3, 3, 4)


def test_every_token_is_compared_once_and_known_by_its_part(groups: list[Group]):
    samples, labels = labelled_samples(groups)
    responses = [response for group in groups for response in group.trajectories]
    assert sum(sample.response_length for sample in samples) == sum(r.generated_tokens for r in responses)
    flat = np.concatenate(labels)
    assert (flat == ERASED).sum() == sum(r.erased_tokens for r in responses)
    committed = iter([labels[i] for i, sample in enumerate(samples) if labels[i][0] != ERASED])
    for response in responses:
        erased = response.attempts.starts[response.attempts.erased]
        before = int(erased.min()) if len(erased) else response.response_tokens
        own = next(committed)
        assert own.tolist() == [COMMITTED] * before + [AFTER_ERASURE] * (response.response_tokens - before)


@pytest.mark.parametrize("family", [tiny_qwen3, tiny_llama], ids=["tied", "untied"])
def test_log_probs_are_measured_as_transformers_gives_them_and_an_earlier_head_is_seen(
    family: object, groups: list[Group], tmp_path_factory: pytest.TempPathFactory
):
    path = family(tmp_path_factory.mktemp("model"))  # type: ignore[operator]
    model = load_policy(ModelConfig(path=str(path), max_length=256))
    samples, labels = labelled_samples(groups)
    head = 1.1 * model.get_output_embeddings().weight.detach()
    found = measure(model, samples, torch.device("cpu"), head, model)
    for sample, values in zip(samples, found, strict=True):
        tokens = torch.tensor(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            hidden = model.model(tokens[None]).last_hidden_state[0, sample.context_length - 1 : -1]
            logits = hidden @ model.get_output_embeddings().weight.T
        wanted = tokens[sample.context_length :, None]
        temperatures = torch.tensor(sample.temperatures)[:, None]
        for column, scaled in (
            ("learner_raw", logits),
            ("learner", logits / temperatures),
            ("earlier_head", 1.1 * logits / temperatures),
        ):
            expected = scaled.double().log_softmax(-1).gather(-1, wanted)[:, 0]
            np.testing.assert_allclose(getattr(values, column), expected.numpy(), atol=1e-5, err_msg=column)
        assert values.behaviour.tolist() == sample.behaviour_logprobs.tolist()
    # The recorded log-probs are random here.
    assert not compare("float32", "test", found, found, labels).agrees
    same = [replace(v, behaviour=v.learner, engine=v.learner_raw) for v in found]
    agreed = compare("float32", "test", same, same, labels)
    assert agreed.agrees
    assert agreed.whole.max == 0.0
    assert agreed.earlier_head is not None
    assert agreed.earlier_head.mean > 1e-3


def test_a_check_trains_at_its_own_rate_and_from_every_response():
    config = run_config(
        learner={
            "objective": {"kl_coefficient": 0.1},
            "overlong": {"mode": "mask"},
            "optimizer": {"learning_rate": 1e-6, "warmup_steps": 10},
        }
    )
    learner = checked_config(config, 0.5).learner
    assert (learner.optimizer.learning_rate, learner.optimizer.warmup_steps) == (0.5, 0)
    assert learner.overlong.mode == "none"
    assert learner.objective.kl_coefficient == 0.0


def test_a_bad_configuration_is_told_before_anything_starts(tmp_path: object, capsys: pytest.CaptureFixture[str]):
    assert main(["--config", f"{tmp_path}/none.yaml"]) == 2
    assert "none.yaml: No such file or directory" in capsys.readouterr().err


def test_samples_without_an_earlier_head_have_none():
    values = SampleLogprobs(*[np.zeros(2)] * 4, None)
    assert compare("float32", "test", [values], [values], [np.array([COMMITTED] * 2)]).earlier_head is None
