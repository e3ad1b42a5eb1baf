"""Text from a trained model: `Generator.open(...)`, then `generate`, `infill`, `chat` or `stream`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from illada_megatron.config import ConfigError, ModelConfig
from illada_megatron.data.tokenizers.finding import find_tokenizer
from illada_megatron.data.tokenizers.spelling import bytes_of_tokens, decode_behind, unknown_ids
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from illada_megatron.generation.constraining import Automaton, Constraint, automaton
from illada_megatron.generation.ending import Decode, Finish
from illada_megatron.generation.engine import Engine, Job, Step
from illada_megatron.generation.indexing import edges_apart, edges_of
from illada_megatron.generation.model import Divided, Model
from illada_megatron.generation.proposing import Words
from illada_megatron.generation.settings import Settings
from illada_megatron.generation.text import Text

Prompt = str | Sequence[int]
END_OF_THINKING = "</think>"
_AUTOMATA = 8
"""Of expressions, kept for texts to come."""
_GAP = re.compile(r"<mask:(\d+)>")


@dataclass(frozen=True)
class Result:
    """A finished text."""

    tokens: Tensor  # [s] int64, the prompt's among them
    order: Tensor  # [s] int64: step that revealed each; GIVEN (-1) where it was not generated
    appended: Tensor  # [s] int64: step before which each was appended; GIVEN where it was there from the start
    confidence: Tensor  # [s] float64
    text: str
    """What was generated, as it follows the prompt, without the end-of-text token and what stopped it; of an infilling
    the whole text."""
    finish: Finish
    computed: int
    """Positions that went through the layers, over all steps."""
    prompt_tokens: int
    steps: int
    """That revealed something of `tokens`."""

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


class Generator:
    """A model with its tokenizer. One thread at a time calls it."""

    tokenizer_path: Path | None = None
    """Its file, for what lies beside it; None: not of a file."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: ModelConfig, pass_tokens: int = 1 << 16) -> None:
        """Of any `Model`; `Generator.open` makes it of a checkpoint. pass_tokens: see `Engine`."""
        self.model = model
        self._ranks = model if isinstance(model, Divided) and model.ranks > 1 else None
        self._at_work = False
        self._automaton = lru_cache(_AUTOMATA)(self._made_automaton)
        self.tokenizer = tokenizer
        self.config = config
        self.pass_tokens = pass_tokens
        special = tokenizer.special_ids()
        thought = [special[END_OF_THINKING]] if END_OF_THINKING in special else tokenizer.encode(END_OF_THINKING)
        self.words = Words(
            config.mask_token_id,
            tokenizer.eos_id,
            tuple(thought),
            min(tokenizer.vocab_size, model.vocab_size),
            special,
        )

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str | Path,
        device: str = "auto",
        tokenizer: str | Path | None = None,
        pipeline: int = 1,
        ema: bool = False,
    ) -> Iterator[Self]:
        """The newest checkpoint of a run's `checkpoint.save_dir`, one step_... below it, or a Hugging Face directory.

        Where a launcher has started several ranks, their layers are shared between them: `pipeline` stages, and tensor
        parallel within a stage. Every rank runs the same program then, and gets the same results; prompts and settings
        are rank 0's. tokenizer: file, directory or org/name; None: the run's. Raises ConfigError, CheckpointError,
        DataError.
        """
        from illada_megatron.generation.opening import open_stage

        with open_stage(path, device, ema, pipeline) as opened:
            from illada_megatron.generation.layers import LayerModel

            name = tokenizer or opened.config.data.tokenizer_path
            if name is None:
                raise ConfigError(f"{path}: the run names no data.tokenizer_path: give its tokenizer with --tokenizer")
            file = find_tokenizer(name, "data.tokenizer_path" if tokenizer is None else "--tokenizer")
            words = load_tokenizer(file)
            _check_tokenizer(words, name, opened.config.model)
            model = LayerModel(opened.stage, opened.config, opened.run)
            made = cls(model, words, opened.config.model, model.pass_tokens)
            made.tokenizer_path = file
            yield made

    def generate(self, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings]) -> list[Result]:
        """Continue each prompt, text or token ids; `<mask:N>` in a text: its gaps of N tokens are filled in instead.

        settings: of all, or one for each. Results come in the prompts' order, and are what each would be alone. Raises
        ValueError where a prompt does not fit.
        """
        if self._ranks is not None and not self._ranks.leads:
            return self._followed()
        of_each = [settings] * len(prompts) if isinstance(settings, Settings) else list(settings)
        with self._others_follow() as results:
            texts = [self.text(prompt, one) for prompt, one in zip(prompts, of_each, strict=True)]
            with self._engine() as engine:
                jobs = [engine.add(*text) for text in texts]
                found = {job: self.result(job, step) for job, step in engine.run() if step.end is not None}
            results += [found[job] for job in jobs]
        return results

    def stream(self, prompt: Prompt, settings: Settings) -> Iterator[tuple[Job, Step]]:
        """The steps of one text, as they are made; `result(job, step)` of the last. Ends where it is closed. Of several
        ranks the first is given the steps, the others nothing."""
        if self._ranks is not None and not self._ranks.leads:
            self._followed()
            return
        with self._others_follow(), self._engine() as engine:
            engine.add(*self.text(prompt, settings))
            yield from engine.run()

    def text(
        self, prompt: Prompt, settings: Settings, follows: Automaton | None = None
    ) -> tuple[Text, Decode, Constraint | None]:
        """A prompt as the engine takes it. follows: of its settings' regex or json_schema, where it has been made.
        Raises ValueError where it does not fit."""
        ids = self.tokens(prompt) if isinstance(prompt, str) else prompt
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.model.vocab_size:
            raise ValueError(f"the prompt has ids outside of the model's {self.model.vocab_size}")
        infill = bool((tokens == self.config.mask_token_id).any())
        total = tokens.numel() + (0 if infill else settings.gen_length)
        if total > self.config.max_sequence_length:
            raise ValueError(
                f"prompt and generation take {total} tokens, model.max_sequence_length is "
                f"{self.config.max_sequence_length}: shorten the prompt or gen_length"
            )
        text = Text(tokens, settings, self.config.mask_token_id, infill)
        constraint = self._constraint(text, follows)
        return text, self._decode(text, constraint), constraint

    def _decode(self, text: Text, constraint: Constraint | None) -> Decode:
        """Generated tokens -> their text: what stop strings are looked for in, and what is shown in the end."""
        if constraint is not None:  # as the automaton has read it: a tokenizer's decoder may drop spaces
            return lambda ids: constraint.joined(ids, self._spelled)
        if text.infill or not self.tokenizer.decode(text.tokens[: text.given].tolist()):
            return self.tokenizer.decode
        return self._decode_behind

    @cached_property
    def _decode_behind(self) -> Decode:
        return decode_behind(self.tokenizer)

    def _constraint(self, text: Text, follows: Automaton | None) -> Constraint | None:
        regex, schema = text.settings.regex, text.settings.json_schema
        if regex is None and schema is None:
            return None
        if text.infill:
            raise ValueError("regex and json_schema describe what continues a prompt: an infilling takes none")
        return Constraint(follows or self.automaton(regex, schema), text)

    def automaton(self, regex: str | None, schema: str | None, apart: bool = False) -> Automaton:
        """Of settings' regex or json_schema. Any thread may ask. apart: of a stranger's, in a process whose time and
        memory have an end. Raises ValueError where there is none, or it is too large."""
        if self.tokenizer.eos_id is None:
            raise ValueError("regex and json_schema need a tokenizer with an end-of-text token")
        return self._automaton(regex if regex is not None else schema or "", regex is None, apart)

    def _made_automaton(self, expression: str, schema: bool, apart: bool) -> Automaton:
        """Over the tokenizer's words."""
        left_out = {self.words.mask, self.words.eos, *unknown_ids(self.tokenizer)}
        words: dict[bytes, list[int]] = {}
        for token_id, word in enumerate(self._spelled[: self.words.count]):
            if word and token_id not in left_out:
                words.setdefault(word, []).append(token_id)
        before = b"".join(self._spelled[token_id] for token_id in self.tokenizer.encode("a"))
        assert self.words.eos is not None
        edges = (edges_apart if apart else edges_of)(expression, words, schema)
        return automaton(edges, words, self.words.eos, before == b" a")

    @cached_property
    def _spelled(self) -> list[bytes]:
        return bytes_of_tokens(self.tokenizer)

    def tokens(self, text: str) -> list[int]:
        """Token ids, with N masks for each `<mask:N>`. Raises ValueError at the gap that makes them too many."""
        ids: list[int] = []
        most = self.config.max_sequence_length
        for index, part in enumerate(_GAP.split(text)):
            if index % 2 and len(ids) + int(part) > most:  # before a short text becomes a list that fills the memory
                found = f"a text of {len(ids) + int(part)} tokens"
                raise ValueError(f"<mask:{part}> makes {found}, model.max_sequence_length is {most}: ask for fewer")
            ids += [self.config.mask_token_id] * int(part) if index % 2 else self.tokenizer.encode(part)
        return ids

    def result(self, job: Job, step: Step) -> Result:
        """Of a text and the step that ended it."""
        text, end = job.text, step.end
        if end is None:
            raise ValueError("the text is not finished")
        shown = text.tokens if text.infill else text.generated
        if end.by_token:
            shown = shown[:-1]
        words = (job.decode or self.tokenizer.decode)(shown.tolist())[: end.characters]
        shown_parts = (text.tokens, text.order, text.appended, text.confidence)
        return Result(*shown_parts, words, end.finish, job.computed, text.given, text.steps)

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        """Of one call: another that goes on meanwhile would be given its steps. Nothing is kept behind it, whatever its
        end."""
        engine = Engine(self.model, self.words, self.pass_tokens)
        try:
            yield engine
        finally:
            for job in list(engine.jobs):
                engine.remove(job)

    @contextmanager
    def _others_follow(self) -> Iterator[list[Result]]:
        """The list is what the other ranks are told in the end; an error too. Raises ValueError where they follow
        another call."""
        results: list[Result] = []
        if self._ranks is None:
            yield results
            return
        if self._at_work:
            raise ValueError("a stream of this generator is open: several ranks do one call after the other, close it")
        self._at_work = True
        said: list[Result] | tuple[type[Exception], str] = results
        try:
            yield results
        except GeneratorExit:  # whoever reads the stream wants no more
            raise
        except ValueError as error:
            said = ValueError, str(error)
            raise
        except BaseException as error:
            said = RuntimeError, f"rank 0 has ended with {type(error).__name__}: {error}"
            raise
        finally:
            self._at_work = False
            self._ranks.end(said)

    def _followed(self) -> list[Result]:
        assert self._ranks is not None
        said = self._ranks.follow()
        if isinstance(said, tuple):
            kind, words = said
            raise kind(words)
        return said if isinstance(said, list) else []


def _check_tokenizer(words: Tokenizer, path: str | Path, model: ModelConfig) -> None:
    """Another's ids would be other words to this model, or none."""
    if words.vocab_size > model.vocab_size or words.mask_id not in (None, model.mask_token_id):
        mask = "no mask" if words.mask_id is None else f"mask {words.mask_id}"
        raise ConfigError(
            f"{path} has {words.vocab_size} tokens and {mask}, the checkpoint's model {model.vocab_size} ids and mask "
            f"{model.mask_token_id}: give the tokenizer that it was trained with, with --tokenizer"
        )
