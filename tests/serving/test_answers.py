"""What is answered: the same text as offline, whole and streamed, in OpenAI's shapes."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from served import Served

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
