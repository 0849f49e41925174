"""Prompts from files and from the chain task, and the order in which training draws them."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common.config import ConfigError, RunConfig
from common.config.data import MathReward
from common.trajectory import Prompt
from learner.environments.data import PromptStream, check_template_options, read_rows, rows_digest, tokenise
from learner.environments.rewards import row_check
from learner.environments.rows import Row
from learner.environments.tasks import SPLITS, chain
from learner.run.errors import InputError
from tests.configs import run_config
from tests.models import byte_tokenizer

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n} for n in range(6)]


def config(data: dict[str, Any], max_prompt_tokens: int = 64) -> RunConfig:
    return run_config(data=data, rollout={"max_prompt_tokens": max_prompt_tokens})


def file_config(path: Path, **changes: Any) -> RunConfig:
    return config({"source": "file", "train_path": str(path), "test_path": str(path)} | changes)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def complaint(run: RunConfig) -> str:
    with pytest.raises(InputError) as caught:
        read_rows(run, "train")
    return str(caught.value)


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path):
    jsonl = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    rows = read_rows(file_config(jsonl), "train")
    assert rows == read_rows(file_config(parquet), "train")
    assert [row.text for row in rows] == [row["question"] for row in ROWS]
    assert [row.answer for row in rows] == [row["answer"] for row in ROWS]
    assert len({row.id for row in rows}) == len(ROWS)


def test_columns_are_mapped_and_numbers_are_answers(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "two?", "a": 2, "key": "k7"}])
    (row,) = read_rows(file_config(path, columns={"prompt": "q", "answer": "a", "id": "key"}), "test")
    assert (row.id, row.text, row.answer) == ("k7", "two?", "2")


def line(**columns: Any) -> str:
    return json.dumps({"question": "a", "answer": "b"} | columns) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", "", ["holds no rows"]),
        ("rows.jsonl", "\n\n", ["holds no rows"]),
        ("rows.csv", "question,answer\n", ["must end in .jsonl or .parquet", ".csv"]),
        ("rows.parquet", "no parquet", ["can't be read as Parquet"]),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: str, words: list[str]):
    path = tmp_path / name
    path.write_text(content)
    message = complaint(file_config(path, on_bad_row="skip"))
    assert str(path) in message
    for word in words:
        assert word in message


BAD_LINES: list[tuple[str | bytes, str]] = [
    ('{"question": "a",\n', "it is not valid JSON (Expecting property name enclosed in double quotes)"),
    ("[1, 2]\n", "it is not an object with columns but a list"),
    ("null\n", "it is not an object with columns but null"),
    ("[" * 100_000 + "\n", "it is not valid JSON (RecursionError)"),
    ('{"question": "a", "answer": ' + "9" * 5000 + "}\n", "it is not valid JSON (ValueError)"),
    (b'{"question": "\xff\xfe", "answer": "b"}\n', "it is not UTF-8 text"),
    ('{"question": "a", "anwser": "b"}\n', "no column 'answer'; the columns are anwser, question"),
    (line(answer=None), "column 'answer' must hold text or a number, not null"),
    (line(answer=True), "column 'answer' must hold text or a number, not true"),
    (line(answer=["b"]), "column 'answer' must hold text or a number, not a list"),
    ('{"question": "a", "answer": NaN}\n', "column 'answer' holds NaN or a number beyond all limits"),
    ('{"question": "a", "answer": 1e400}\n', "column 'answer' holds NaN or a number beyond all limits"),
    ('{"question": "a", "answer": -Infinity}\n', "column 'answer' holds NaN or a number beyond all limits"),
    (line(answer="\ud800"), "column 'answer' holds half of a surrogate pair"),
    (line(question="a\udfffb"), "column 'question' holds half of a surrogate pair"),
    (line(question=[{"role": "user", "content": "\ud83d"}]), "column 'question' holds half of a surrogate pair"),
    (
        line(question=""),
        "column 'question' must hold text or a list of messages with a role and content, not empty text",
    ),
    (line(question=7), "with a role and content, not a number"),
    (line(question=[]), "with a role and content, not a list"),
    (line(question=[{"role": "user"}]), "with a role and content, not a list"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_a_bad_row_is_refused_with_its_place_or_left_out_with_a_note(tmp_path: Path, bad: str | bytes, reason: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line().encode() + (bad if isinstance(bad, bytes) else bad.encode()) + line().encode())
    message = complaint(file_config(path))
    assert message.startswith(f"{path}: 1 of 3 rows can't be used: ")
    assert reason in message
    assert "(line 2)" in message
    assert "data.on_bad_row: skip" in message
    assert len(message) < 1000
    notes: list[str] = []
    rows = read_rows(file_config(path, on_bad_row="skip"), "train", note=notes.append)
    assert [row.id for row in rows] == ["train-0", "train-2"]
    (note,) = notes
    assert note.startswith(f"{path}: 1 of 3 rows can't be used: ")
    assert reason in note
    assert note.endswith("They are left out (data.on_bad_row: skip)")


def test_bad_rows_are_counted_by_reason_and_their_first_places_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text((line() + line(answer=None) + "\n") * 5 + "{")
    message = complaint(file_config(path))
    assert "6 of 11 rows can't be used" in message
    assert "not null (line 2, line 5, line 8 and 2 more); it is not valid JSON" in message
    assert "(line 16)" in message


def test_a_file_of_bad_rows_only_is_refused_whatever_the_policy(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line(answer=None))
    assert complaint(file_config(path, on_bad_row="skip")).endswith("None is left")


def test_rows_of_parquet_are_checked_too(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    table = {"question": ["a", None, "c", "d"], "answer": [1.0, 2.0, float("nan"), None]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    message = complaint(file_config(path))
    for words in ("3 of 4 rows", "not null (row 2)", "holds NaN or a number beyond all limits", "(row 3)", "(row 4)"):
        assert words in message


def test_the_reward_s_check_counts_as_any_other(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": "?", "answer": r"$\boxed{}$"}])
    run = file_config(path, on_bad_row="skip")
    notes: list[str] = []
    assert len(read_rows(run, "train", row_check(MathReward()), notes.append)) == len(ROWS)
    assert "needs an answer, and it is empty (line 7)" in notes[0]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line().encode())
    assert [row.text for row in read_rows(file_config(path), "train")] == ["a"]


def test_dots_lead_into_columns_that_hold_objects(tmp_path: Path):
    row = {
        "prompt": [{"role": "user", "content": "two?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra.info": 7,
        "extra_info": {"index": 3},
    }
    names = {"prompt": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"}
    jsonl = write_jsonl(tmp_path / "rows.jsonl", [row])
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), parquet)
    for path in (jsonl, parquet):
        (found,) = read_rows(file_config(path, columns=names), "train")
        assert (found.id, found.text, found.answer) == ("3", "two?", "2")
        # A column of the whole name comes first.
        (found,) = read_rows(file_config(path, columns=names | {"answer": "extra.info"}), "train")
        assert found.answer == "7"
    missing = complaint(file_config(jsonl, columns=names | {"answer": "reward_model.truth"}))
    assert "no column 'reward_model.truth'; in 'reward_model' there are ground_truth, style (line 1)" in missing
    flat = complaint(file_config(jsonl, columns=names | {"answer": "extra.info.x"}))
    assert "no column 'extra.info.x'; the columns are" in flat
    number = complaint(file_config(jsonl, columns=names | {"answer": "extra_info.index.x"}))
    assert "'extra_info.index' is no object but a number" in number


def test_a_missing_file_is_refused(tmp_path: Path):
    assert "does not exist" in complaint(file_config(tmp_path / "nowhere.jsonl"))


def test_ids_are_text_or_whole_numbers_and_none_is_repeated(tmp_path: Path):
    rows = [ROWS[0] | {"level": 1}, ROWS[1] | {"level": 1}, ROWS[2] | {"level": None}, ROWS[3] | {"level": 1.5}]
    message = complaint(file_config(write_jsonl(tmp_path / "rows.jsonl", rows), columns={"id": "level"}))
    for words in ("repeats the value of an earlier row (line 2)", "not null (line 3)", "not a number (line 4)"):
        assert words in message


def test_the_chat_template_applies_to_text_and_to_messages(tmp_path: Path):
    tokenizer = byte_tokenizer(256)
    messages = [{"role": "user", "content": "hello"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": messages, "answer": "x"}, ROWS[0]])
    run = file_config(path, system_prompt="Be brief.")
    prompts = tokenise(read_rows(run, "train"), tokenizer, run, "train").prompts
    texts = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
    assert texts == ["hello\n", "Be brief.\nWhat is 0 + 0?\n"]
    assert [prompt.text for prompt in prompts] == ["hello", "What is 0 + 0?"]
    plain = file_config(write_jsonl(tmp_path / "plain.jsonl", ROWS), chat=False)
    prompts = tokenise(read_rows(plain, "train"), tokenizer, plain, "train").prompts
    assert tokenizer.decode(prompts[0].token_ids) == "What is 0 + 0?"


TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('not this') }}{% endif %}{{ m.content }}"
    "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_the_chat_template_gets_its_options_and_unknown_ones_are_refused(tmp_path: Path):
    tokenizer = byte_tokenizer(256)
    tokenizer.chat_template = TEMPLATE
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0]])
    for options, end in (({}, "?"), ({"enable_thinking": True}, "?"), ({"enable_thinking": False}, "<think></think>")):
        run = file_config(path, chat_template_kwargs=options)
        check_template_options(tokenizer, run.data)
        for split in SPLITS:
            (prompt,) = tokenise(read_rows(run, split), tokenizer, run, split).prompts
            assert tokenizer.decode(prompt.token_ids).endswith(end)
    with pytest.raises(InputError, match=r"does not read enable_thinkin$"):
        check_template_options(tokenizer, file_config(path, chat_template_kwargs={"enable_thinkin": False}).data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chat": False, "chat_template_kwargs": {"enable_thinking": False}}, "need chat: true"),
        ({"chat_template_kwargs": {"tokenize": True}}, "can't set tokenize"),
        ({"on_bad_row": "ignore"}, "on_bad_row"),
    ],
)
def test_settings_of_the_data_that_can_not_work_are_refused(tmp_path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        file_config(tmp_path, **changes)


def test_a_row_that_the_chat_template_refuses_is_a_bad_row(tmp_path: Path):
    tokenizer = byte_tokenizer(256)
    tokenizer.chat_template = TEMPLATE
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], ROWS[1] | {"question": "bad"}])
    run = file_config(path)
    with pytest.raises(InputError, match=r"1 of 2 rows .* chat template fails \(not this\).* \(line 2\)"):
        tokenise(read_rows(run, "train"), tokenizer, run, "train")
    notes: list[str] = []
    run = file_config(path, on_bad_row="skip")
    kept = tokenise(read_rows(run, "train"), tokenizer, run, "train", notes.append)
    assert [prompt.id for prompt in kept.prompts] == ["train-0"]
    assert "(line 2)" in notes[0]


def test_messages_without_a_chat_template_are_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": [{"role": "user", "content": "a"}], "answer": "b"}])
    assert "need data.chat: true" in complaint(file_config(path, chat=False))


def test_long_prompts_are_left_out_and_counted_and_none_left_is_an_error(tmp_path: Path):
    tokenizer = byte_tokenizer(256)
    run = file_config(write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": "x" * 65, "answer": "y"}]))
    rows = read_rows(run, "train")
    kept = tokenise(rows, tokenizer, run, "train")
    assert (len(kept.prompts), kept.dropped) == (6, 1)
    short = config(run.data.model_dump(), max_prompt_tokens=5)
    with pytest.raises(InputError, match=r"none of the 7 train prompts fits .*\(5\): the shortest has 15 tokens"):
        tokenise(rows, tokenizer, short, "train")


def test_the_place_of_a_row_is_no_part_of_what_a_run_goes_on_with():
    assert rows_digest([Row("1", "a", "b", None, {"c": 1}, "line 1")]) == rows_digest([Row("1", "a", "b")])


def test_a_hub_data_set_holds_out_problems_that_training_never_sees(monkeypatch: pytest.MonkeyPatch):
    table = datasets.Dataset.from_list([{"question": f"q{n}", "final_answer": n} for n in range(20)])
    asked = []

    def load(name: str, subset: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((name, subset, split, revision))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = {"source": "huggingface", "name": "a/b", "test_problems": 5, "columns": {"answer": "final_answer"}}
    run = config(data)
    train, test = read_rows(run, "train"), read_rows(run, "test")
    assert asked == [("a/b", None, "train", None)] * 2
    assert len(test) == 5
    assert {row.text for row in train} | {row.text for row in test} == {f"q{n}" for n in range(20)}
    assert not {row.text for row in train} & {row.text for row in test}
    assert read_rows(run, "test") == test
    assert len(read_rows(config(data | {"max_train_problems": 3}), "train")) == 3
    assert "holds out all of its 20 rows" in complaint(config(data | {"test_problems": 20}))


def test_a_hub_data_set_that_can_not_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch):
    def load(*arguments: object, **options: object) -> Any:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = complaint(config({"source": "huggingface", "name": "a/b"}))
    assert message == "data set 'a/b', split 'train' can't be loaded: no route to the hub"


def test_chain_problems_are_the_same_each_time_and_solve_themselves():
    run = config({"source": "chain", "length": 5, "train_problems": 20, "test_problems": 10})
    train, test = read_rows(run, "train"), read_rows(run, "test")
    assert train == read_rows(run, "train")
    assert not {row.text for row in train} & {row.text for row in test}
    assert all(chain.check(chain.parse_prompt(row.text), row.answer).correct for row in train)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(n), text="", token_ids=[1]) for n in range(count)]


def test_an_epoch_uses_every_prompt_once_and_the_next_has_another_order():
    stream = PromptStream(prompts(13), seed=3, prompts_per_step=4)
    assert len(stream) == 13
    epochs = [[stream.at(13 * epoch + place).id for place in range(13)] for epoch in range(2)]
    assert sorted(epochs[0], key=int) == sorted(epochs[1], key=int) == [str(n) for n in range(13)]
    assert epochs[0] != epochs[1]


def test_a_turn_has_the_same_prompt_whenever_it_is_asked_for():
    turns = list(range(50))
    in_order = [PromptStream(prompts(10), seed=0, prompts_per_step=3).at(turn) for turn in turns]
    stream = PromptStream(prompts(10), seed=0, prompts_per_step=3)
    random.Random(0).shuffle(turns)
    assert [stream.at(turn) for turn in turns] == [in_order[turn] for turn in turns]


def test_the_position_is_the_place_in_the_epochs_order():
    stream = PromptStream(prompts(6), seed=0, prompts_per_step=3)
    assert [stream.at(turn).position for turn in range(12)] == [*range(6), *range(6)]


def test_fewer_prompts_than_a_step_needs_are_refused():
    with pytest.raises(InputError, match=r"3 train prompts are fewer than rollout\.groups_per_step \(4\)"):
        PromptStream(prompts(3), seed=0, prompts_per_step=4)
