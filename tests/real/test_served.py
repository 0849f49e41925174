"""A pretrained model behind the endpoint: sentinels, log-probs, chat template, text of several bytes a character."""

from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from common.config.erasure import TEXT_SEGMENTS
from common.segmentation import segment_length
from common.token_bytes import token_bytes
from common.trajectory import Trajectory
from tests.engines import ReferenceModel
from tests.http_server import ServerProcess, events, texts

QUESTIONS = ("What is 12 + 30?", "Name three colours.", "Say hello in Japanese.", "Write a short poem on rain.")
MULTI_BYTE = (
    "Emoji: 😀 😃 😄 😁 😆 😅 🤣 😂 🙂",
    "こんにちは。今日は天気がいいですね。",
    "Привет! Как дела? Сегодня хорошая",
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> ReferenceModel:
    return ReferenceModel(smollm2)


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def test_it_finds_its_sentinels_by_itself(real_server: ServerProcess, tokenizer: Any) -> None:
    line = next(line for line in real_server.log.read_text().splitlines() if "sentinels:" in line)
    assert "special tokens that nothing uses" in line
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    named = [token.content for token in tokenizer.added_tokens_decoder.values() if f"({token.content})" in line]
    assert len(named) == 2
    assert not used & set(named)


def test_log_probs_are_those_of_transformers_with_erasures_too(
    real_server: ServerProcess, tokenizer: Any, reference: ReferenceModel
) -> None:
    groups = [
        {"prompt_id": question, "prompt_token_ids": chat_ids(tokenizer, question), "n": 2, "seed": 7 * number}
        for number, question in enumerate(QUESTIONS)
    ]
    answer = real_server.post(
        "/v1/rollouts",
        groups=groups,
        max_tokens=48,
        temperature=0.8,
        erasure={
            "segmentation": {"mode": "delimiter", "delimiter": "\n", "max_length": 12},
            "threshold": 0.6,
            "max_erasures": 2,
        },
    )
    assert answer.status_code == 200, answer.text
    responses = [Trajectory.model_validate_json(line) for line in answer.text.splitlines()]
    assert len(responses) == 2 * len(QUESTIONS)
    worst = 0.0
    for response in responses:
        prompt, tokens = response.prompt_token_ids, response.token_ids
        for temperature, seen in ((1.0, response.logprobs), (0.8, response.behaviour_logprobs)):
            expected = reference.logprobs(prompt, tokens, temperature)
            worst = max(worst, (torch.tensor(seen, dtype=torch.float64) - expected).abs().max().item())
    count = sum(len(response.token_ids) for response in responses)
    erased = sum(attempt.verdict == "erased" for response in responses for attempt in response.attempts)
    print(f"\nlargest difference of a log-prob: {worst:.1e} ({count} tokens, {erased} erasures)")
    assert erased >= len(QUESTIONS)
    assert worst < 1e-4


@pytest.mark.parametrize("prompt", MULTI_BYTE)
def test_streams_of_multi_byte_text_are_the_whole_answer(
    real_server: ServerProcess, tokenizer: Any, prompt: str
) -> None:
    request: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": 28,
        "n": 2,
        "seed": 11,
        "temperature": 0.9,
        "ignore_eos": True,
        "return_token_ids": True,
        "erasure": {"segmentation": {"mode": "fixed", "length": 7}, "threshold": 2.0, "max_erasures": 1},
    }
    choices = real_server.complete(**request)["choices"]
    assert sum(not character.isascii() for choice in choices for character in choice["text"]) >= 8
    # Some characters are cut by a token's end.
    assert any("\ufffd" in tokenizer.decode([token]) for choice in choices for token in choice["token_ids"])
    assert sum(choice["erasure"]["erased_tokens"] for choice in choices) > 0
    for mode in ("commit", "live"):
        streamed = {**request, "stream": True, "erasure": {**request["erasure"], "stream": mode}}
        answer = real_server.post("/v1/completions", **streamed)
        chunks = list(events(iter(answer.text.split("\n"))))
        assert texts(chunks, len(choices)) == [choice["text"] for choice in choices], mode


def test_by_default_a_stream_flows_by_lines_and_sentences(real_server: ServerProcess, tokenizer: Any) -> None:
    answer = real_server.post(
        "/v1/completions",
        prompt="The history of the bicycle is long.",
        max_tokens=96,
        seed=2,
        temperature=0.7,
        stream=True,
    )
    chunks = list(events(iter(answer.text.split("\n"))))
    assert sum(bool(chunk["choices"][0]["text"]) for chunk in chunks) >= 3
    reports = [choice["erasure"] for chunk in chunks for choice in chunk["choices"] if choice.get("erasure")]
    (segments,) = (report["segments"] for report in reports if report["event"] == "finish")
    known = token_bytes(tokenizer)
    for segment in segments:
        texts = [known[token] for token in segment["token_ids"]]
        ended = segment_length(texts, TEXT_SEGMENTS, 96 - segment["start"])
        assert ended == len(texts) or (ended is None and segment is segments[-1])
    assert sum(len(segment["token_ids"]) < 128 for segment in segments) >= 3


def test_chat_through_the_openai_client_follows_the_models_template(
    real_server: ServerProcess, tokenizer: Any, reference: ReferenceModel
) -> None:
    client = openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0)
    question = "What is the capital of France?"
    answer = client.chat.completions.create(
        model=real_server.model,
        messages=[{"role": "user", "content": question}],
        temperature=0.0,
        max_completion_tokens=24,
        extra_body={"return_token_ids": True, "erasure": {"enabled": False}},
    )
    prompt = chat_ids(tokenizer, question)
    assert (answer.model_extra or {})["prompt_token_ids"] == prompt
    choice = answer.choices[0]
    generated = reference.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :]
    assert (choice.model_extra or {})["token_ids"] == generated.tolist()
    assert choice.message.content == tokenizer.decode(generated, skip_special_tokens=True)
    assert "Paris" in choice.message.content
