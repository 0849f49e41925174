"""Configurations: what is refused, and whether the message lets a user put it right."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import ConfigError, RunConfig, build_config, dump_yaml, load_config, variant
from common.config.loading import PRESETS, merge, parse_assignment
from learner.run.sizes import derived_sizes
from learner.train import main, parser, read_config, resumes
from tests.configs import SETTINGS, run_config

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "deploy" / "configs").glob("*.yaml"))


def settings(**changes: Any) -> dict[str, Any]:
    base = merge(SETTINGS, {"rollout": {"groups_per_step": 4, "max_response_tokens": 152}})
    return copy.deepcopy(base) | changes


def refused(tmp_path: Path, *assignments: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings()))
    with pytest.raises(ConfigError) as caught:
        load_config(path, assignments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "arithmetic"),
    [
        (
            "model.max_length=200",
            "model.max_length (200) is less than max_prompt_tokens + max_response_tokens + 1 sentinel step "
            "(233 = 80 + 152 + 1)",
        ),
        (
            "learner.ranks=3",
            "responses per step (16 = 4 groups x 4) do not divide into minibatches_per_step x ranks (6 = 2 x 3)",
        ),
        (
            "learner.tokens_per_microbatch=100",
            "learner.tokens_per_microbatch (100) is less than the longest sequence (232 = 80 + 152)",
        ),
        (
            "rollout.erasure.segmentation={mode: fixed, length: 512}",
            "a segment of at least 512 tokens never ends within max_response_tokens (152)",
        ),
        ("rollout.group_share={mode: fixed, share: 0.3}", "group_share 0.3 x responses_per_group 4 = 1.2"),
        ("rollout.erasure.segmentation.min_length=20", "min_length (20) exceeds max_length (16)"),
        ("rollout.erasure.weights={base: 0}", "weights are all 0"),
    ],
)
def test_an_impossible_combination_is_refused_with_its_arithmetic(tmp_path: Path, assignment: str, arithmetic: str):
    assert arithmetic in refused(tmp_path, assignment)


@pytest.mark.parametrize(
    ("assignment", "place"),
    [
        ("stepz=3", "stepz"),
        ("rollout.erasure.kapa=1", "rollout.erasure.kapa"),
        ("learner.optimizer.lr=1", "learner.optimizer.lr"),
        ("rollout.engine.gpu=1", "rollout.engine.gpu"),
    ],
)
def test_an_unknown_setting_is_named_wherever_it_stands(tmp_path: Path, assignment: str, place: str):
    assert f"{place}: unknown setting" in refused(tmp_path, assignment)


def test_an_unknown_setting_of_one_kind_is_not_taken_from_another(tmp_path: Path):
    message = refused(tmp_path, "rollout.erasure.segmentation={mode: fixed, delimiter: x}")
    assert "delimiter: unknown setting" in message


def test_all_problems_are_reported_at_once_with_what_was_found(tmp_path: Path):
    message = refused(tmp_path, "steps=many", "seed=-1")
    assert "steps: " in message
    assert "(found 'many')" in message
    assert "seed: " in message
    assert "(found -1)" in message


@pytest.mark.parametrize(
    ("assignment", "place"),
    [
        ("steps=yes", "steps"),
        ("rollout.erasure.segmentation.max_length=true", "rollout.erasure.segmentation.max_length"),
        ("learner.optimizer.betas=[0.9, off]", "learner.optimizer.betas.1"),
    ],
)
def test_what_yaml_takes_for_a_boolean_is_no_number(tmp_path: Path, assignment: str, place: str):
    assert f"{place}: a number is expected (found" in refused(tmp_path, assignment)


def test_a_system_prompt_without_a_chat_template_is_refused():
    data = {"source": "file", "train_path": "a.jsonl", "test_path": "a.jsonl", "chat": False, "system_prompt": "Think."}
    with pytest.raises(ConfigError, match=r"data\.file: system_prompt needs chat: true"):
        build_config(settings(data=data))


def test_negatives_from_erasure_need_a_treated_share(tmp_path: Path):
    no_share = ("rollout.group_share={mode: fixed, share: 0}", "learner.advantage.erased_weight=0.1")
    assert "a group_share above 0" in refused(tmp_path, *no_share)


@pytest.mark.parametrize("preset", ["grpo", "temperature_control"])
def test_a_run_that_learns_from_erased_attempts_has_baselines(preset: str):
    config = build_config(settings(learner={"advantage": {"erased_weight": 0.1}}))
    assert variant(config, preset, "baseline").learner.advantage.erased_weight == 0.0


def test_a_temperature_control_does_not_take_negatives_from_erasure(tmp_path: Path):
    message = refused(tmp_path, "rollout.treatment={kind: temperature}", "learner.advantage.erased_weight=1")
    assert "nothing is erased" in message


def test_several_ranks_do_not_send_handles_to_their_memory(tmp_path: Path):
    refusal = refused(tmp_path, "sync.transport=ipc", "learner.ranks=2")
    assert "sync.transport 'ipc' sends from one rank, and learner.ranks is 2" in refusal


@pytest.mark.parametrize("assignment", ["steps", "=3", "a..b=3", ".a=1"])
def test_a_malformed_assignment_says_which_form_is_right(assignment: str):
    with pytest.raises(ConfigError, match=r"not of the form a\.b\.c=value"):
        parse_assignment(assignment)


def test_assignments_apply_in_order_and_their_values_are_yaml(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings()))
    config = load_config(
        path,
        [
            "steps=8",
            "steps=9",
            "rollout.erasure.threshold=.inf",
            "data={source: chain, length: 12}",
            "token_budget=null",
        ],
    )
    assert config.steps == 9
    assert config.rollout.erasure.threshold == float("inf")
    assert config.data.length == 12
    assert config.token_budget is None


def test_a_preset_of_the_command_line_wins_over_the_file_and_other_assignments_over_it(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(rollout={**settings()["rollout"], "group_share": {"mode": "adaptive"}})))
    config = load_config(path, ["learner.advantage.normalise=segment", "preset=grpo"])
    assert config.rollout.group_share.model_dump() == {"mode": "fixed", "share": 0.0}
    assert config.learner.advantage.credit.kind == "uniform"
    assert config.learner.advantage.normalise == "segment"


@pytest.mark.parametrize("name", ["2026-01-15", "123", "on", "null"])
def test_a_name_is_not_read_as_yaml(tmp_path: Path, name: str):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings()))
    assert read_config(parser().parse_args(["--config", str(path), "--name", name])).name == name


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings()) + "learner: {ranks: 2}\nseed: 1\nlearner: {zero_stage: 1}\n")
    with pytest.raises(ConfigError, match=r"'learner' stands here a second time\s+in .* line \d+"):
        load_config(path)


def test_changing_the_kind_of_a_part_drops_the_settings_of_the_old_kind(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings()))
    config = load_config(path, ["rollout.erasure.segmentation={mode: fixed, length: 8}"])
    assert config.rollout.erasure.segmentation.model_dump() == {"mode": "fixed", "length": 8}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_resolved_configuration_reads_back_the_same(tmp_path: Path, preset: str):
    changes = {"preset": preset} | ({"rollout": settings()["rollout"]} if preset != "paper" else {})
    given = settings(**changes)
    if preset == "paper":
        given["rollout"]["erasure"] = {}
        given["rollout"]["max_response_tokens"] = 600
        given["model"]["max_length"] = 1024
    config = build_config(given)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config


def test_a_preset_changes_defaults_and_gives_way_to_what_is_said():
    config = build_config(settings(preset="grpo"))
    assert config.treated_per_group == 0
    assert config.learner.advantage.credit.kind == "uniform"
    said = build_config(settings(preset="grpo", learner={"advantage": {"credit": {"kind": "uncertainty"}}}))
    assert said.learner.advantage.credit.kind == "uncertainty"


def test_a_variant_is_the_baseline_whatever_the_configuration_says():
    config = build_config(settings(learner={"advantage": {"credit": {"kind": "uncertainty", "offset": 0.3}}}))
    grpo = variant(config, "grpo", "test-grpo")
    assert grpo.name == "test-grpo"
    assert grpo.treated_per_group == 0
    assert grpo.learner.advantage.credit.kind == "uniform"
    control = variant(config, "temperature_control", "test-control")
    assert control.rollout.treatment.kind == "temperature"
    assert control.rollout.group_share == config.rollout.group_share
    assert control.rollout.erasure == config.rollout.erasure


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("- a\n- b\n", "expected a mapping, found list"),
        ("a: [\n", "is not valid YAML"),
        ("", "expected a mapping, found NoneType"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str, complaint: str):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_the_repository_passes_a_dry_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    config = RunConfig.model_validate(yaml.safe_load(printed))
    written = tmp_path / "runs" / config.name / "config.yaml"
    assert load_config(written) == config == load_config(path)
    assert "optimizer steps" in printed


def test_the_demo_is_as_its_issue_describes_it():
    config = load_config(ROOT / "deploy" / "configs" / "demo.yaml")
    sizes = dict(derived_sizes(config))
    assert sizes["responses per step"].startswith("64 = 8 groups x 8")
    assert sizes["optimizer steps"].startswith("64 = 32 steps x 2")
    assert config.learner.ranks == 2
    assert config.rollout.erasure.max_erasures == 5
    assert config.rollout.erasure.kappa == 0.0


def test_a_token_budget_may_be_exceeded_by_the_step_that_reaches_it():
    config = build_config(settings(rollout={**settings()["rollout"], "group_share": {"mode": "fixed", "share": 0.0}}))
    in_all = "generated tokens in all"
    assert dict(derived_sizes(config))[in_all] == f"at most {4 * 16 * 152:,} for training"
    limited = config.model_copy(update={"token_budget": 100})
    assert dict(derived_sizes(limited))[in_all] == f"at most {99 + 16 * 152:,} for training"
    assert dict(derived_sizes(config.model_copy(update={"token_budget": 10**9}))) == dict(derived_sizes(config))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--config FILE is needed"),
        (["--config", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["--resume", "--name", "nothing"], "nothing"),
    ],
)
def test_the_command_line_answers_bad_input_with_status_2_and_the_message_alone(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_dry_run_leaves_an_existing_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("old")
    (run / "metrics.jsonl").write_text("{}\n")
    assert main(["--config", str(ROOT / "deploy/configs/demo.yaml"), "--dry-run"]) == 0
    assert "already holds a run" in capsys.readouterr().out
    assert (run / "config.yaml").read_text() == "old"


@pytest.mark.parametrize(
    ("given", "holds", "expected"),
    [
        ([], "metrics.jsonl", False),
        (["--resume"], "metrics.jsonl", True),
        (["--resume"], None, True),
        (["--resume", "auto"], "metrics.jsonl", True),
        (["--resume=auto"], "log", True),
        (["--resume", "auto"], ".lock", False),
        (["--resume", "auto"], None, False),
    ],
)
def test_resume_auto_continues_what_there_is_and_begins_what_there_is_not(
    tmp_path: Path, given: list[str], holds: str | None, expected: bool
):
    config = run_config(name="run", runs_directory=str(tmp_path / "runs"))
    if holds is not None:
        (tmp_path / "runs" / "run").mkdir(parents=True)
        (tmp_path / "runs" / "run" / "config.yaml").write_text(dump_yaml(config))
        (tmp_path / "runs" / "run" / holds).touch()
    assert resumes(config, parser().parse_args(["--name", "run", *given])) == expected


def test_resume_auto_needs_a_file_to_begin_a_run_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--name", "run", "--resume", "auto", "--set", f"runs_directory={tmp_path / 'runs'}"]) == 2
    assert "--config FILE is needed: there is no" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--name", "run", "--resume", "sometimes"])


def test_forking_takes_the_stored_settings_and_begins_a_new_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for other in (["--resume"], ["--compare"]):
        assert main(["--name", "old", "--fork", "new", *other]) == 2
        assert "--fork begins a new run" in capsys.readouterr().err
    path = tmp_path / "runs" / "old" / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(dump_yaml(run_config(name="old", runs_directory=str(tmp_path / "runs"))))
    where = ["--set", f"runs_directory={tmp_path / 'runs'}"]
    options = parser().parse_args(["--name", "old", "--fork", "new", "--set", "seed=7", *where])
    assert (read_config(options).name, read_config(options).seed) == ("old", 7)
    assert main(["--name", "old", "--fork", "bad name", "--dry-run", *where]) == 2
    assert "name: " in capsys.readouterr().err
    assert main(["--name", "old", "--fork", "newer", *where]) == 2
    assert "old has no checkpoint to fork" in capsys.readouterr().err


def test_gradients_in_float32_are_not_summed_in_less():
    with pytest.raises(ConfigError, match=r"grad_accum_dtype 'bfloat16' needs model\.dtype 'bfloat16'"):
        run_config(learner={"grad_accum_dtype": "bfloat16"})
    run_config(model={"dtype": "bfloat16"}, learner={"grad_accum_dtype": "bfloat16"})
    assert run_config().learner.grad_accum_dtype == "float32"


def test_half_of_a_surrogate_pair_is_refused_where_it_stands(tmp_path: Path):
    path = tmp_path / "config.yaml"
    data = '{source: file, train_path: a.jsonl, test_path: b.jsonl, system_prompt: "a\\ud800"}'
    path.write_text(f"name: x\nsteps: 1\ndata: {data}\n")
    with pytest.raises(ConfigError, match=r"^data\.system_prompt: half of a surrogate pair"):
        load_config(path)
