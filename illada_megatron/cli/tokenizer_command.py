"""`illada tokenizer`."""

from pathlib import Path
from typing import Annotated

import typer

from illada_megatron.data.tokenizers import adding_mask
from illada_megatron.system.terminal import say

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Prepare tokenizers for masked diffusion.")
app.callback()(lambda: None)  # a group of one command would not be asked for it by name


@app.command("add-mask")
def add_mask(
    path: Annotated[str, typer.Argument(help="A .model or tokenizer.json, a directory with one, or org/name.")],
    output: Annotated[Path, typer.Option(help="What to write: a file that ends likewise, or a directory.")],
    mask: Annotated[str, typer.Option(help="The token: <|mask|>, <mask>, [MASK] or <|mdm_mask|> (LLaDA's).")] = (
        adding_mask.DEFAULT_NAME
    ),
) -> None:
    """Give a tokenizer a mask token, behind its last id. All text keeps its ids.

    `illada tokenizer add-mask Llama-3.2-1B --output tokenizer-with-mask`
    """
    from illada_megatron.config import ModelConfig

    made = adding_mask.add_mask(path, output, mask)
    padded = ModelConfig(vocab_size=made.vocab_size, mask_token_id=made.mask_token_id).padded_vocab_size
    say(
        f"{made.path}: the mask {mask} has the id {made.mask_token_id}; {made.vocab_size:,} ids, "
        f"{made.vocab_size_before:,} before; those of text stay as they were\n"
        f"in a configuration (the embedding gets {padded:,} rows, with padding):\n"
        f"  data.tokenizer_path={made.path}\n  model.vocab_size={made.vocab_size}\n"
        f"  model.mask_token_id={made.mask_token_id}\n"
        f"a model that has more rows than {made.vocab_size:,} already keeps its model.vocab_size; corpora made with "
        "the tokenizer without a mask name that one, and are refused beside this one unless "
        'checkpoint.allow_mismatch=["tokenizer"]'
    )
