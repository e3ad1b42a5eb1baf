"""Where curves are looked at: TensorBoard and Weights & Biases, one, both or none, told the same."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from illada_megatron.config import RunConfig
from illada_megatron.config.load import to_yaml
from illada_megatron.runs.fields import flat
from illada_megatron.training.logs import Board, Tell
from illada_megatron.training.resume import Change
from illada_megatron.training.run_places import claim_board, name_of
from illada_megatron.training.wandb_board import WandbBoard

# Fields, or beginnings of them, by which runs are usually compared: a table of all would show what is always the same.
_HYPERPARAMETERS = (
    *("diffusion.", "optimizer.", "schedule.", "training.", "loss.z_loss", "data.sequence_length"),
    *("model.num_", "model.hidden_size", "model.ffn_hidden_size", "model.vocab_size", "model.tie_word_embeddings"),
    *("parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"),
    "parallel.context_parallel_size",
)


class _Board(Protocol):
    def begin(self, configuration: str, hyperparameters: dict[str, Any], step: int) -> None: ...
    def add_scalar(self, name: str, value: float, step: int) -> None: ...
    def add_text(self, name: str, text: str, step: int) -> None: ...
    def go_back(self, step: int) -> None: ...
    def close(self) -> None: ...


class Boards:
    """All of a run's. What goes wrong with one is said once and ends no run."""

    def __init__(self, config: RunConfig, first_step: int, continues: bool, tell: Tell) -> None:
        """What an interrupted run logged after `first_step` comes again. continues: as of `logs.StepLog`; else a path
        that can never be written raises OSError, and a package that is missing ConfigError."""
        self._config, self._first_step = config, first_step
        self._boards: list[_Board] = []
        if directory := config.logging.tensorboard_dir:
            with suppress(OSError):  # TensorBoard's own writer meets it too, and says so
                if claim_board(directory, name_of(config)) and not continues:
                    tell(
                        "warning: another run, which left no name, has its curves in logging.tensorboard_dir "
                        f"{directory}: TensorBoard shows this run's in their place; give each its own folder (run_dir)"
                    )
            self._boards.append(Board(directory, first_step, continues, tell))
        if config.logging.wandb_project is not None:
            assert config.run_dir is not None
            logging = config.logging
            self._boards.append(
                WandbBoard(Path(config.run_dir), config.logging.wandb_project, logging.wandb_mode, continues, tell)
            )

    def begin(self, changes: Sequence[Change]) -> None:
        """The run is about to do its first step: its configuration, and what of it has changed since the checkpoint."""
        hyperparameters = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in flat(self._config.model_dump(mode="json")).items()
            if name.startswith(_HYPERPARAMETERS)
        }
        self._each(lambda board: board.begin(to_yaml(self._config), hyperparameters, self._first_step))
        if changes:
            self.add_text("run/changed", "\n\n".join(map(str, changes)), self._first_step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._each(lambda board: board.add_scalar(name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self._each(lambda board: board.add_text(name, text, step))

    def go_back(self, step: int) -> None:
        """The run goes on after `step`: the steps behind it come again."""
        self._each(lambda board: board.go_back(step))

    def close(self) -> None:
        self._each(lambda board: board.close())

    def _each(self, action: Callable[[_Board], None]) -> None:
        for board in self._boards:
            action(board)
