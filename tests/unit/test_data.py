"""Prompts from files and from the chain task, and the order in which training draws them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common.config import RunConfig
from common.trajectory import Prompt
from learner.data import PromptStream, read_rows, tokenise
from learner.errors import InputError
from learner.tasks import chain
from tests.configs import run_config
from tests.models import byte_tokenizer

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n} for n in range(6)]


def config(data: dict[str, Any]) -> RunConfig:
    return run_config(data=data, rollout={"max_prompt_tokens": 64})


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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", "", ["holds no rows"]),
        ("rows.jsonl", '{"question": "a", "answer": "b"}\n{"question": "a",\n', ["line 2", "not valid JSON"]),
        ("rows.jsonl", "[1, 2]\n", ["line 1", "expected an object", "list"]),
        ("rows.jsonl", '{"question": "a", "anwser": "b"}\n', ["row 1", "no column 'answer'", "anwser, question"]),
        ("rows.jsonl", '{"question": "a", "answer": null}\n', ["row 1", "'answer'", "NoneType"]),
        ("rows.jsonl", '{"question": "", "answer": "b"}\n', ["row 1", "'question'", "must hold text"]),
        ("rows.csv", "question,answer\n", ["must end in .jsonl or .parquet", ".csv"]),
        ("rows.parquet", "no parquet", ["can't be read as Parquet"]),
    ],
)
def test_a_bad_file_is_refused_with_the_place_of_the_fault(tmp_path: Path, name: str, content: str, words: list[str]):
    path = tmp_path / name
    path.write_text(content)
    message = complaint(file_config(path))
    assert str(path) in message
    for word in words:
        assert word in message


def test_a_missing_file_and_a_file_of_bytes_are_refused(tmp_path: Path):
    assert "does not exist" in complaint(file_config(tmp_path / "nowhere.jsonl"))
    binary = tmp_path / "rows.jsonl"
    binary.write_bytes(b'{"question": "\xff\xfe"}\n')
    assert "not UTF-8" in complaint(file_config(binary))


def test_repeated_ids_are_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0] | {"level": 1}, ROWS[1] | {"level": 1}])
    assert "1 distinct values in 2 rows" in complaint(file_config(path, columns={"id": "level"}))


def test_the_chat_template_applies_to_text_and_to_messages(tmp_path: Path):
    tokenizer = byte_tokenizer(256)
    messages = [{"role": "user", "content": "hello"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": messages, "answer": "x"}, ROWS[0]])
    rows = read_rows(file_config(path, system_prompt="Be brief."), "train")
    prompts = tokenise(rows, tokenizer, 64, "train").prompts
    texts = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
    assert texts == ["hello\n", "Be brief.\nWhat is 0 + 0?\n"]
    assert [prompt.text for prompt in prompts] == ["hello", "What is 0 + 0?"]
    plain = read_rows(file_config(write_jsonl(tmp_path / "plain.jsonl", ROWS), chat=False), "train")
    assert tokenizer.decode(tokenise(plain, tokenizer, 64, "train").prompts[0].token_ids) == "What is 0 + 0?"


def test_messages_without_a_chat_template_are_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": [{"role": "user", "content": "a"}], "answer": "b"}])
    assert "need data.chat=true" in complaint(file_config(path, chat=False))


def test_long_prompts_are_left_out_and_counted_and_none_left_is_an_error(tmp_path: Path):
    tokenizer = byte_tokenizer(256)
    rows = read_rows(
        file_config(write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": "x" * 65, "answer": "y"}])), "train"
    )
    kept = tokenise(rows, tokenizer, 64, "train")
    assert (len(kept.prompts), kept.dropped) == (6, 1)
    with pytest.raises(InputError, match=r"none of the 7 train prompts fits .*\(5\): the shortest has 15 tokens"):
        tokenise(rows, tokenizer, 5, "train")


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
    stream = PromptStream(prompts(12), seed=3, prompts_per_draw=4)
    epochs = [[prompt.id for _ in range(3) for prompt in stream.draw()] for _ in range(2)]
    assert sorted(epochs[0], key=int) == sorted(epochs[1], key=int) == [str(n) for n in range(12)]
    assert epochs[0] != epochs[1]


def test_no_prompt_is_twice_in_a_draw_when_an_epoch_ends_in_between():
    stream = PromptStream(prompts(10), seed=0, prompts_per_draw=4)
    for _ in range(20):
        assert len({prompt.id for prompt in stream.draw()}) == 4


def test_a_restored_stream_continues_as_the_first_would_have():
    first = PromptStream(prompts(10), seed=0, prompts_per_draw=3)
    drawn = [[p.id for p in first.draw()] for _ in range(5)]
    place = first.epoch, first.position
    later = [[p.id for p in first.draw()] for _ in range(5)]
    second = PromptStream(prompts(10), seed=0, prompts_per_draw=3)
    second.restore(*place)
    assert [[p.id for p in second.draw()] for _ in range(5)] == later
    assert drawn != later


def test_the_position_is_the_place_in_the_epochs_order():
    stream = PromptStream(prompts(6), seed=0, prompts_per_draw=3)
    assert [p.position for _ in range(2) for p in stream.draw()] == list(range(6))


def test_fewer_prompts_than_a_step_needs_are_refused():
    with pytest.raises(InputError, match=r"3 train prompts are fewer than rollout\.groups_per_step \(4\)"):
        PromptStream(prompts(3), seed=0, prompts_per_draw=4)
