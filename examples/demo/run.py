"""From text to generated text on two cores: `make demo`.

    python examples/demo/run.py [--quick] [--directory DIR]

Each stage is a command that can be run by hand. Everything is written to demo/ below the directory (default: the
repository). Corpus, tokenizer and shards are kept for the next time; the run is started anew."""

import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import fragments
import report
import typer
from rich.console import Console
from rich.panel import Panel

from illada_megatron.config import RunConfig, load_config, save_config
from illada_megatron.data.corpus.statistics import unigram_entropy
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer
from illada_megatron.runtime.tables import two_columns

REPOSITORY = Path(__file__).parents[2]
_FIGURES = r"held-out bound (\S+) \+- (\S+) nats/token, (\S+ \+- \S+) bits/byte"
_BOUND = re.compile(_FIGURES)
_STEP_BOUND = re.compile(rf"^step +(\d+)  {_FIGURES}", re.MULTILINE)

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Demo:
    """Where the demo works, and what its stages have found so far."""

    directory: Path
    config: RunConfig
    held_out: dict[int, report.Bound] = field(default_factory=dict)
    """By the number of steps done."""
    stages: int = 0

    @property
    def exit_step(self) -> int:
        """The step after which the layout changes."""
        return self.config.training.exit_steps or 0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Heading before, time after: wall and CPU seconds of the commands in between."""
        self.stages += 1
        console.rule(f"[bold]{self.stages}  {title}", align="left")
        wall, cpu = time.perf_counter(), _children_cpu_seconds()
        yield
        console.print(
            f"[dim]{time.perf_counter() - wall:.1f} s ({_children_cpu_seconds() - cpu:.1f} CPU seconds)\n",
        )

    def illada(self, *arguments: str, captured: bool = True) -> str:
        """Run `illada ARGUMENTS`; see `_run`."""
        return self._run("illada", (sys.executable, "-m", "illada_megatron"), arguments, captured)

    def script(self, script: str, *arguments: str) -> str:
        """Run one of the repository's scripts; see `_run`."""
        return self._run(f"python {script}", (sys.executable, str(REPOSITORY / script)), arguments, captured=True)

    def _run(self, shown: str, program: tuple[str, ...], arguments: tuple[str, ...], captured: bool) -> str:
        """Show the command, run it, and show what it prints. Returns that, unless the command prints to the terminal
        itself (captured=False), in colours. Ends the demo with the command's status if it fails."""
        console.print(f"[bold]$ {shown} {shlex.join(arguments)}", markup=True)
        output = []
        with subprocess.Popen(
            [*program, *arguments],
            cwd=self.directory,
            stdout=subprocess.PIPE if captured else None,
            stderr=subprocess.STDOUT if captured else None,
            text=True,
        ) as process:
            for line in process.stdout or ():
                sys.stdout.write(line)
                sys.stdout.flush()
                output.append(line)
        if process.returncode:
            console.print(f"[red]stage {self.stages} failed: exit code {process.returncode}")
            sys.exit(process.returncode if process.returncode > 0 else 1)
        return "".join(output)


def prepare(demo: Demo) -> None:
    """Text -> JSONL -> tokenizer -> shards; what is complete is kept (each file is written whole or not at all)."""
    home = demo.directory / "demo"
    anew = False
    with demo.stage("Corpus: the Python sources of this machine's standard library"):
        if all((home / "corpus" / f"{part}.jsonl").exists() for part in ("train", "heldout")):
            console.print("demo/corpus is there already: kept")
        else:
            demo.script("examples/demo/collect_corpus.py", "demo/corpus")
            anew = True
    with demo.stage(f"Tokenizer: SentencePiece, {demo.config.model.vocab_size:,} pieces, one of them the mask"):
        if not anew and (home / "tokenizer.model").exists():
            console.print("demo/tokenizer.model is there already: kept")
        else:
            vocabulary = str(demo.config.model.vocab_size)
            files = ("--input", "demo/corpus/train.jsonl", "--output", "demo/tokenizer.model")
            demo.script("tools/train_tokenizer.py", *files, "--vocab-size", vocabulary)
            anew = True
    with demo.stage("Shards: text -> tokens, for training and held out"):
        for part in ("train", "heldout"):
            if not anew and (home / "shards" / f"{part}.manifest.json").exists():
                console.print(f"demo/shards/{part} is there already: kept")
                continue
            demo.illada(
                *("preprocess", f"demo/corpus/{part}.jsonl", "--output-prefix", f"demo/shards/{part}"),
                *("--tokenizer", "demo/tokenizer.model", "--overwrite"),
            )


def train(demo: Demo) -> None:
    """Two layouts, one run; the held-out bound before, in between and after."""
    config = "demo/run/config.yaml"
    with demo.stage("Held-out bound before training"):
        demo.held_out[0] = _bound(demo.illada("evaluate", "--config", config))
    with demo.stage(f"Training: 2 data-parallel processes, to step {demo.exit_step}"):
        demo.held_out |= _bounds(demo.illada("train", "--config", config, "--nproc", "2"))
    with demo.stage("The run goes on at tensor 2 x pipeline 2, 4 processes"):
        more = ("training.exit_steps=null", *_layout(2))
        demo.held_out |= _bounds(demo.illada("train", "--config", config, "--nproc", "4", *more))
    with demo.stage("Held-out bound after training"):
        last = demo.config.training.train_steps
        demo.held_out[last] = _bound(demo.illada("evaluate", "--checkpoint", "demo/run/checkpoints"))


def generate(demo: Demo) -> None:
    """A continuation and an infilling of held-out code."""
    home = demo.directory / "demo"
    tokenizer = load_tokenizer(home / "tokenizer.model")
    continuation, infilling = fragments.choose(home / "corpus" / "heldout.jsonl", tokenizer)
    (home / "run" / "continue.txt").write_text(continuation.prompt)
    (home / "run" / "infill.txt").write_text(infilling.prompt)
    options = ("--checkpoint", "demo/run/checkpoints", "--seed", "0")
    with demo.stage(f"A continuation of held-out {continuation.path}"):
        settings = ("--gen-length", "64", "--temperature", "0.8")
        demo.illada("generate", *options, "--prompt-file", "demo/run/continue.txt", *settings, captured=False)
    with demo.stage(f"An infilling of held-out {infilling.path}"):
        settings = ("--svg", "demo/denoising.svg", "--html", "demo/denoising.html")
        demo.illada("generate", *options, "--prompt-file", "demo/run/infill.txt", *settings, captured=False)
        console.print(Panel(infilling.styled_truth(), title="what the file has in the gaps"))


def summarize(demo: Demo, seconds: float) -> None:
    """The loss curve, then the table of what happened and where it lies."""
    home = demo.directory / "demo"
    steps = report.read_steps(home / "run" / "steps.jsonl")
    entropy = unigram_entropy([home / "shards" / "heldout"], demo.config.model.vocab_size)
    report.draw_loss(steps, demo.exit_step, entropy, demo.held_out, home / "loss.png")
    rows = report.summary_rows(steps, demo.exit_step, demo.config.model.num_parameters, entropy, demo.held_out)
    rows += [
        ("time", f"{seconds / 60:.1f} minutes, {_children_cpu_seconds() / 60:.1f} CPU minutes"),
        ("pictures", "demo/loss.png, demo/denoising.svg"),
        ("the text as it came", "demo/denoising.html, a page for the browser"),
        ("checkpoint", "demo/run/checkpoints"),
        ("log", "demo/run/steps.jsonl, one line a step"),
        ("TensorBoard", "tensorboard --logdir demo/run/tensorboard"),
    ]
    console.print(two_columns("summary", rows))


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of a tiny model: does everything run?")] = False,
    directory: Annotated[Path, typer.Option(help="Where demo/ is made.")] = REPOSITORY,
) -> None:
    """Text -> tokenizer -> shards -> training -> restart at TP2 x PP2 -> evaluation -> generation."""
    start = time.perf_counter()
    config = load_config(Path(__file__).parent / ("quick.yaml" if quick else "config.yaml"))
    demo = Demo(directory.resolve(), config)
    console.print(f"Working in {demo.directory}; the commands below run there too (source .venv/bin/activate).\n")
    prepare(demo)
    shutil.rmtree(demo.directory / "demo" / "run", ignore_errors=True)
    save_config(config, demo.directory / "demo" / "run" / "config.yaml")
    train(demo)
    generate(demo)
    summarize(demo, time.perf_counter() - start)


def _layout(size: int) -> tuple[str, str]:
    """Overrides: both tensor and pipeline parallel size."""
    return f"parallel.tensor_model_parallel_size={size}", f"parallel.pipeline_model_parallel_size={size}"


def _bound(output: str) -> report.Bound:
    """The bound that `illada evaluate` printed."""
    found = _BOUND.search(output)
    if found is None:
        sys.exit("illada evaluate printed no held-out bound")
    return report.Bound(float(found[1]), float(found[2]), found[3])


def _bounds(output: str) -> dict[int, report.Bound]:
    """The bounds that `illada train` printed, by step."""
    found = _STEP_BOUND.findall(output)
    return {int(step): report.Bound(float(value), float(error), bits) for step, value, error, bits in found}


def _children_cpu_seconds() -> float:
    """CPU seconds of all commands that have ended, their own children included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    typer.run(main)
