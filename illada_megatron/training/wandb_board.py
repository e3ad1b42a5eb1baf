"""Weights & Biases. The package `wandb` is optional, and nothing that goes wrong with it ends a run: it is said once,
and the run goes on without."""

import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from illada_megatron.config import ConfigError
from illada_megatron.system.whole_file import replaced
from illada_megatron.training.logs import Tell
from illada_megatron.training.run_places import same_run

ID_FILE = "wandb_id.txt"
"""In run_dir: the run's id, so that a start that goes on is the same run there; and run_dir, for a copy is another."""
# Its calls answer at once; what waits for the network is the first and the last.
_INIT_SECONDS = 90
_FINISH_SECONDS = 60.0


class WandbBoard:
    """A run at Weights & Biases. Figures of a step go there together, when the next step's begin."""

    def __init__(
        self, run_dir: Path, project: str, mode: Literal["online", "offline"], continues: bool, tell: Tell
    ) -> None:
        """continues: the run goes on from its own checkpoint, under the id that it had. Else, and where the package
        cannot be imported, raises ConfigError."""
        self._run_dir, self._project, self._mode, self._tell = run_dir, project, mode, tell
        self._continues = continues
        self._run: Any = None
        self._wandb: Any = None
        self._step, self._pending = 0, dict[str, Any]()
        try:
            import wandb

            self._wandb = wandb
        except Exception as error:  # what is not installed, or does not fit what is
            text = f"logging.wandb_project needs the package wandb, which cannot be imported ({error}): "
            if not continues:
                raise ConfigError(f"{text}pip install wandb, or leave the field out") from error
            self._failed(text + "pip install wandb")

    def begin(self, configuration: str, hyperparameters: dict[str, Any], step: int) -> None:  # noqa: ARG002
        """hyperparameters are among `configuration`, all of which W&B keeps."""
        if self._wandb is None:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            # without a key `init` would ask the terminal for one, and wait for ever
            if self._mode == "online" and not self._wandb.login(prompt=False):
                self._failed(
                    f"logging.wandb_project {self._project}: nobody is logged in: `wandb login`, or set WANDB_API_KEY"
                )
                return
            self._run = self._wandb.init(
                project=self._project,
                mode=self._mode,
                dir=str(self._run_dir),
                id=self._id(),
                name=self._run_dir.name,
                resume="allow",
                # the terminal stays this program's; no look at the user's repository
                settings=self._wandb.Settings(
                    console="off", disable_git=True, save_code=False, silent=True, init_timeout=_INIT_SECONDS
                ),
            )
            self._run.config.update(yaml.safe_load(configuration), allow_val_change=True)
            # steps that a rollback repeats are logged again; W&B's own count only goes up
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever it raises: the network, the disk, its own service
            self._failed(f"logging.wandb_project {self._project}: {error}")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(name, value, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self._add(name, text, step)

    def go_back(self, step: int) -> None:  # noqa: ARG002
        """The steps that come again are logged once more: what is there cannot be taken back."""
        self._send()

    def close(self) -> None:
        """Return when all is sent, or after a minute: nobody waits for a network that does not answer."""
        self._send()
        if self._run is None:
            return
        thread = threading.Thread(target=self._do, args=(self._run.finish,), name="wandb-finish", daemon=True)
        thread.start()
        thread.join(_FINISH_SECONDS)
        if thread.is_alive():
            self._failed(f"logging.wandb_project {self._project}: not all was sent in {_FINISH_SECONDS:.0f} s")
        self._run = None

    def _add(self, name: str, value: Any, step: int) -> None:
        if step != self._step:
            self._send()
        self._step = step
        self._pending[name] = value

    def _send(self) -> None:
        pending, self._pending = self._pending, {}
        if pending and self._run is not None:
            self._do(lambda: self._run.log({"step": self._step, **pending}))

    def _do(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._failed(f"logging.wandb_project {self._project}: {error}")

    def _id(self) -> str:
        path, place = self._run_dir / ID_FILE, self._run_dir.resolve()
        if self._continues and path.exists():
            id_, _, original = path.read_text().strip().partition("\n")
            if same_run(original, str(place)):
                return id_
            if not original or not _may_be_there(Path(original, ID_FILE)):
                with suppress(OSError):  # the id is known, as long as nobody makes a copy
                    self._keep(id_)
                return id_
        new = secrets.token_hex(4)
        self._keep(new)
        return new

    def _keep(self, id_: str) -> None:
        with replaced(self._run_dir / ID_FILE) as file:
            file.write(f"{id_}\n{self._run_dir.resolve()}\n".encode())

    def _failed(self, text: str) -> None:
        self._run = None
        self._tell(f"warning: {text}; the run goes on without Weights & Biases")


def _may_be_there(path: Path) -> bool:
    """A folder that this user may not enter may hold it."""
    try:
        return path.exists()
    except PermissionError:
        return True
