"""The embedding's own weight decay and learning rate, as AdamW applies them in a real step of a real model."""

import pytest
import torch

from illada_megatron.config import load_config
from illada_megatron.runtime import runtime

KEYS = ("optimizer.embedding_weight_decay", "optimizer.embedding_lr_mult")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", ["true", "false"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_embedding_is_a_group_of_its_own(
    precision: str, sharded: str, tied: str, tiny_run: tuple[str, ...]
) -> None:
    """After a step with gradients of zero every weight has shrunk by its group's rate times its decay; an untied head
    is a weight as others. By default there is no such group."""
    from illada_megatron.model import build_model_chunks, fill_initial_weights
    from illada_megatron.training.gradient_reduction import wrap_data_parallel
    from illada_megatron.training.optimizer import (
        apply_gradients,
        build_optimizer,
        gradient_norm,
        set_learning_rate,
    )

    options = [f"training.precision={precision}", f"parallel.use_distributed_optimizer={sharded}"]
    options += [f"model.tie_word_embeddings={tied}"]
    own = [f"{key}={value}" for key, value in zip(KEYS, (0.25, 0.5), strict=True)]
    config = load_config(None, [*tiny_run, *options, *own])
    with runtime(config) as run:
        models = build_model_chunks(config, run.device)
        fill_initial_weights(models, config.model, 1)
        before = {name: weight.detach().float().clone() for name, weight in models[0].named_parameters()}
        chunks = wrap_data_parallel(config.parallel, models)
        plain = build_optimizer(load_config(None, [*tiny_run, *options]), chunks)
        assert len(plain.param_groups) == 2
        optimizer = build_optimizer(config, chunks)
        assert len(optimizer.param_groups) == 3
        set_learning_rate(optimizer, 0.5, 0.1)
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        apply_gradients(optimizer, gradient_norm(optimizer), 1.0)
        for name, weight in models[0].named_parameters():
            if weight.dim() == 1:
                shrunk = 1.0
            else:
                shrunk = 1 - 0.25 * 0.25 if name == "embedding.word_embeddings.weight" else 1 - 0.5 * 0.1
            tolerance = {"rtol": 1e-5, "atol": 1e-7} if precision == "fp32" else {"rtol": 8e-3, "atol": 1e-6}
            torch.testing.assert_close(weight.detach().float(), shrunk * before[name], **tolerance, msg=name)
