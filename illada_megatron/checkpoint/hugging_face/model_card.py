"""README.md of an export: what the Hugging Face hub calls a model card. It says what the checkpoint knows; license,
languages and intended use are for whoever publishes it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.hugging_face.layouts import Layout
from illada_megatron.checkpoint.store import CheckpointInfo
from illada_megatron.config import RunConfig

CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class CardWords:
    """What a card says that no checkpoint knows."""

    license: str | None = None
    """As the hub writes it: apache-2.0, mit, other."""
    command: str | None = None
    """That has made the export."""

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise CheckpointError(
                f"--license is {self.license!r}, expected one of the hub's identifiers, as apache-2.0, mit or other"
            )


def model_card(
    title: str, info: CheckpointInfo, config: RunConfig, layout: Layout, dtype: str, words: CardWords
) -> bytes:
    """The text of README.md, with the front matter that the hub reads. title: the model's name; config: the run's;
    dtype: of the exported weights."""
    tags = [layout.model_type, "masked-diffusion", "diffusion-language-model", "custom_code"]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if words.license is not None:
        front["license"] = words.license
    model = config.model
    facts = [
        ("Parameters", f"{model.num_parameters:,}, padded rows of the vocabulary included"),
        ("Layers, width", f"{model.num_layers}, {model.hidden_size:,}"),
        ("Vocabulary", f"{model.vocab_size:,} ids; the mask is {model.mask_token_id}"),
        ("Context", f"{model.max_sequence_length:,} tokens"),
        ("Weights", f"{dtype}, names of tensors as in {layout.architecture}"),
    ]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {title}\n",
        "A masked-diffusion language model with bidirectional attention: it predicts all masked tokens of a text at "
        f"once. Trained with illada-megatron {info.versions.get('illada-megatron', '')}.\n",
        _table(facts),
        "## Training\n",
        _table(_training(info, config)),
        _data(info, config),
        _use(layout, title),
    ]
    if words.command is not None:
        parts.append(f"## Export\n\n```\n{words.command}\n```\n")
    return "\n".join(parts).encode()


def _training(info: CheckpointInfo, config: RunConfig) -> list[tuple[str, str]]:
    if info.progress is None:
        return [("Steps", "none by this program: the weights were imported or averaged")]
    samples, length = info.progress.get("consumed_samples", 0), config.data.sequence_length
    rows = [
        ("Steps", f"{info.step:,}"),
        ("Tokens", f"{samples * length:,} ({samples:,} sequences of {length:,})"),
        ("Precision", config.training.precision),
    ]
    if (held_out := info.progress.get("held_out")) is not None:
        rows.append(
            (
                "Held-out bound",
                f"{held_out['bound_nats_per_token']:.4f} nats/token at step {held_out['step']:,}, over "
                f"{held_out['tokens']:,} tokens: the negative log-likelihood is at most that",
            )
        )
    return rows


def _data(info: CheckpointInfo, config: RunConfig) -> str:
    corpora = (info.fingerprints.get("data") or {}).get("corpora") or {}
    if not corpora:
        return "The checkpoint does not say what data it was trained on.\n"
    alone = ", ".join(Path(path).name for path in config.data.train_paths)
    rows = [(name or alone or "corpus", str(found)) for name, found in corpora.items()]
    words = info.fingerprints.get("tokenizer")
    return (
        "Data (name; tokens, hash of some of them):\n\n"
        + _table(rows)
        + (f"\nTokenizer of the data: SHA-256 `{words}`.\n" if words else "")
    )


def _use(layout: Layout, title: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{title}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)  # {layout.architecture}
logits = model(ids).logits  # ids [b, s] with model.config.mask_token_id where a token is wanted; logits [b, s, v]
```

transformers' `generate` does not apply: a sampler fills masks in over several calls, as `illada generate` does.
"""


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in cells)]) + "\n"
