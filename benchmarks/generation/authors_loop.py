"""The authors' loop over transformers, of fixed length and at temperature 0: all positions' logits in every step, their
softmax, the candidate and the confidence of each; the block's surest masks are revealed. Written from their description
(arXiv 2502.09992, algorithm 4 and appendix B.4); no line is theirs."""

from pathlib import Path

import torch

from benchmarks.generation.fixed_loop import FixedLoop
from benchmarks.generation.shapes import INITIALIZER_RANGE, MODEL_SEED, Shape
from benchmarks.step.workloads import MASK_TOKEN_ID
from illada_megatron.checkpoint.hugging_face.configuration_illada import ILLaDAConfig
from illada_megatron.checkpoint.hugging_face.modeling_illada import ILLaDAForCausalLM


def write_model(folder: Path, shape: Shape) -> None:
    """A Hugging Face directory with random weights, fp32."""
    work = shape.model
    torch.manual_seed(MODEL_SEED)
    config = ILLaDAConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.ffn_hidden_size,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_attention_heads,
        num_key_value_heads=work.num_query_groups,
        max_position_embeddings=shape.limit,
        initializer_range=INITIALIZER_RANGE,
        mask_token_id=MASK_TOKEN_ID,
    )
    ILLaDAForCausalLM(config).save_pretrained(folder)


class AuthorsLoop(FixedLoop):
    """Of the one prompt."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self._model = ILLaDAForCausalLM.from_pretrained(folder).eval()
        super().__init__(shape)

    @torch.no_grad()
    def _step(self, reveals: int) -> None:
        tokens, shape = self._tokens, self._shape
        end = shape.prompt + (self._blocks + 1) * shape.block_length
        logits = self._model(tokens).logits  # [1, s, v]
        logits[..., MASK_TOKEN_ID] = -torch.inf  # a trained model would not answer with the mask, random weights may
        candidates = logits.argmax(-1)
        confidence = logits.softmax(-1).gather(-1, candidates[..., None]).squeeze(-1)
        confidence[:, end:] = -torch.inf
        confidence = confidence.where(tokens == MASK_TOKEN_ID, -torch.inf)
        _, chosen = confidence[0].topk(reveals)
        tokens[0, chosen] = candidates[0, chosen]
