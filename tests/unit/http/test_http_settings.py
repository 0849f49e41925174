"""Settings from flags, environment and file, and what cannot work."""

from pathlib import Path

import pytest

from common.config import DelimiterSegmentation, FixedSegmentation
from common.config.erasure import TEXT_SEGMENTS, Segmentation
from rollout_server.http.server.command_line import UsageError, parser, read_settings
from rollout_server.http.server.settings import ServerSettings


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("E3RL_MODEL", "E3RL_PORT", "E3RL_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_flags_win_over_the_environment_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: from/file\nport: 1\nadmin_port: 2\nrequest_seconds: 3\nerasure: {kappa: 0.5}\n")
    monkeypatch.setenv("E3RL_PORT", "11")
    monkeypatch.setenv("E3RL_ADMIN_PORT", "12")
    settings = read_settings(["--config", str(file), "--port", "21"])
    assert (settings.model, settings.port, settings.admin_port, settings.request_seconds) == ("from/file", 21, 12, 3.0)
    assert settings.erasure.kappa == 0.5
    assert settings.name == "file"


def test_keys_are_given_several_times_or_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    by_flags = read_settings(["--model", "m", "--api-key", "first-key", "--api-key", "second-key"])
    monkeypatch.setenv("E3RL_API_KEY", "first-key, second-key")
    by_environment = read_settings(["--model", "m"])
    assert by_flags.api_key == by_environment.api_key
    assert [key.get_secret_value() for key in by_flags.api_key] == ["first-key", "second-key"]
    assert "first-key" not in repr(by_flags)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "--model is needed"),
        (["--model", "m", "--port", "70000"], "--port"),
        (["--model", "m", "--host", "0.0.0.0"], "set an API key"),
        (["--model", "m", "--admin-host", "::"], "set an API key"),
        (["--model", "m", "--port", "8001"], "need one each"),
        (["--model", "m", "--api-key", "short"], "at least 8"),
        (["--model", "m", "--erasure", '{"kapa": 1}'], "erasure.kapa"),
        (["--model", "m", "--erasure", "kappa=1"], "--erasure: not valid JSON"),
        (["--model", "m", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model", "m", "--ray-address", "auto"], "runs without Ray"),
        (["--model", "m", "--sentinel-ids", "3"], "--sentinel-ids"),
    ],
)
def test_what_cannot_work_is_one_line(flags: list[str], text: str) -> None:
    with pytest.raises(UsageError) as error:
        read_settings(flags)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert "short" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("1: 3\n", "unknown setting '1'"),
        ("- port\n", "expected a mapping, found list"),
        ("port: 1\nport: 2\n", "'port' stands here a second time"),
        ("port: {\n", "not valid YAML"),
        ("erasure: {kapa: 1}\n", "erasure.kapa"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as error:
        read_settings(["--model", "m", "--config", str(file)])
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_values_of_several_parts_are_read_alike_from_flags_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_flags = read_settings(["--model", "m", "--erasure", '{"kappa": 0.5}', "--sentinel-ids", "7,8"])
    monkeypatch.setenv("E3RL_ERASURE", '{"kappa": 0.5}')
    monkeypatch.setenv("E3RL_SENTINEL_IDS", "7 8")
    assert read_settings(["--model", "m"]) == by_flags
    assert (by_flags.erasure.kappa, by_flags.sentinel_ids) == (0.5, (7, 8))
    monkeypatch.setenv("E3RL_ERASURE", "x")
    with pytest.raises(UsageError, match="erasure: not valid JSON"):
        read_settings(["--model", "m"])


def test_a_model_directory_is_absolute_and_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = read_settings(["--model", "models/mine"])
    assert (settings.model, settings.name) == (str(tmp_path / "models" / "mine"), "mine")


def test_help_has_every_setting_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ServerSettings.model_fields:
        assert "--" + name.replace("_", "-") in text
    for group in ("model:", "listeners:", "erasure:", "replicas:", "limits:", "observability:"):
        assert f"\n{group}\n" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, TEXT_SEGMENTS),
        ('{"kappa": 0.5}', TEXT_SEGMENTS),
        ('{"segmentation": {"mode": "fixed", "length": 8}}', FixedSegmentation(length=8)),
        ('{"segmentation": {"mode": "delimiter", "delimiter": "x"}}', DelimiterSegmentation(delimiter="x")),
    ],
)
def test_segments_follow_the_text_unless_a_policy_cuts_otherwise(given: str | None, expected: Segmentation) -> None:
    flags = [] if given is None else ["--erasure", given]
    assert read_settings(["--model", "m", *flags]).erasure.segmentation == expected


def test_a_policy_is_as_it_was_after_it_was_printed() -> None:
    policy = read_settings(["--model", "m"]).erasure
    assert read_settings(["--model", "m", "--erasure", policy.model_dump_json(exclude_none=True)]).erasure == policy
