"""Configuration of an exported iLLaDA. Lies beside the weights; needs transformers only."""

from typing import Any

from transformers import PretrainedConfig


class ILLaDAConfig(PretrainedConfig):
    """Keys as in the released iLLaDA checkpoints. Not in those, and written only where a model needs them: head_dim,
    logit_softcap (logits become s tanh(logit / s); 0: they stay), qkv_bias (biases at queries, keys and values, as
    Qwen2 has them; attention_bias, which is Llama's, would be one at the output too), qk_layernorm (RMSNorm of each
    query and key head, as Qwen3 has it), mask_token_id, exclude_mask_logit (the mask's logit is minus infinity)."""

    model_type = "illada"

    def __init__(
        self,
        vocab_size: int = 155136,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 8192,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        logit_softcap: float = 0.0,
        exclude_mask_logit: bool = False,
        qkv_bias: bool = False,
        qk_layernorm: bool = False,
        initializer_range: float = 0.02,
        mask_token_id: int | None = 5,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        # `rope_scaling` is a key of the released files; transformers 5 keeps it, with rope_theta, as `rope_parameters`
        scaling = kwargs.pop("rope_scaling", None) or kwargs.pop("rope_parameters", None)
        if scaling is not None:
            self.rope_parameters = {"rope_theta": rope_theta, **scaling}
            rope_theta = self.rope_parameters["rope_theta"]
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.logit_softcap = logit_softcap
        self.exclude_mask_logit = exclude_mask_logit
        self.qkv_bias = qkv_bias
        self.qk_layernorm = qk_layernorm
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
