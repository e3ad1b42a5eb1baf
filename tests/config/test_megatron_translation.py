"""`illada translate`: which configuration a command line of Megatron-LM's becomes, and what is said of the rest."""

import importlib.util
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from megatron_commands import REFUSED, TRANSLATED

from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.config.field_names import field_paths
from illada_megatron.config.megatron_names import OPTIONS, find_option
from illada_megatron.config.megatron_options import read_options
from illada_megatron.config.megatron_script import read_script
from illada_megatron.config.megatron_translation import Translation, Vocabulary, translate
from illada_megatron.training.schedule import LearningRate, samples_of_run

ROOT = Path(__file__).parents[2]


def _translated(line: str, vocabulary: Vocabulary | None = None) -> tuple[Translation, RunConfig]:
    done = translate(read_options(read_script(line).commands[-1]), vocabulary)
    return done, load_config(yaml.safe_load(done.yaml()))


@pytest.mark.parametrize("case", TRANSLATED)
def test_command_line_becomes_a_configuration(case: str) -> None:
    line, fields, said = TRANSLATED[case]
    done, config = _translated(line)
    for path, value in fields.items():
        found = attrgetter(path)(config)
        if path == "data.blend":
            found = [(entry.name, entry.weight) for entry in found]
        assert found == value, path
    notes = "\n".join(note for group in done.notes.values() for note in group)
    for words in said:
        assert words in notes


@pytest.mark.parametrize("case", REFUSED)
def test_command_line_that_becomes_none(case: str) -> None:
    line, said = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        _translated(line)
    for words in said:
        assert words in str(error.value)


def test_nothing_is_lost_without_a_word() -> None:
    """Each option of a command line is a field, or is said."""
    harmless = {"--expert-model-parallel-size 1", "--context-parallel-size 1", "--optimizer adam"}
    for line, _, _ in TRANSLATED.values():
        done, _ = _translated(line)
        notes = "\n".join(note for group in done.notes.values() for note in group)
        words = read_script(line).commands[-1]
        for place, word in enumerate(words):
            option = find_option(word) if word.startswith("--") else None
            if option is not None and option.field is None and " ".join(words[place : place + 2]) not in harmless:
                assert word in notes, line


def test_a_ramp_up_takes_as_many_samples() -> None:
    """Numbers of samples become steps by the arithmetic that the run itself has."""
    _, config = _translated(TRANSLATED["175B with a ramp-up"][0])
    samples = samples_of_run(config.training, 0, 0)
    assert 146484375 - 1536 < samples <= 146484375


def test_the_rate_is_megatrons() -> None:
    """optimizer_param_scheduler.py: linear to lr, a cosine from the warm-up's end to lr_decay_iters, min_lr."""
    _, config = _translated(TRANSLATED["345M of the README"][0])
    planned = LearningRate(config)

    def rate(step: int) -> float:
        return planned.at(step, step * config.training.global_batch_size)

    assert rate(3199) == pytest.approx(1.5e-4)
    assert rate(3200 + 316800 // 2 - 1) == pytest.approx((1.5e-4 + 1e-5) / 2)
    assert rate(320000) == rate(499999) == pytest.approx(1e-5)


def test_a_tokenizer_with_a_mask_is_taken_as_it_is() -> None:
    done, config = _translated(TRANSLATED["blend"][0], Vocabulary(32000, 5))
    assert (config.model.vocab_size, config.model.mask_token_id) == (32000, 5)
    assert not any("mask_token_id" in note for note in done.notes["to be completed"])


@pytest.mark.parametrize("field", ["qk_layernorm", "rope_scaling"])
def test_a_field_that_the_schema_may_have(field: str) -> None:
    """Set where it is there, else said."""
    option = {"qk_layernorm": "--qk-layernorm", "rope_scaling": "--use-rope-scaling"}[field]
    done, config = _translated(TRANSLATED["Llama 3.1's frequencies"][0])
    said = any(note.startswith(option) for note in done.notes["not supported"])
    assert bool(getattr(config.model, field, None)) != said


def test_fields_of_the_table_are_fields() -> None:
    for option in OPTIONS:
        if option.field not in (None, "model"):
            assert option.field in field_paths(), option.name


def test_names_stand_once() -> None:
    names = [option.name for option in OPTIONS]
    assert len(set(names)) == len(names)


def test_the_page_is_of_todays_table() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "write_from_megatron.py")
    assert spec
    assert spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text().partition(page.MARK)[2] == page.tables(), "run python docs/write_from_megatron.py"
