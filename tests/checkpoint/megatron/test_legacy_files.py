"""Megatron's legacy files: against slices made by hand, and against what megatron-core's own optimizers save."""

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Illada
from random_checkpoint import PROGRESS, STEP, random_tensors, write_checkpoint
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.megatron.args import config_values, namespace
from illada_megatron.checkpoint.megatron.legacy_files import LegacyFile
from illada_megatron.checkpoint.tools.compare import compare
from illada_megatron.checkpoint.tools.copying import Block, LegacySink, Target
from illada_megatron.checkpoint.tools.opening import open_checkpoint
from illada_megatron.checkpoint.tools.reshard import LayoutChange, reshard
from illada_megatron.config import load_config
from illada_megatron.config.layout import pipeline_split
from illada_megatron.config.parameters import Parameter
from illada_megatron.config.pipeline_split import megatron_layout
from illada_megatron.model.rotary import scaled_frequencies

# 4 layers, grouped queries, a padded vocabulary; vectors of 32 are shorter than the buffers' alignment of 64
MODEL = (
    *("model.num_layers=4", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "model.max_sequence_length=64", "data.sequence_length=32"),
    *("training.micro_batch_size=1", "training.global_batch_size=8", "runtime.device=cpu", "runtime.num_threads=1"),
)
FP8 = ("runtime.device=auto", "model.ffn_hidden_size=64")  # a tensor parallel rank's part is a multiple of 16
# of a layer, in the order of megatron-core's modules
LOCAL = (
    *("input_layernorm.weight", "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight"),
    *("self_attention.linear_qkv.bias", "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"),
    *("pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
)
FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def _slice(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """A tensor-parallel rank's part, as Megatron's layers hold it."""
    if whole.dim() == 1 and not name.endswith("linear_qkv.bias"):
        return whole
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, dim=1)[rank]
    if name.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size)[rank]


def _stage(tensors: dict[str, Tensor], layers: list[int], first: bool, last: bool, alone: bool, prefix: str) -> dict:
    """Whole tensors of a chunk under local names (local spec), in order."""
    held = {"embedding.word_embeddings.weight": "embedding.word_embeddings.weight"} if first else {}
    for index, layer in enumerate(layers):
        held |= {f"decoder.layers.{index}.{name}": f"decoder.layers.{layer}.{name}" for name in LOCAL}
    if last:
        held["decoder.final_layernorm.weight"] = "decoder.final_layernorm.weight"
        if not alone:
            held["output_layer.weight"] = "embedding.word_embeddings.weight"
    return {local: tensors[prefix + name] for local, name in held.items() if prefix + name in tensors}


@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "distributed", "precision", "implementation", "bias"),
    [
        (1, 1, 1, True, "fp32", "local", "false"),
        (2, 1, 1, False, "bf16", "transformer_engine", "true"),
        (2, 2, 1, True, "bf16", "local", "true"),
        (1, 2, 2, False, "fp32", "local", "false"),
        (2, 4, 1, False, "bf16", "local", "true"),
        (2, 2, 2, True, "fp32", "transformer_engine", "false"),
        (2, 1, 1, False, "fp8", "local", "false"),
    ],
)
def test_files_are_megatrons_and_come_back_bit_for_bit(
    tp: int, pp: int, vpp: int, distributed: bool, precision: str, implementation: Any, bias: str, tmp_path: Path
) -> None:
    """Every weight, main weight and moment of every rank, read with plain torch.load, is the slice made by hand."""
    config = load_config(
        None,
        [
            *(*MODEL, f"training.precision={precision}", f"model.add_qkv_bias={bias}", f"model.qk_layernorm={bias}"),
            f"parallel.use_distributed_optimizer={str(distributed).lower()}",
            *(FP8 if precision == "fp8" else []),
        ],
    )
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "ours", config, tensors)
    ours = open_checkpoint(str(tmp_path / "ours"))
    change = LayoutChange(tensor=tp, pipeline=pp, virtual=vpp)
    reshard(ours, tmp_path / "legacy", change, "legacy", implementation, processes=2)

    assert (tmp_path / "legacy/latest_checkpointed_iteration.txt").read_text().strip() == str(STEP)
    layers_of_chunk = 4 // (pp * vpp)
    for stage in range(pp):
        for rank in range(tp):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            directory = tmp_path / "legacy" / f"iter_{STEP:07d}" / name
            state = torch.load(directory / "model_optim_rng.pt", weights_only=False)
            assert (state["iteration"], state["checkpoint_version"]) == (STEP, 3.0)
            assert state["args"].tensor_model_parallel_size == tp
            assert state["args"].consumed_train_samples == PROGRESS["consumed_samples"]
            chunks = []
            for chunk in range(vpp):
                begin = chunk * (4 // vpp) + stage * layers_of_chunk
                place = (
                    list(range(begin, begin + layers_of_chunk)),
                    stage == chunk == 0,
                    (stage, chunk) == (pp - 1, vpp - 1),
                    pp == 1,
                )
                chunks.append(lambda prefix="", place=place: _stage(tensors, *place, prefix))
                weights = state["model" if vpp == 1 else f"model{chunk}"]
                expected = chunks[-1]()
                fused = {
                    local: next((local.replace(new, old) for new, old in FUSED.items() if new in local), local)
                    for local in weights
                }
                assert sorted(fused.values()) == sorted(expected)
                if implementation == "local":
                    assert list(weights) == list(expected)
                else:
                    assert any("layer_norm_weight" in local for local in weights)
                for local, value in weights.items():
                    assert torch.equal(value, _slice(fused[local], expected[fused[local]], rank, tp)), local
            check = _check_distributed if distributed else _check_plain
            if implementation == "local":
                check(state["optimizer"], directory, chunks, rank, tp, pp, precision)

    assert open_checkpoint(str(tmp_path / "legacy")).kind == "legacy"
    back = reshard(open_checkpoint(str(tmp_path / "legacy")), tmp_path / "back", LayoutChange(1, 1), processes=2)
    assert back.tensors == len(tensors)
    returned = open_checkpoint(str(tmp_path / "back"))
    assert compare(ours, returned, processes=2).identical
    assert returned.info.progress == ours.info.progress
    assert returned.config == ours.config


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_moments_in_bf16_become_fp32(distributed: str, tmp_path: Path) -> None:
    """Megatron's optimizers have fp32 moments: the same numbers."""
    overrides = ["training.precision=bf16", "optimizer.moments_dtype=bf16", "optimizer.adam_beta2=0.95"]
    config = load_config(None, [*MODEL, *overrides, f"parallel.use_distributed_optimizer={distributed}"])
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "ours", config, tensors)
    change = LayoutChange(tensor=2, pipeline=2)
    reshard(open_checkpoint(str(tmp_path / "ours")), tmp_path / "legacy", change, "legacy", "local", processes=1)
    found = open_checkpoint(str(tmp_path / "legacy")).source
    for name, tensor in tensors.items():
        value = found.read(name)
        assert value.dtype == (torch.float32 if name.startswith("optimizer.") else torch.bfloat16), name
        assert torch.equal(value, tensor.to(value.dtype)), name


UNEVEN = {
    "two stages": ("parallel.pipeline_layout=Ettt|tL", LayoutChange(tensor=2, pipeline=2), [[[0, 1, 2]], [[3]]]),
    "by itself": ("parallel.pipeline_layout=auto", LayoutChange(pipeline=3), [[[0]], [[1, 2]], [[3]]]),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_stages_of_unlike_length(case: str, tmp_path: Path) -> None:
    """Layers lie under the numbers that they have in their stage, and Megatron's arguments say which they are."""
    layout, change, expected = UNEVEN[case]
    config = load_config(None, [*MODEL, "training.precision=fp32"])
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "ours", config, tensors)
    ours = open_checkpoint(str(tmp_path / "ours"))
    reshard(ours, tmp_path / "legacy", change, "legacy", "local", processes=1, overrides=[layout])
    pipeline = len(expected)
    for stage, (layers,) in enumerate(expected):
        place = tmp_path / "legacy" / f"iter_{STEP:07d}" / f"mp_rank_00_{stage:03d}"
        state = torch.load(place / "model_optim_rng.pt", weights_only=False)
        wanted = _stage(tensors, layers, stage == 0, stage == pipeline - 1, False, "")
        assert list(state["model"]) == list(wanted)
        for local, value in state["model"].items():
            assert torch.equal(value, _slice(local, wanted[local], 0, change.tensor or 1)), local
        assert state["args"].pipeline_model_parallel_layout == megatron_layout(
            [list(map(len, one)) for one in expected]
        )
    back = open_checkpoint(str(tmp_path / "legacy"))
    assert pipeline_split(back.config) == [[len(one) for one in chunks] for chunks in expected]
    reshard(back, tmp_path / "back", LayoutChange(1, 1), processes=1)
    returned = open_checkpoint(str(tmp_path / "back"))
    assert compare(ours, returned, processes=1).identical
    assert returned.config.parallel.pipeline_layout == "auto"


def test_megatrons_other_options_for_stages(tmp_path: Path) -> None:
    config = load_config(None, [*MODEL, "parallel.pipeline_model_parallel_size=2"])
    args = namespace(config, STEP, 28, "local")
    args.decoder_first_pipeline_num_layers = 1
    assert config_values(args, "here")["parallel"]["pipeline_layout"] == "Et|tttL"
    args.decoder_last_pipeline_num_layers = 2
    with pytest.raises(CheckpointError, match="4 layers cannot be divided over 2 stages"):
        config_values(args, "here")
    args.pipeline_model_parallel_layout = ["Et", "tttL"]
    with pytest.raises(CheckpointError, match="expected Megatron's notation"):
        config_values(args, "here")


def _check_plain(optimizer: Any, _: Path, chunks: list[Any], rank: int, tp: int, pp: int, precision: str) -> None:
    """Parameters are numbered through: all matrices of all chunks, then all vectors."""
    inner = optimizer if precision == "fp32" else optimizer["optimizer"]
    assert [group["step"] for group in inner["param_groups"]] == [PROGRESS["optimizer_step"]] * 2
    assert [group["wd_mult"] for group in inner["param_groups"]] == [1.0, 0.0]
    number = 0
    for group, vectors in enumerate((False, True)):
        whole = {
            state: [
                (local, value)
                for chunk in chunks
                for local, value in chunk(f"optimizer.{state}.").items()
                if (value.dim() == 1) == vectors
            ]
            for state in ("exp_avg", "exp_avg_sq", *(["main"] if precision != "fp32" else []))
        }
        assert inner["param_groups"][group]["params"] == list(range(number, number + len(whole["exp_avg"])))
        for index in range(len(whole["exp_avg"])):
            for state, entries in whole.items():
                local, value = entries[index]
                kept = optimizer["fp32_from_fp16_params"][group] if state == "main" else inner["state"]
                found = kept[index] if state == "main" else kept[number + index][state]
                assert torch.equal(found, _slice(local, value, rank, tp)), (state, local)
        number += len(whole["exp_avg"])
    assert len(inner["state"]) == number


def _check_distributed(
    optimizer: Any, directory: Path, chunks: list[Any], rank: int, tp: int, pp: int, precision: str
) -> None:
    """Flat buffers, the last parameter first; begun at multiples of 64, but behind a shared embedding at once."""
    assert [group["step"] for group in optimizer["optimizer"]["param_groups"]] == [PROGRESS["optimizer_step"]] * 2
    assert "state" not in optimizer["optimizer"]
    buffers = torch.load(directory / "distrib_optim.pt", weights_only=False)
    assert buffers["buckets_coalesced"]
    for number, chunk in enumerate(chunks):
        ((dtypes, buffer),) = buffers[number].items()
        assert dtypes == (torch.float32 if precision == "fp32" else torch.bfloat16, torch.float32)
        for key, prefix in (
            ("exp_avg", "optimizer.exp_avg."),
            ("exp_avg_sq", "optimizer.exp_avg_sq."),
            ("param", "optimizer.main." if precision != "fp32" else ""),
        ):
            expected: list[Tensor] = []
            for local, value in reversed(chunk(prefix).items()):
                part = _slice(local, value, rank, tp).reshape(-1)
                filled = sum(len(one) for one in expected)
                expected += [torch.zeros(-filled % 64), part]
            assert torch.equal(buffer[key], torch.cat(expected)), (number, key)
            assert buffer["numel_unpadded"] == len(buffer[key])


@pytest.mark.parametrize(
    "scaling",
    [
        "{rope_type: linear, factor: 3.0}",
        "{rope_type: llama3, factor: 32.0, original_max_position_embeddings: 8192, low_freq_factor: 1.0, "
        "high_freq_factor: 4.0}",
    ],
)
def test_rotary_frequencies_in_megatrons_words(scaling: str) -> None:
    """The arguments say the same frequencies, as megatron-core makes them of these arguments, and come back."""
    config = load_config(None, [*MODEL, f"model.rope_scaling={scaling}"])
    args = namespace(config, STEP, 28, "local")
    assert config_values(args, "args")["model"]["rope_scaling"] == config.model.rope_scaling.model_dump()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    theirs = RotaryEmbedding(
        kv_channels=args.kv_channels,
        rotary_percent=1.0,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        use_cpu_initialization=True,
        cp_group=object(),
    )
    positions = torch.outer(torch.arange(64).float(), scaled_frequencies(config.model, config.model.rope_scaling))
    torch.testing.assert_close(theirs.get_freqs_non_repeated(64), positions)


def test_a_scaling_that_megatron_cannot_say(tmp_path: Path) -> None:
    scaling = "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 16}"
    config = load_config(None, [*MODEL, "training.precision=fp32", f"model.rope_scaling={scaling}"])
    write_checkpoint(tmp_path / "ours", config, random_tensors(config))
    with pytest.raises(CheckpointError, match="Megatron's arguments have only linear scaling and"):
        reshard(open_checkpoint(str(tmp_path / "ours")), tmp_path / "legacy", LayoutChange(), "legacy", processes=1)
    assert not (tmp_path / "legacy").exists()


def test_main_weights_that_are_not_the_weights_are_refused(tmp_path: Path) -> None:
    """An fp32 model's stand in two files, and megatron-core takes the distributed optimizer's: as zeros, of one."""
    config = load_config(None, [*MODEL, "training.precision=fp32"])
    write_checkpoint(tmp_path / "ours", config, random_tensors(config))
    change = LayoutChange(tensor=1, pipeline=1)
    reshard(open_checkpoint(str(tmp_path / "ours")), tmp_path / "legacy", change, "legacy", "local", processes=1)
    directory = tmp_path / "legacy" / f"iter_{STEP:07d}"
    file = directory / "mp_rank_00" / "distrib_optim.pt"
    state = torch.load(file, weights_only=False)
    next(iter(state[0].values()))["param"].zero_()
    torch.save(state, file)
    (directory / "checkpoint.json").unlink()  # as Megatron leaves it, without checksums
    damaged = open_checkpoint(str(tmp_path / "legacy"), ["model.mask_token_id=5"])
    with pytest.raises(CheckpointError, match=r"distrib_optim\.pt: its copy of .* is not that of .*model_optim_rng"):
        reshard(damaged, tmp_path / "back", change, processes=1)
    assert not (tmp_path / "back").exists()


def test_a_gap_where_elements_belong_is_an_error(tmp_path: Path) -> None:
    """Files are made of zeros before they are written: what nobody writes must not stay so."""
    (tmp_path / "file.pt").write_bytes(bytes(40))
    file = LegacyFile("file.pt", ((8, 24, torch.float32),))
    parameter = Parameter("a", (4,), None)
    block = Block((0,), (4,), (Target(0, 0, None),))
    sink = LegacySink(tmp_path, [file])
    sink.write("a", parameter, block, 0, torch.ones(3))
    with pytest.raises(ValueError, match="elements end at byte 20, expected 24"):
        sink.close()
    (tmp_path / "file.pt").write_bytes(bytes(40))
    with pytest.raises(ValueError, match="tensors are missing behind byte 0"):
        LegacySink(tmp_path, [file]).close()


@pytest.mark.parametrize("function", [os.mkdir, Path.mkdir, shutil.copytree])
def test_what_a_file_names_is_not_run(function: Any, tmp_path: Path, illada: Illada) -> None:
    """Whatever it is; a checkpoint from elsewhere must not be a program."""
    marker = tmp_path / "code_ran"
    arguments = (tmp_path / "iter_0000001", marker) if function is shutil.copytree else (marker,)

    class Call:
        def __reduce__(self) -> Any:
            return function, arguments

    place = tmp_path / "iter_0000001" / "mp_rank_00"
    place.mkdir(parents=True)
    torch.save({"args": Namespace(), "checkpoint_version": 3.0, "hidden": Call()}, place / "model_optim_rng.pt")
    outcome = illada("checkpoint", "inspect", tmp_path / "iter_0000001")
    assert outcome.code == 2
    assert "lack num_layers" in outcome.err or "can be read safely" in outcome.err
    assert not marker.exists()
    torch.load(place / "model_optim_rng.pt", weights_only=False)  # the attack works on plain pickle
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_version": 2.0}, "checkpoint_version 2.0, expected 3.0"),
        ({"normalization": "LayerNorm"}, "args.normalization is 'LayerNorm', expected 'RMSNorm'"),
        ({"num_layers": 3}, "beside what this model has"),
        ({"fp16": True}, "args.fp16 is True"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str, tmp_path: Path, illada: Illada) -> None:
    config = load_config(None, [*MODEL, "training.precision=fp32"])
    write_checkpoint(tmp_path / "ours", config, random_tensors(config))
    reshard(open_checkpoint(str(tmp_path / "ours")), tmp_path / "legacy", LayoutChange(1, 1), "legacy", processes=1)
    directory = tmp_path / "legacy" / f"iter_{STEP:07d}"
    (directory / "checkpoint.json").unlink()
    file = directory / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    for key, value in change.items():
        if key in state:
            state[key] = value
        else:
            setattr(state["args"], key, value)
    torch.save(state, file)
    outcome = illada("checkpoint", "inspect", tmp_path / "legacy", "--set", "model.mask_token_id=5")
    assert outcome.code == 2
    assert message in outcome.err
    without = illada("checkpoint", "inspect", tmp_path / "legacy")
    assert without.code == 2
