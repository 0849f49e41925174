"""The demo model's tokenizer, shape and directory; what it learns is tested where it is trained."""

import json
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.environments.tasks.chain import generate
from learner.policy.model_directory import check_model, ensure_model
from learner.run.errors import InputError
from learner.warm_start import (
    SETTINGS_FILE,
    VOCABULARY_ROWS,
    WarmStartSettings,
    build_model,
    build_tokenizer,
    encode,
    response_logits,
    slipped_values,
    warm_start,
)
from tests.configs import run_config

TOKENIZER = build_tokenizer()
TINY = WarmStartSettings(chain_length=3, sequences_per_step=2, clean_steps=2, slip_steps=1)


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_every_ascii_character_and_the_multiplication_sign_is_one_token() -> None:
    characters = [*map(chr, range(128)), "×"]
    ids = [TOKENIZER.encode(character) for character in characters]
    assert {len(tokens) for tokens in ids} == {1}
    assert len({tokens[0] for tokens in ids}) == len(characters)


def test_a_prompt_has_a_token_a_character_and_nothing_is_prepended() -> None:
    for problem in generate(0, "test", 20):
        ids = TOKENIZER.encode(problem.prompt)
        assert len(ids) == 24 * len("a+5") + len(":7\n")
        assert [TOKENIZER.decode([token]) for token in ids] == list(problem.prompt)
        assert len(TOKENIZER.encode(problem.solution)) == 24 * len("a+5=2\n")


def test_a_chat_message_gives_exactly_the_completion_prompt() -> None:
    problem = generate(0, "test", 1)[0]
    message = {"role": "user", "content": problem.prompt.removesuffix("\n")}
    rendered = TOKENIZER.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert rendered == problem.prompt
    ids = TOKENIZER.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == TOKENIZER.encode(problem.prompt)


def test_special_tokens_are_single_distinct_and_left_out_of_the_text() -> None:
    eos, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    assert eos != pad
    assert TOKENIZER.encode(TOKENIZER.eos_token) == [eos]
    assert TOKENIZER.decode([*TOKENIZER.encode("a+5=2\n"), eos, pad], skip_special_tokens=True) == "a+5=2\n"


def test_the_embedding_has_rows_that_no_token_uses() -> None:
    model = build_model(WarmStartSettings(), TOKENIZER)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY_ROWS
    assert len(TOKENIZER) < VOCABULARY_ROWS
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == TOKENIZER.eos_token_id


def test_initial_weights_depend_on_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    same, again = (build_model(WarmStartSettings(seed=1), TOKENIZER) for _ in range(2))
    other = build_model(WarmStartSettings(seed=2), TOKENIZER)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(same.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(same.lm_head.weight, other.lm_head.weight)


def test_without_slips_the_labels_are_the_true_values() -> None:
    for problem in generate(0, "train", 20):
        assert slipped_values(problem, 0.0, random.Random(0)) == list(problem.true_values)


def test_slips_have_the_asked_rate_are_uniform_and_are_carried_on() -> None:
    rng = random.Random(0)
    shifts = [0] * 10
    for problem in generate(0, "train", 1000):
        previous = problem.start
        for (symbol, operand), value in zip(problem.operations, slipped_values(problem, 0.19, rng), strict=True):
            right = eval(f"{previous}{symbol.replace('×', '*')}{operand}") % 10
            shifts[(value - right) % 10] += 1
            previous = value
    # 24,000 steps: four standard deviations are 0.010 for the rate and 0.0037 for each wrong digit's share.
    assert 1 - shifts[0] / 24_000 == pytest.approx(0.19, abs=0.010)
    for count in shifts[1:]:
        assert count / 24_000 == pytest.approx(0.19 / 9, abs=0.0037)


def test_response_logits_are_those_that_predict_the_response() -> None:
    model = build_model(WarmStartSettings(), TOKENIZER)
    problems = generate(0, "train", 2, length=3)
    tokens, prompt_tokens = encode(TOKENIZER, problems, [problem.solution for problem in problems])
    assert TOKENIZER.decode(tokens[1, :prompt_tokens]) == problems[1].prompt
    assert TOKENIZER.decode(tokens[1, prompt_tokens:]) == problems[1].solution + TOKENIZER.eos_token
    with torch.no_grad():
        logits = response_logits(model, tokens, prompt_tokens)
        for index in range(logits.shape[1]):
            whole = model(tokens[:, : prompt_tokens + index]).logits[:, -1]
            torch.testing.assert_close(logits[:, index], whole, atol=1e-4, rtol=1e-4)


def test_the_directory_loads_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "models" / "demo"
    phases: list[str] = []
    measures = warm_start(output, TINY, on_step=phases.append)
    assert len(phases) == 3
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.float32
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.decode(tokenizer.encode("a×3=1\n é")) == "a×3=1\n é"

    modified = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert warm_start(output, TINY) == measures
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == modified
    assert [path.name for path in output.parent.iterdir() if not path.name.endswith(".lock")] == ["demo"]


def test_other_settings_or_force_replace_an_earlier_model(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    warm_start(output, TINY)
    first = (output / "model.safetensors").read_bytes()
    warm_start(output, TINY, force=True)
    assert (output / "model.safetensors").read_bytes() == first
    other = WarmStartSettings(seed=1, chain_length=3, sequences_per_step=2, clean_steps=2, slip_steps=1)
    warm_start(output, other)
    assert (output / "model.safetensors").read_bytes() != first
    assert json.loads((output / SETTINGS_FILE).read_text())["settings"]["seed"] == 1


def test_a_directory_that_is_no_warm_start_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no warm start"):
        warm_start(tmp_path, TINY, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failure_half_way_keeps_the_earlier_model(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    warm_start(output, TINY)
    before = (output / "model.safetensors").read_bytes()

    def fail(phase: str) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        warm_start(output, TINY, force=True, on_step=fail)
    assert (output / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["demo"]


def test_a_run_on_chains_of_another_length_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "model"
    warm_start(output, TINY)
    for length, refused in ((TINY.chain_length, False), (4, True)):
        config = run_config(data={"source": "chain", "length": length}, model={"path": str(output), "warm_start": True})
        expected = pytest.raises(InputError, match="was made for chains of 3 steps") if refused else nullcontext()
        with expected:
            check_model(config)
            ensure_model(config, lambda *_: pytest.fail("the model was made again"))
