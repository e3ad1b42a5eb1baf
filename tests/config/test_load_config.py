"""Text to configuration: typos and wrong types are named, files build on files, what is saved reads back equal."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from illada_megatron.config import ConfigError, RunConfig, load_config, preset_names, save_config
from illada_megatron.config.load import to_yaml
from illada_megatron.diffusion.noise import uniforms

# override -> parts of the message
MISTAKES = {
    "typo": ("training.leraning_rate=1", ["training.leraning_rate: unknown field"]),
    "near miss": ("training.global_batchsize=4", ["global_batchsize: unknown field; did you mean global_batch_size?"]),
    "section": ("trainig.lr=1e-3", ["trainig: unknown field; did you mean training?"]),
    "nothing near": ("logging.zzz=1", ["logging.zzz: unknown field; known: tensorboard_dir, interval_steps"]),
    "text for a number": ("training.lr=fast", ["training.lr", "found 'fast'"]),
    "quoted number": ("training.train_steps='8'", ["training.train_steps", "found '8'"]),
    "fraction of a step": ("training.train_steps=1.5", ["training.train_steps", "found 1.5"]),
    "zero": ("training.micro_batch_size=0", ["training.micro_batch_size", "greater than 0", "found 0"]),
    "negative": ("optimizer.weight_decay=-0.1", ["optimizer.weight_decay", "found -0.1"]),
    "seed of 65 bits": (
        f"training.seed={2**64}",
        ["training.seed", "less than 18446744073709551616", f"found {2**64}"],
    ),
    "validation's": (f"validation.seed={2**64}", ["validation.seed", "less than 18446744073709551616"]),
    "negative seed": ("training.seed=-1", ["training.seed", "greater than or equal to 0", "found -1"]),
    "probability": ("diffusion.split_probability=1.1", ["diffusion.split_probability", "found 1.1"]),
    "choice": ("training.precision=fp16", ["training.precision", "'fp32', 'bf16' or 'fp8'", "found 'fp16'"]),
    "path for a list": ("data.train_paths=corpus", ["data.train_paths", "list", "found 'corpus'"]),
    "yes for a bool": ("parallel.sequence_parallel=1", ["parallel.sequence_parallel", "found 1"]),
    "decay start": ("schedule.decay_start=soon", ["schedule.decay_start", "found 'soon'"]),
    "decay fraction": ("schedule.decay_start=1.5", ["schedule.decay_start", "found 1.5"]),
    "ramp-up of two": ("training.rampup_batch_size=[2,2]", ["training.rampup_batch_size"]),
    "name of a checkpoint": ("checkpoint.save_dir=runs/step_1/", ["checkpoint", "runs/step_1/ is named like one"]),
    "section as value": ("training=5", ["training", "found 5"]),
    "field of another section": ("optimizer.lr=1", ["optimizer.lr: unknown field; did you mean training.lr?"]),
    "field of no section": (
        "tensor_model_parallel_size=2",
        ["unknown field; did you mean parallel.tensor_model_parallel_size?"],
    ),
    "field of several sections": (
        "interval_steps=2",
        ["did you mean validation.interval_steps, checkpoint.interval_steps or logging.interval_steps?"],
    ),
    "near one of Megatron's": (
        "checkpoint.save_intervall=8",
        ["did you mean save_interval? Megatron's --save-interval is checkpoint.interval_steps here"],
    ),
    "near one of transformers'": ("training.max_step=8", ["did you mean max_steps? here it is training.train_steps"]),
    "near a field of another section": ("optimizer.sequence_lenght=8", ["did you mean data.sequence_length?"]),
    "Megatron's": ("checkpoint.save_interval=5", ["Megatron's --save-interval is checkpoint.interval_steps here"]),
    "Megatron's, at the top": ("seq_length=5", ["Megatron's --seq-length is data.sequence_length here"]),
    "Megatron's in the wrong place": ("model.seq_length=5", ["Megatron's --seq-length is data.sequence_length here"]),
    "Megatron's split": ("data.split='9,1,0'", ["Megatron's --split is data.holdout_tokens here: of each corpus"]),
    "Megatron's, not here": (
        "parallel.expert_model_parallel_size=2",
        ["Megatron's --expert-model-parallel-size is not supported: no experts"],
    ),
    "Megatron's, always so": ("model.swiglu=true", ["Megatron's --swiglu has no field here: always so"]),
    "Hugging Face's": ("model.num_hidden_layers=4", ["unknown field; here it is model.num_layers"]),
    "Hugging Face's intermediate size": ("model.intermediate_size=4", ["here it is model.ffn_hidden_size"]),
    "Hugging Face's rope_theta": ("model.rope_theta=1e4", ["here it is model.rotary_base"]),
    "TrainingArguments'": ("training.learning_rate=1", ["here it is training.lr"]),
    "TrainingArguments' batch": (
        "training.per_device_train_batch_size=1",
        ["here it is training.micro_batch_size"],
    ),
    "TrainingArguments' accumulation": ("gradient_accumulation_steps=2", ["set training.global_batch_size = "]),
    "weights among paths": (
        "data.train_paths=['0.3','x/a','0.7','b']",
        [
            "train_paths has numbers among its paths",
            "write 'data.blend=[{name: a, paths: [x/a], weight: 0.3}, {name: b, paths: [b], weight: 0.7}]' instead",
        ],
    ),
    "weights of no path": ("data.train_paths=[a,'0.7']", ["weights belong to data.blend; write paths alone"]),
    "weights of validation": ("data.validation_paths=['1',a]", ["validation_paths has numbers among its paths"]),
    "no equals sign": ("training.lr", ["override 'training.lr': expected section.field=value"]),
}


def test_the_largest_seed_is_one_of_the_noise_too() -> None:
    """What the configuration lets pass must not raise in the first step."""
    config = load_config("tiny", [f"training.seed={2**64 - 1}"])
    assert uniforms(config.training.seed, "test", 0, 3).shape == (3,)


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_named(case: str) -> None:
    override, parts = MISTAKES[case]
    with pytest.raises(ConfigError) as error:
        load_config("tiny", [override])
    for part in parts:
        assert part in str(error.value)


def test_the_blend_that_is_proposed_is_one() -> None:
    with pytest.raises(ConfigError) as error:
        load_config("tiny", ["data.train_paths=['0.3','x/a','0.7','b']"])
    proposed = re.search(r"'(data\.blend=.*)'", str(error.value))
    assert proposed
    blend = load_config("tiny", [proposed[1]]).data.blend
    assert [(entry.name, entry.paths, entry.weight) for entry in blend] == [("a", ["x/a"], 0.3), ("b", ["b"], 0.7)]


def test_whose_mistake_it_is(tmp_path: Path) -> None:
    """A wrong override is not the file's, nor a wrong file the override's."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("model: {vocab_size: 100}\n")
    bad.write_text("training: {lr: high}\n")
    for file, overrides, blamed in (
        (good, ["training.lr=fast"], "override 'training.lr=fast': training.lr: "),
        (good, ["training.lr=1", "trainig.lr=2"], "override 'trainig.lr=2': trainig: unknown field"),
        (good, ["model.mask_token_id=100"], f"{good} with model.mask_token_id=100: model: mask_token_id 100"),
        (good, ["parallel.sequence_parallel=true"], f"{good} with parallel.sequence_parallel=true: parallel."),
        (good, ["training.lr=[1"], "override 'training.lr=[1': "),
        (bad, ["training.seed=1"], f"{bad}: training.lr: "),
        (bad, ["training.lr=low"], "override 'training.lr=low': training.lr: "),
        (bad, ["training.seed=x"], f"{bad}: training.lr: "),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(file, overrides)
        assert str(error.value).startswith(blamed)
        if blamed.startswith("override"):
            assert str(file) not in str(error.value)
    with pytest.raises(ConfigError) as error:
        load_config(bad, ["training.seed=x"])
    assert "override 'training.seed=x': training.seed: " in str(error.value)


def test_all_mistakes_are_named_at_once_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {lr: no, train_step: 5}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "training.lr" in str(error.value)
    assert "training.train_step: unknown field; did you mean train_steps?" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: 1", "line 1"),
        ("- a\n- b\n", "expected sections with fields, found a list"),
        ("training: {lr: '${training.nothing}'}", "training.nothing"),
        ("base: [a]\n", "neither a file nor a preset"),
    ],
)
def test_file_that_is_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)


def test_unknown_name_lists_the_presets() -> None:
    with pytest.raises(
        ConfigError, match="ilada-8b: neither a file nor a preset; the presets are illada-1b, illada-70b, illada-8b"
    ):
        load_config("ilada-8b")


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == RunConfig() == load_config()


def test_files_build_on_files_and_overrides_go_last(tmp_path: Path) -> None:
    """Nearest wins: last override, earlier override, the file, its base, the base's base, the defaults."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "leaf.yaml").write_text("base: ../middle.yaml\ntraining: {lr: 3.0e-3}\n")
    (tmp_path / "middle.yaml").write_text("base: tiny\ntraining: {lr: 2.0e-3, seed: 2, train_steps: 22}\n")
    overrides = ["training.seed=3", "training.seed=4"]
    training = load_config(tmp_path / "deep" / "leaf.yaml", overrides).training
    assert (training.lr, training.seed, training.train_steps) == (3e-3, 4, 22)
    assert training.global_batch_size == 16  # of the preset
    assert training.exit_steps is None


def test_base_prefers_a_file_beside_it_to_a_preset(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("training: {seed: 77}\n")
    (tmp_path / "leaf.yaml").write_text("base: tiny\n")
    assert load_config(tmp_path / "leaf.yaml").training.seed == 77


def test_base_that_leads_back_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    (tmp_path / "two.yaml").write_text("base: sub/../one.yaml\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "self.yaml").write_text("base: self.yaml\n")
    for name in ("one.yaml", "self.yaml"):
        with pytest.raises(ConfigError, match="leads back to this file"):
            load_config(tmp_path / name)


@pytest.mark.parametrize("preset", preset_names())
def test_saved_preset_reads_back_equal(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    save_config(config, tmp_path / "new" / "config.yaml")
    assert load_config(tmp_path / "new" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "override",
    [
        "training.rampup_batch_size=[2,2,100]",
        "schedule.decay_start=100",
        "schedule.decay_start=0.25",
        "schedule.decay_start=plateau",
        "schedule.decay_start=0",
        "schedule.decay_start=1.0",
        "data.train_paths=[a,'b*','with space']",
        "checkpoint.save_dir=null",
        "logging.jsonl_path='null'",
        "training.lr=1e-5",
        "training.lr=1",
        "schedule.min_lr=0",
    ],
)
def test_tricky_value_reads_back_with_its_type(override: str) -> None:
    """A tuple stays one, 100 (a step) and 1.0 (a fraction) stay apart, 1e-5 is a number."""
    config = load_config(None, [override])
    again = load_config(OmegaConf.to_container(OmegaConf.create(to_yaml(config))))
    assert again == config
    section, field = override.split("=")[0].split(".")
    one, two = (getattr(getattr(c, section), field) for c in (config, again))
    assert type(one) is type(two)


def test_exponent_without_a_point_is_a_number() -> None:
    """YAML 1.1 reads 1e-3 as text; users write it."""
    assert load_config("tiny", ["training.lr=1e-3"]).training.lr == 1e-3


def test_exponent_without_a_point_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\n  lr: 1e-3\n")
    assert load_config(tmp_path / "run.yaml").training.lr == 1e-3


def test_decay_start_keeps_steps_and_fractions_apart() -> None:
    assert load_config(None, ["schedule.decay_start=1"]).schedule.decay_start == 1
    assert isinstance(load_config(None, ["schedule.decay_start=1"]).schedule.decay_start, int)
    assert isinstance(load_config(None, ["schedule.decay_start=1.0"]).schedule.decay_start, float)


SECRET = "hunter2"


@pytest.mark.parametrize(
    "text",
    [
        "checkpoint: {save_dir: '/shared/${oc.env:ILLADA_SECRET}'}",
        "checkpoint: {load_dir: 's3://evil/${oc.env:ILLADA_SECRET}'}",
        "training: {lr: '${oc.env:ILLADA_SECRET}'}",
        "base: '${oc.env:ILLADA_SECRET}'",
        "logging: {jsonl_path: 'oc.env', tensorboard_dir: '${${logging.jsonl_path}:ILLADA_SECRET}'}",
        "data: {train_paths: ['${oc.decode:${oc.env:ILLADA_SECRET}}']}",
        "data: {blend: [{name: a, paths: ['${ oc.env : ILLADA_SECRET}'], weight: 1.0}]}",
        "checkpoint: {save_dir: '${oc.select:checkpoint.load_dir,${oc.env:ILLADA_SECRET}}'}",
    ],
)
def test_the_environment_is_not_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a file from elsewhere, secrets would go to the places that it names, and into messages."""
    monkeypatch.setenv("ILLADA_SECRET", SECRET)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    (tmp_path / "leaf.yaml").write_text("base: run.yaml\n")
    for file in (path, tmp_path / "leaf.yaml"):
        with pytest.raises(ConfigError) as error:
            load_config(file)
        assert "the environment is not read; give the value as an override" in str(error.value)
        assert SECRET not in str(error.value)
    with pytest.raises(ConfigError, match="the environment is not read"):
        load_config(None, ["checkpoint.save_dir=${oc.env:ILLADA_SECRET}"])


@pytest.mark.parametrize("value", ["${oc.env:ILLADA_SECRET}", "${training.seed}", r"\${oc.env:ILLADA_SECRET}", "a${"])
def test_a_stored_configuration_is_not_resolved(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's: this program has resolved what it stores."""
    monkeypatch.setenv("ILLADA_SECRET", SECRET)
    for stored in ({"checkpoint": {"save_dir": value}}, {"data": {"train_paths": ["a", value]}}):
        with pytest.raises(ConfigError, match="nothing in it is resolved") as error:
            load_config(stored, ["training.seed=1"], source="/there/step_00000001")
        assert str(error.value).startswith("/there/step_00000001: its stored configuration has ")
        assert SECRET not in str(error.value)


def test_a_field_may_be_that_of_another(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training: {seed: 7, train_steps: '${training.seed}'}\n")
    assert load_config(tmp_path / "run.yaml").training.train_steps == 7
    assert load_config(tmp_path / "run.yaml", ["training.seed=9"]).training.train_steps == 9


@pytest.mark.parametrize("text", ["training: " + "[" * 5000, "training: {lr: 2001-99-99}", "a: " + "1" * 5000, "\x00"])
def test_a_file_that_the_library_stumbles_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: "):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(b"training: {lr: \xff}")
    with pytest.raises(ConfigError, match=r"run\.yaml: "):
        load_config(tmp_path / "run.yaml")
