"""A text's tokens do not depend on what else is in a pass, on the layout or on where the weights come from: fp32, real
layers, real ranks. With keys and values kept of all positions, passes are those without."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from ranks import run_ranks

from illada_megatron.generation import Generator, Settings, engine
from illada_megatron.generation.layers import LayerModel
from illada_megatron.generation.model import Part
from illada_megatron.model.row_products import take_row_products

VOCABULARY = 1200
SETTINGS = (
    Settings(gen_length=24, block_length=8, steps=4),
    Settings(gen_length=20, block_length=8, reveal="threshold", threshold=0.02, remasking="margin"),
    Settings(gen_length=24, block_length=12, steps=6, temperature=0.7, top_p=0.9, seed=3),
    Settings(gen_length=16, block_length=16, steps=8, guidance=0.5, fixed_length=True),
    Settings(gen_length=24, block_length=8, steps=8, cache="prefix", fixed_length=True),
    Settings(gen_length=24, block_length=8, steps=8, cache="dual", guidance=1.0),
    Settings(gen_length=24, block_length=8, steps=8, cache="vicinity", fixed_length=True),
    Settings(gen_length=24, block_length=8, steps=8, cache="delayed", cache_refresh=3),
)


def prompts(count: int) -> list[list[int]]:
    """Of 1 to 90 tokens."""
    lengths = [1 + (37 * number) % 90 for number in range(count)]
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def generated(path: Path, source: str, batches: list[list[int]], **options: Any) -> list[list[int]]:
    """Tokens of 32 texts with all settings in turn, in batches of these numbers."""
    texts = prompts(32)
    with Generator.open(path / source, "cpu", path / "tokenizer.json", **options) as generator:
        found: dict[int, list[int]] = {}
        for batch in batches:
            settings = [SETTINGS[number % len(SETTINGS)] for number in batch]
            results = generator.generate([texts[number] for number in batch], settings)
            found |= {number: one.tokens.tolist() for number, one in zip(batch, results, strict=True)}
    return [found[number] for number in sorted(found)]


ALL = list(range(32))


@pytest.fixture(scope="module")
def alone(place: Path) -> list[list[int]]:
    return generated(place, "run", [[number] for number in ALL])


def test_batches_of_8_and_32_give_what_each_text_gives_alone(place: Path, alone: list[list[int]]) -> None:
    assert generated(place, "run", [ALL]) == alone
    assert generated(place, "run", [ALL[first::4] for first in range(4)]) == alone
    assert len({tuple(tokens) for tokens in alone}) == 32


def test_a_hugging_face_directory_gives_the_same(place: Path, alone: list[list[int]]) -> None:
    assert generated(place, "hf", [ALL]) == alone


def _rank(rank: int, path: str, source: str, pipeline: int) -> None:
    found = generated(Path(path), source, [ALL], pipeline=pipeline)
    (Path(path) / f"{source}_{pipeline}_{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize(("source", "ranks", "pipeline"), [("run", 2, 1), ("hf", 2, 2)])
def test_two_ranks_give_the_same(source: str, ranks: int, pipeline: int, place: Path, alone: list[list[int]]) -> None:
    """Every rank has the results."""
    run_ranks(_rank, ranks, str(place), source, pipeline)
    for rank in range(ranks):
        assert json.loads((place / f"{source}_{pipeline}_{rank}.json").read_text()) == alone


@pytest.fixture
def generator(place: Path) -> Iterator[Generator]:
    with Generator.open(place / "run", "cpu", place / "tokenizer.json") as opened:
        yield opened


def test_rows_do_not_depend_on_other_parts(generator: Generator) -> None:
    """Bit for bit, whatever number of rows the matrix products have."""
    assert generator.model.rows_alone is None
    kept = [generator.model.keep(100) for _ in range(4)]
    parts = [Part(torch.tensor(ids), torch.arange(min(len(ids), 5))) for ids in prompts(24)]
    for number, one in zip((0, 3, 10, 23), kept, strict=True):
        parts[number] = replace(parts[number], kept=one, length=parts[number].tokens.numel())
    together = generator.model.logits(parts)
    assert torch.equal(together, torch.cat([generator.model.logits([part]) for part in parts]))
    for one in kept:
        generator.model.forget(one)


def test_all_positions_computed_over_kept_keys_are_a_pass_without(generator: Generator) -> None:
    (tokens,) = (torch.tensor(ids) for ids in prompts(3)[2:])
    whole, wanted = torch.arange(tokens.numel()), torch.tensor([0, 7, 30])
    kept = generator.model.keep(100)
    expected = generator.model.logits([Part(tokens, wanted)])
    first = generator.model.logits([Part(tokens, wanted, None, kept, tokens.numel())])
    again = generator.model.logits([Part(tokens, wanted, whole, kept, tokens.numel())])
    some = generator.model.logits([Part(tokens[wanted], torch.arange(3), wanted, kept, tokens.numel())])
    generator.model.forget(kept)
    assert torch.equal(first, expected)
    for found in (again, some):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_stale_keys_are_used(generator: Generator) -> None:
    """What the caches save: the keys of a token that has changed are those of before where it is not computed."""
    (tokens,) = (torch.tensor(ids) for ids in prompts(3)[2:])
    wanted, kept = torch.tensor([7]), generator.model.keep(100)
    before = generator.model.logits([Part(tokens, wanted, None, kept, tokens.numel())])
    changed = tokens.clone()
    changed[20] = 9
    stale = generator.model.logits([Part(changed[wanted], torch.tensor([0]), wanted, kept, tokens.numel())])
    torch.testing.assert_close(stale, before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(generator.model.logits([Part(changed, wanted)]), before, atol=1e-3)


def test_a_stream_is_what_generate_gives(generator: Generator) -> None:
    prompt, settings = prompts(2)[1], replace(SETTINGS[0], reveal="factor")
    steps = list(generator.stream(prompt, settings))
    result = generator.result(*steps[-1])
    assert result.tokens.tolist() == generator.generate([prompt], settings)[0].tokens.tolist()
    assert sum(step.positions.numel() for _, step in steps) == settings.gen_length
    assert result.finish == "length"


def test_a_stream_that_is_closed_leaves_nothing(generator: Generator) -> None:
    stream = generator.stream(prompts(1)[0], SETTINGS[4])
    next(stream)
    assert len(generator.model._kept) == 1
    stream.close()
    assert len(generator.model._kept) == 0


def test_a_call_that_fails_leaves_nothing(generator: Generator) -> None:
    bad = replace(SETTINGS[4], end_think_boost=1.0)
    generator.words = replace(generator.words, end_think=())
    with pytest.raises(ValueError, match="spells </think>"):
        generator.generate(prompts(2), [SETTINGS[4], bad])
    assert not generator.model._kept


def test_two_streams_in_turn_have_their_own_steps(generator: Generator) -> None:
    texts = prompts(2)
    streams = [generator.stream(text, one) for text, one in zip(texts, SETTINGS[:2], strict=True)]
    last = {}
    for number in [0, 1] * 40:
        for job, step in [next(streams[number], (None, None))]:
            if job is not None:
                last[number] = (job, step)
    for number in (0, 1):
        (expected,) = generator.generate([texts[number]], SETTINGS[number])
        assert generator.result(*last[number]).tokens.tolist() == expected.tokens.tolist()


def _failing_rank(rank: int, path: str) -> None:
    texts, settings = prompts(3), SETTINGS[0]
    with Generator.open(Path(path) / "run", "cpu", Path(path) / "tokenizer.json") as generator:
        before = [one.tokens.tolist() for one in generator.generate(texts, settings)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "propose", _out_of_memory)  # on rank 0 alone, between two passes
            with pytest.raises(MemoryError if rank == 0 else RuntimeError, match="as it happens"):
                generator.generate(texts, SETTINGS[4])
        with pytest.raises(ValueError, match="outside of the model's 1200"):
            generator.generate([[VOCABULARY]], settings)
        if rank == 0:
            stream = generator.stream(texts[0], settings)
            next(stream)
            with pytest.raises(ValueError, match="a stream of this generator is open"):
                generator.generate(texts, settings)
            stream.close()
        else:
            assert list(generator.stream(texts[0], settings)) == []
        assert [one.tokens.tolist() for one in generator.generate(texts, settings)] == before
        assert not generator.model._kept
        if rank == 0:  # in the middle of a pass the others wait for what will not come: never again with these ranks
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(generator.model, "_pass", _out_of_memory)
                with pytest.raises(MemoryError):
                    generator.generate(texts, settings)
            with pytest.raises(RuntimeError, match=r"left in the middle of a pass \(MemoryError: as it happens\)"):
                generator.generate(texts, settings)
            os._exit(0)
        with pytest.raises(RuntimeError):  # its connection is lost
            generator.generate(texts, settings)
        os._exit(0)


def _out_of_memory(*_: Any) -> None:
    raise MemoryError("as it happens")


def test_an_error_on_one_rank_reaches_the_others(place: Path) -> None:
    run_ranks(_failing_rank, 2, str(place))


def test_sequence_parallel_layers_keep_their_own_product(generator: Generator) -> None:
    """Of their input a rank has some rows, which megatron-core gathers in the product that would be replaced."""
    assert isinstance(generator.model, LayerModel)
    stage = generator.model._stage
    layers = [module for module in stage.modules() if isinstance(module, ColumnParallelLinear)]
    own = object()
    for layer in layers:
        layer._forward_impl = own
    layers[-1].sequence_parallel = True
    assert "sequence parallel" in (take_row_products(stage, torch.device("cpu")) or "")
    assert all(layer._forward_impl is own for layer in layers)
