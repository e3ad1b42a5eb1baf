"""What is answered: the same text as offline, whole and streamed, in OpenAI's shapes."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from served import Served, Serving

from illada_megatron.data.tokenizers.tokenizer import load_tokenizer
from illada_megatron.generation import Generator, Settings

PROMPTS = ["def main(", "the ß of 漢字", "", "x" * 70, "import 🙂\n\n", "0\x00\x01"]
BASE: dict[str, Any] = {"gen_length": 32, "block_length": 8, "steps": 8}
CHOICES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"reveal": "threshold", "threshold": 0.3, "cache": "prefix"},
    {"temperature": 0.7, "top_p": 0.9, "seed": 3, "cache": "dual", "eos": "never"},
    {"gen_length": 5, "block_length": 2, "steps": 2, "remasking": "random", "seed": 11},
    {"temperature": 1.5, "seed": 5, "stop": ["a", "e "], "gen_length": 64},
    {"temperature": 1.5, "seed": 6, "stop": "th", "guidance": 0.5, "fixed_length": True},
    {"temperature": 1.5, "seed": 8, "eos": "last", "repetition_penalty": 1.3, "block_length": None},
    {"temperature": 5.0, "seed": 9, "gen_length": 384, "block_length": 32, "steps": 2},
]


def offline(generator: Generator, prompt: str, chosen: dict[str, Any]) -> Any:
    (result,) = generator.generate([generator.tokenizer.encode(prompt)], Settings(**{**BASE, **chosen}))
    return result


def asked(served: Served, prompt: str, chosen: dict[str, Any], stream: bool) -> tuple[str, str]:
    """The text, and why it ended."""
    done = served.client().completions.create(model="tiny", prompt=prompt, stream=stream, extra_body=chosen)
    if not stream:
        return done.choices[0].text, done.choices[0].finish_reason
    chunks = [chunk.choices[0] for chunk in done]
    reasons = [chunk.finish_reason for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    return "".join(chunk.text for chunk in chunks), reasons[-1]


def test_64_clients_get_what_offline_generation_gives(served: Served, generator: Generator) -> None:
    cases = [(prompt, chosen, stream) for prompt in PROMPTS for chosen in CHOICES for stream in (False, True)]
    random.Random(0).shuffle(cases)
    expected = {
        (prompt, number): offline(generator, prompt, chosen)
        for prompt in PROMPTS
        for number, chosen in enumerate(CHOICES)
    }
    assert {result.finish for result in expected.values()} == {"length", "stop", "eos"}
    with ThreadPoolExecutor(64) as clients:
        found = list(clients.map(lambda case: asked(served, *case), cases))
    for (prompt, chosen, _), (text, reason) in zip(cases, found, strict=True):
        result = expected[prompt, CHOICES.index(chosen)]
        assert text == result.text
        assert reason == ("length" if result.finish == "length" else "stop")


def test_usage_and_choices(served: Served, generator: Generator) -> None:
    chosen = {"temperature": 1.0, "seed": 7}
    prompts = ["def main(", "import "]
    done = served.client().completions.create(model="tiny", prompt=prompts, n=2, max_tokens=12, extra_body=chosen)
    lengths = [len(generator.tokenizer.encode(prompt)) for prompt in prompts]
    assert done.usage.prompt_tokens == sum(lengths)
    assert done.usage.completion_tokens == 4 * 12
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    for number, choice in enumerate(done.choices):
        own = {**chosen, "gen_length": 12, "seed": 7 + number % 2}
        assert choice.text == offline(generator, prompts[number // 2], own).text
        assert choice.illada["seed"] == own["seed"]


def test_a_seed_is_drawn_and_told(served: Served, generator: Generator) -> None:
    client = served.client()
    texts = [client.completions.create(model="tiny", prompt="a", temperature=1.0).choices[0] for _ in range(3)]
    assert len({choice.text for choice in texts}) == 3
    again = offline(generator, "a", {"temperature": 1.0, "seed": texts[0].illada["seed"]})
    assert again.text == texts[0].text


def test_a_stream_has_every_step(served: Served, generator: Generator) -> None:
    result = offline(generator, "def main(", {"gen_length": 20})
    stream = served.client().completions.create(
        model="tiny", prompt="def main(", max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = list(stream)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert (usage.choices, usage.usage.completion_tokens) == ([], 20)
    own = [chunk.choices[0].illada for chunk in chunks]
    assert own[0]["prompt_tokens"] == result.prompt_tokens
    tokens, order = result.tokens.clone(), result.order.clone()
    tokens[result.prompt_tokens :] = 5
    for step in (step for one in own[1:-1] for step in one["steps"]):
        for position, token, confidence in zip(step["positions"], step["tokens"], step["confidence"], strict=True):
            tokens[position] = token
            assert order[position] == step["number"]
            assert confidence == pytest.approx(float(result.confidence[position]), abs=1e-6)
    assert tokens.tolist() == result.tokens.tolist()
    assert own[-1]["finish"] == "length"
    assert (own[-1]["step_count"], own[-1]["computed_positions"]) == (result.steps, result.computed)


@pytest.mark.parametrize("stream", [False, True])
def test_a_pattern_of_a_stranger(stream: bool, served: Served, generator: Generator) -> None:
    """RE2 finds what `re` does, and does not run for ever on what would make that."""
    chosen = {"temperature": 1.5, "seed": 5, "gen_length": 64}
    pattern = "[a-c].?[d-z]|[a-z]{3}"
    result = offline(generator, "def", {**chosen, "stop_pattern": pattern})
    assert result.finish == "stop"
    assert asked(served, "def", {**chosen, "stop_pattern": pattern}, stream) == (result.text, "stop")
    whole = offline(generator, "def", chosen)
    assert asked(served, "def", {**chosen, "stop_pattern": "(([a-z]|.)*)*$^!!"}, stream)[0] == whole.text


def test_chat_is_what_the_template_writes(served: Served, generator: Generator) -> None:
    written = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = load_tokenizer(generator.tokenizer_path, special_tokens=True).encode(written)
    assert ids.count(3) == 3, "special tokens are tokens"
    (result,) = generator.generate([ids], Settings(**{**BASE, "gen_length": 24}))
    parts = [{"type": "text", "text": "Hi"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    client = served.client()
    done = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=24)
    assert done.choices[0].message.content == result.text
    assert done.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == result.text


def test_a_second_turn(served: Served, generator: Generator) -> None:
    """As OpenAI's client sends an answer back, and as it writes out what it lacks."""
    client = served.client()
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices[0].message
    again = {"role": "user", "content": "more", "name": None}
    contents = []
    for sent_back in (answer, {**answer.to_dict(), "annotations": [], "tool_calls": None, "audio": None}):
        done = client.chat.completions.create(model="tiny", messages=[*messages, sent_back, again], max_tokens=8)
        contents.append(done.choices[0].message.content)
    written = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{answer.content}<|im_end|>\n"
    written += "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    ids = load_tokenizer(generator.tokenizer_path, special_tokens=True).encode(written)
    (result,) = generator.generate([ids], Settings(**{**BASE, "gen_length": 8}))
    assert contents == [result.text] * 2


def test_what_clients_always_send(served: Served, generator: Generator) -> None:
    """top_p and top_k where nothing is sampled; a block_length shorter than the steps that nobody gave."""
    chosen = {"temperature": 0, "top_p": 0.9, "top_k": 40}
    assert asked(served, "def", chosen, False)[0] == offline(generator, "def", {}).text
    short = {"block_length": 4}
    assert asked(served, "def", short, False)[0] == offline(generator, "def", {**short, "steps": 4}).text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_its_turn(stream: bool, serving: Serving, computed: Any, generator: Generator) -> None:
    def predict(tokens: torch.Tensor) -> torch.Tensor:
        """Letters, and at every tenth place the end of the turn."""
        logits = torch.zeros(*tokens.shape, 400)
        logits[..., 80] = 9.0
        logits[:, ::10, 4] = 20.0
        return logits

    model = computed(predict)
    model.tokenizer_path = generator.tokenizer_path
    with serving(model) as server:
        messages = [{"role": "user", "content": "Hi"}]
        done = server.client().chat.completions.create(model="tiny", messages=messages, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in done]
            text, reason = "".join(chunk.delta.content for chunk in chunks), chunks[-1].finish_reason
        else:
            text, reason = done.choices[0].message.content, done.choices[0].finish_reason
    assert reason == "stop"
    assert text == "k" * len(text)
    assert len(text) < 10


def test_without_a_template_there_is_no_chat(serving: Serving, computed: Any) -> None:
    with serving(computed(lambda tokens: tokens)) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="this server has no chat, ask /v1/completions"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])


def test_gaps(served: Served, generator: Generator) -> None:
    prompt = "for <mask:3> in\n<mask:2>:"
    (result,) = generator.generate([prompt], Settings(**BASE))
    with served.http() as http:
        done = http.post("/v1/infill", json={"prompt": prompt}).json()
        lines = http.post("/v1/infill", json={"prompt": prompt, "stream": True}).text.split("\n\n")
    assert done["object"] == "infill"
    assert done["choices"][0]["text"] == result.text
    assert done["usage"]["completion_tokens"] == 5
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == result.text
    given = events[0]["choices"][0]["illada"]["given"]
    assert [place for place, one in enumerate(given) if one is None] == (result.order >= 0).nonzero().flatten().tolist()


def test_models_and_metrics(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "illada-megatron"
    client.completions.create(model="tiny", prompt="a", max_tokens=3)
    with served.http() as http:
        text = http.get("/metrics").text
        paths = http.get("/openapi.json").json()["paths"]
        assert http.get("/docs").status_code == 404
    assert {"/v1/completions", "/v1/chat/completions", "/v1/infill"} <= paths.keys()
    for name in ("illada_generated_tokens_total", "illada_computed_positions_total", "illada_step_seconds_count"):
        (value,) = [float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")]
        assert value >= 3 if "tokens" in name else value > 0
    assert 'illada_requests_total{path="/v1/completions",status="200"}' in text
