"""Problems and scores of `reasoning-gym`, against the package itself."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
import yaml

from common.config import ConfigError, RunConfig, dump_yaml, load_config
from common.config.data import ReasoningGymData, ReasoningGymReward
from learner.environments.data import read_rows, rows_digest, tokenise
from learner.environments.procedural import Entry, Task, draw, make_dataset
from learner.environments.rewards import RewardItem, Score, make_rewards, row_check
from learner.environments.rewards.own_scorer import given_answer, load_scorer
from learner.run.errors import InputError
from learner.train import main
from tests.configs import run_config
from tests.models import byte_tokenizer, tiny_qwen3

NAMES = ["chain_sum", "leg_counting", "spell_backward", "word_sorting", "simple_equations", "countdown", "n_queens"]


def config(name: str = "chain_sum", **data: Any) -> RunConfig:
    return run_config(data={"kind": "reasoning_gym", "name": name, "size": 12, "test_size": 5} | data)


def entries(run: RunConfig) -> list[Entry]:
    """The training problems, made in this process."""
    assert isinstance(run.data, ReasoningGymData)
    return draw(Task.of(run.data, run.seed))[0]


def item(entry: Entry, response: str) -> RewardItem:
    return RewardItem("p", entry["question"], response, str(entry["answer"]), row=entry)


def score(run: RunConfig, items: list[RewardItem], **settings: Any) -> list[Score]:
    """From worker processes, as in a run."""

    async def work() -> list[Score]:
        reward = run.reward.model_copy(update={"workers": 1} | settings)
        rewards = make_rewards(reward, ("question", "answer", "metadata"), run.data)
        try:
            reading = await rewards.start()
            assert reading.columns == {"question", "answer", "metadata"}
            return await asyncio.gather(*(rewards.score(one) for one in items))
        finally:
            await rewards.close()

    return asyncio.run(work())


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_task_s_own_scorer(name: str):
    run = config(name)
    problems = entries(run)
    dataset = reasoning_gym.create_dataset(name, seed=0, size=1)
    scorer = load_scorer(run.data, ReasoningGymReward()).function
    seen = set()
    for entry, other in zip(problems, problems[1:] + problems[:1], strict=True):
        for answer in (entry["answer"], other["answer"], f"{entry['answer']}, or not", "no idea", "", "7"):
            text = "" if answer is None else str(answer)
            expected = float(dataset.score_answer(text.strip(), entry))
            assert scorer(item(entry, text)) == expected
            assert scorer(item(entry, f"Let me <answer>see</answer>.\n<answer> {text}\n</answer>.")) == expected
            seen.add(expected)
    assert 1.0 in seen
    assert len(seen) > 1


def test_workers_score_as_the_package_does():
    run = config("chain_sum", config={"max_terms": 3})
    rows = read_rows(run, "test")
    given = [(row, f"so <answer>{row.answer}</answer>") for row in rows] + [(rows[0], "hm")]
    found = score(run, [RewardItem(r.id, r.text, text, r.answer, row=r.columns) for r, text in given])
    assert [one.value for one in found] == [1.0] * len(rows) + [
        reasoning_gym.create_dataset("chain_sum").score_answer("hm", rows[0].columns)
    ]
    assert {one.failure for one in found} == {None}


def test_a_scorer_that_hangs_is_killed_and_one_that_fails_gives_nothing():
    run = config("simple_integration", size=1, test_size=1)
    (entry,) = entries(run)
    started = time.monotonic()
    # Its scorer works the answer out, which takes longer than anyone has.
    found = score(run, [item(entry, "9**9**9**9"), item(entry, entry["answer"])], timeout_seconds=3.0)
    assert [(one.value, one.failure) for one in found] == [(0.0, "timeout"), (1.0, None)]
    assert time.monotonic() - started < 60.0
    factors = config("prime_factorization", size=1, test_size=1)
    (entry,) = entries(factors)
    with pytest.raises(ValueError, match="invalid literal"):
        make_dataset("prime_factorization", {}, 0, 1).score_answer("two", entry)
    assert load_scorer(factors.data, ReasoningGymReward()).function(item(entry, "two")) == 0.0


def test_problems_are_distinct_held_out_and_the_same_in_every_process():
    """`word_ladder` depends on the order of sets."""
    run = config("word_ladder")
    train, test = read_rows(run, "train"), read_rows(run, "test")
    assert (len(train), len(test)) == (12, 5)
    questions = [row.text for row in train + test]
    assert len(set(questions)) == len(questions)
    assert len({row.id for row in train + test}) == len(questions)
    code = (
        "import sys, yaml; from common.config import RunConfig; from learner.environments.data import read_rows, "
        "rows_digest; print(rows_digest(read_rows(RunConfig.model_validate(yaml.safe_load(sys.stdin)), 'train')))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=dump_yaml(run),
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert other.stdout.strip() == rows_digest(train)
    assert entries(config(seed=3)) == entries(config(seed=3)) != entries(config(seed=4))


def test_few_problems_are_split_without_a_common_one_and_too_few_are_told():
    """Sums of two of the ten digits: 100 problems at most."""
    digits = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    small = config("chain_sum", config=digits, size=60, test_size=20)
    train, test, _ = draw(Task.of(small.data, 0))
    assert (len(train), len(test)) == (60, 20)
    assert not {entry["question"] for entry in train} & {entry["question"] for entry in test}
    many = config("chain_sum", config=digits, size=5000, test_size=20)
    with pytest.raises(
        InputError, match=r"data: 'chain_sum' has only \d+ distinct train problems in 100,000 tries, dat"
    ):
        read_rows(many, "train")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "chain_sums"}, r"data\.name: reasoning-gym has no task 'chain_sums' among its \d+; there is 'chain_"),
        (
            {"config": {"min_termz": 2}},
            r"'chain_sum' has no option min_termz; it has allow_negation, max_digits, max_t",
        ),
        ({"config": {"min_terms": 9}}, r"data\.config: 'chain_sum' can't be made: max_terms must be >= min_terms"),
        ({"config": {"min_terms": "two"}}, r"data\.config: 'chain_sum' can't be made: TypeError"),
        ({"name": "composite"}, r"data\.config: 'composite' can't be made: Must specify at least one dataset"),
        ({"name": "composite", "config": {"datasets": "x"}}, r"must be a list of \{name, weight, config\}"),
        ({"name": "composite", "config": {"datasets": [{"nam": "x"}]}}, r"can't be made: TypeError: .*'nam'"),
    ],
)
def test_a_task_that_can_t_be_made_says_why(data: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        entries(config(**data))


def test_the_process_that_makes_problems_passes_on_what_is_wrong_and_has_a_deadline():
    with pytest.raises(InputError, match=r"^data\.config: 'chain_sum' can't be made: max_terms must be >= min_terms$"):
        read_rows(config(config={"min_terms": 9}), "train")
    with pytest.raises(InputError, match=r"did not make the problems within 0\.01 s \(data\.generate_seconds\)"):
        read_rows(config(generate_seconds=0.01), "test")


def test_a_mixture_of_tasks_is_scored_by_the_task_of_each_problem():
    parts = [{"name": "chain_sum", "weight": 2}, {"name": "leg_counting", "config": {"max_animals": 3}}]
    run = config("composite", config={"datasets": parts}, size=20)
    problems = entries(run)
    assert {entry["metadata"]["source_dataset"] for entry in problems} == {"chain_sum", "leg_counting"}
    scorer = load_scorer(run.data, ReasoningGymReward()).function
    assert [scorer(item(entry, entry["answer"])) for entry in problems] == [1.0] * 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "reasoning_gym"}}, r"data\.reasoning_gym\.name: Field required"),
        (
            {"data": {"kind": "reasoning_gym", "name": "x", "min_terms": 2}},
            r"reasoning_gym\.min_terms: unknown setting",
        ),
        ({"data": {"kind": "reasoning_gym", "name": "x", "config": {"size": 2}}}, r"config can't set size: data\.seed"),
        (
            {"data": {"kind": "chain", "source": "file"}},
            r"data: source \(file\) and kind \(chain\) are the same setting",
        ),
        ({"reward": {"kind": "reasoning_gym"}}, r"scores problems of data\.kind 'reasoning_gym' only, not of 'chain'"),
        (
            {"data": {"kind": "reasoning_gym", "name": "x"}, "reward": {"kind": "chain"}},
            r"reward\.kind 'chain' can't score problems of data\.kind 'reasoning_gym': leave reward out",
        ),
        (
            {"data": {"kind": "reasoning_gym", "name": "x"}, "reward": {"kind": "reasoning_gym", "answer_tag": "<a>"}},
            r"answer_tag",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        run_config(**changes)


def test_kind_and_source_are_one_setting(tmp_path: Path):
    run = config()
    assert run == run_config(data={"source": "reasoning_gym", "name": "chain_sum", "size": 12, "test_size": 5})
    assert isinstance(run.reward, ReasoningGymReward)
    assert run_config(data={"kind": "chain", "length": 3}).data.source == "chain"
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(run))
    assert load_config(path) == run
    assert load_config(path, ["data.kind=reasoning_gym", "data.size=9"]).data.size == 9
    other = load_config(path, ["data={kind: chain, length: 4}", "reward.kind=chain"])
    assert (other.data.source, other.data.length) == ("chain", 4)
    settings = yaml.safe_load(dump_yaml(run_config()))
    del settings["reward"]
    path.write_text(yaml.safe_dump(settings))
    changed = load_config(path, ["data.kind=reasoning_gym", "data.name=leg_counting"])
    assert changed.data == ReasoningGymData(name="leg_counting")
    assert changed.reward == ReasoningGymReward()


def test_prompts_have_the_system_prompt_and_another_reward_may_score_them():
    run = config(system_prompt="Answer in <answer> tags.")
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"max_prompt_tokens": 200})})
    rows = read_rows(run, "test")
    (first, *_) = tokenise(rows, byte_tokenizer(256), run, "test").prompts
    text = byte_tokenizer(256).decode(first.token_ids)
    assert text.startswith("Answer in <answer> tags.")
    assert rows[0].text in text
    math = run_config(data=run.data.model_dump(), reward={"kind": "math"})
    assert read_rows(math, "test", row_check(math.reward)) == rows
    data = {"kind": "reasoning_gym", "name": "graph_color", "size": 2, "test_size": 2}
    unanswered = run_config(data=data, reward={"kind": "math"})
    with pytest.raises(InputError, match=r"graph_color of reasoning-gym, .*can't be used"):
        read_rows(unanswered, "test", row_check(unanswered.reward))


@pytest.mark.parametrize(
    ("response", "tag", "answer"),
    [
        ("<answer>1</answer> no, <answer>\n2 </answer>.", "answer", "2"),
        ("<answer>1</answer>", "result", "<answer>1</answer>"),
        (" 7\n", "answer", "7"),
        (" <answer>7</answer>\n", None, "<answer>7</answer>"),
        ("<answer>7", "answer", "<answer>7"),
    ],
)
def test_the_answer_is_in_the_last_tag(response: str, tag: str | None, answer: str):
    assert given_answer(response, tag) == answer


def test_a_dry_run_shows_the_task_and_its_scorer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_qwen3(tmp_path / "model", max_length=256)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config(config={"max_terms": 3})))
    changes = [f"model.path={model}", f"runs_directory={tmp_path / 'runs'}", "rollout.max_prompt_tokens=160"]
    arguments = [argument for change in changes for argument in ("--set", change)]
    assert main(["--config", str(path), "--dry-run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "# data: chain_sum of reasoning-gym, min_terms=2, max_terms=3," in printed
    assert "# reward: reasoning_gym reads <answer> in response, answer, metadata, question" in printed
    assert "# train prompts: 12 of" in printed
    assert main(["--config", str(path), "--dry-run", *arguments, "--set", "data.name=chain_sun"]) == 2
    assert "error: data.name: reasoning-gym has no task 'chain_sun'" in capsys.readouterr().err
