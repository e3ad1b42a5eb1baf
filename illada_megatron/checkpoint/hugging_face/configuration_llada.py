"""Configuration of a model exported in LLaDA's layout. Lies beside the weights; needs transformers only."""

from typing import Any

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    """Keys as in the released LLaDA checkpoints. Not in those, and written only where a model needs them: head_dim,
    logit_softcap (logits become s tanh(logit / s); 0: they stay), exclude_mask_logit (the mask's logit is minus
    infinity)."""

    model_type = "llada"
    # what transformers asks any configuration for
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        d_model: int = 4096,
        mlp_hidden_size: int = 12288,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        logit_softcap: float = 0.0,
        exclude_mask_logit: bool = False,
        include_qkv_bias: bool = False,
        init_std: float = 0.02,
        mask_token_id: int = 126336,
        weight_tying: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size or vocab_size
        self.d_model = d_model
        self.mlp_hidden_size = mlp_hidden_size
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads or n_heads
        self.head_dim = head_dim or d_model // n_heads
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.logit_softcap = logit_softcap
        self.exclude_mask_logit = exclude_mask_logit
        self.include_qkv_bias = include_qkv_bias
        self.init_std = init_std
        self.mask_token_id = mask_token_id
        self.weight_tying = weight_tying
        kwargs["tie_word_embeddings"] = weight_tying
        super().__init__(**kwargs)
