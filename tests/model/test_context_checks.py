"""Which layers can share sequences: what Transformer Engine would get wrong, or has no kernel for, is refused."""

import pytest

from illada_megatron.config import ConfigError, load_config

CP2 = "parallel.context_parallel_size=2"


@pytest.mark.parametrize(
    ("version", "fields", "problem"),
    [
        ((2, 11), ["training.precision=bf16"], "needs Transformer Engine 2.20 or newer"),
        ((2, 20), ["training.precision=bf16", "training.deterministic=true"], "no deterministic attention over ranks"),
        ((2, 20), ["training.precision=fp32"], "takes bf16, found training.precision fp32"),
    ],
)
def test_what_transformer_engine_cannot_share(
    version: tuple[int, int], fields: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from illada_megatron.model import layer_specs

    monkeypatch.setattr(layer_specs, "transformer_engine_version", lambda: version)
    with pytest.raises(ConfigError, match=problem):
        layer_specs.check_context(load_config("tiny", [CP2, *fields]), "transformer_engine")
    layer_specs.check_context(load_config("tiny", [CP2, *fields]), "local")
    layer_specs.check_context(load_config("tiny", fields), "transformer_engine")


def test_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from illada_megatron.model import layer_specs

    monkeypatch.setattr(layer_specs, "transformer_engine_version", lambda: (2, 20))
    layer_specs.check_context(load_config("tiny", [CP2, "training.precision=bf16"]), "transformer_engine")
