"""Rotary frequencies of longer sequences are Hugging Face's to the last bit, in the model's stages too."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.model.rotary import attention_factor, attention_scale
from illada_megatron.runtime import Runtime

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn, all numbers": {
        **{"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 30},
        **{"beta_fast": 3.0, "beta_slow": 0.5, "attention_factor": 1.7},
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_attention_factor_equal_theirs(
    name: str, tiny_config: RunConfig, single_process: Runtime
) -> None:
    from illada_megatron.model import build_model_chunks

    model = tiny_config.model.model_validate({**tiny_config.model.model_dump(), "rope_scaling": SCALINGS[name]})
    config = tiny_config.model_copy(update={"model": model})
    theirs = LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.max_sequence_length,
        rope_parameters={**SCALINGS[name], "rope_theta": model.rotary_base},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](theirs)
    (stage,) = build_model_chunks(config, single_process.device)
    assert torch.equal(stage.rotary_pos_emb.inv_freq, frequencies)
    (plain,) = build_model_chunks(tiny_config, single_process.device)
    assert not torch.equal(plain.rotary_pos_emb.inv_freq, frequencies)
    # queries and keys times the factor are scores times its square
    assert model.rope_scaling is not None
    assert attention_factor(model.rope_scaling) == factor or name not in ("yarn", "yarn, all numbers")
    assert attention_scale(model) == (None if factor == 1.0 else pytest.approx(factor**2 / 4.0))
    assert stage.decoder.layers[0].self_attention.core_attention.scale == pytest.approx(factor**2 / 4.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "{rope_type: dynamic, factor: 2.0}",
            "model.rope_scaling.rope_type: Input should be 'linear', 'llama3' or 'yarn'",
        ),
        (
            "{rope_type: llama3, factor: 2.0}",
            "llama3 needs original_max_position_embeddings, low_freq_factor, high_freq",
        ),
        ("{rope_type: linear, factor: 2.0, beta_fast: 3.0}", "rope_type linear has no beta_fast: leave it out"),
        ("{rope_type: linear, factor: 0.5}", "model.rope_scaling.factor: .*greater than or equal to 1"),
        (
            "{rope_type: linear, factor: 2.0, faktor: 1}",
            "model.rope_scaling.faktor: unknown field; did you mean factor",
        ),
        (
            "{rope_type: llama3, factor: 2.0, low_freq_factor: 4.0, high_freq_factor: 4.0, "
            "original_max_position_embeddings: 8}",
            "low_freq_factor 4.0 is not below high_freq_factor 4.0",
        ),
        (
            "{rope_type: yarn, factor: 2.0, original_max_position_embeddings: 31}",
            r"max_sequence_length 64 is beyond rope_scaling's factor 2 \* original_max_position_embeddings 31",
        ),
    ],
)
def test_scalings_that_make_no_sense(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(
            "tiny", ["model.max_sequence_length=64", f"model.rope_scaling={override}", "data.sequence_length=64"]
        )
