"""The model of a checkpoint as the engine asks for it, on one rank or divided over several.

Rank 0 has the engine. Of each pass it tells the other ranks what to compute (`follow`), and all compute their part:
layers are divided over tensor-parallel ranks, and between pipeline stages. Nothing else of generation knows of ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.generation.model import WHOLE, Part
from illada_megatron.model.kept_keys import KeptKeys, KeptPass, KeptText
from illada_megatron.model.mask_predictor import MaskPredictor
from illada_megatron.model.packing import Segments, pack
from illada_megatron.model.row_products import take_row_products
from illada_megatron.runtime import Runtime


class LayerModel:
    """A `generation.model.Model` of a mask predictor's stages."""

    def __init__(self, stage: MaskPredictor, config: RunConfig, run: Runtime, kept_bytes: int | None = None) -> None:
        """kept_bytes: of keys and values that a rank keeps at most; None: 4 GiB, on a GPU half of what is free. The
        longest text with guidance always has room."""
        self.vocab_size = config.model.vocab_size
        self.max_sequence_length = config.model.max_sequence_length
        self.ranks = run.world_size
        self.leads = run.rank == 0
        self._stage = stage.eval()
        self._run = run
        self._device = run.device.torch_device
        self._hidden = config.model.hidden_size
        self._group = _waiting_group() if run.world_size > 1 else None
        self._broken: str | None = None
        """What has ended a pass, or a message, in the middle: the ranks do not agree any more."""
        self.pass_tokens = 1 << 16 if self._device.type == "cuda" else 1 << 11
        """What to give `Engine`: a CPU needs no more for its speed, and their results stay in memory."""
        self._kept = KeptKeys()
        self._next = 0
        self._dtype = next(stage.parameters()).dtype
        self.rows_alone = take_row_products(stage, self._device)
        """Why a row of logits may have other bits among others; None: it has not."""
        of_token = 2 * config.model.num_layers * config.model.num_query_groups * config.model.head_dim
        of_all = (kept_bytes or _kept_bytes(self._device)) * run.layout.tensor * run.layout.pipeline
        self.kept_tokens = max(of_all // (of_token * self._dtype.itemsize), 2 * self.max_sequence_length)

    def logits(self, parts: Sequence[Part]) -> Tensor:
        """As `Model.logits`: [sum of m, v] float32. Of rank 0. Raises ValueError where a text is too long; RuntimeError
        where several ranks have been left in the middle of a pass before."""
        for part in parts:
            length = part.tokens.numel() if part.kept == WHOLE else part.length
            if length > self.max_sequence_length:
                raise ValueError(f"a text has {length} tokens, model.max_sequence_length is {self.max_sequence_length}")
        with self._in_step():
            self._tell("logits", list(parts))
            found = self._pass(parts)
        assert found is not None
        return found

    def keep(self, capacity: int) -> int:
        """As `Model.keep`. Raises ValueError where texts of several engines are more than `kept_tokens` together."""
        self._next += 1
        asked = self._next, capacity, self.kept_tokens
        self._kept.keep(*asked)
        with self._in_step():
            self._tell("keep", asked)
        return self._next

    def forget(self, kept: int) -> None:
        """As `Model.forget`."""
        if self._broken is None:
            with self._in_step():
                self._tell("forget", kept)
        self._kept.forget(kept)

    def follow(self) -> Any:
        """As `Divided.follow`: rank 0 leads."""
        while True:
            with self._in_step():
                what, argument = self._told()
                if what == "logits":
                    self._pass(argument)
            if what == "logits":
                continue
            if what == "keep":
                self._kept.keep(*argument)
            elif what == "forget":
                self._kept.forget(argument)
            else:
                return argument

    def end(self, said: Any) -> None:
        """As `Divided.end`. Where a pass was left in the middle nobody would listen: the others end with this process,
        or by their own error."""
        if self._broken is None:
            with self._in_step():
                self._tell("end", said)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What several ranks do together: whole, or never again."""
        if self._broken is not None:
            raise RuntimeError(f"the ranks were left in the middle of a pass ({self._broken}): start them anew")
        try:
            yield
        except BaseException as error:
            if self._group is not None:
                self._broken = f"{type(error).__name__}: {error}"
            raise

    def _tell(self, what: str, argument: Any) -> None:
        if self._group is not None:
            dist.broadcast_object_list([(what, argument)], src=0, group=self._group)

    def _told(self) -> tuple[str, Any]:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=self._group)
        what, argument = told[0]
        return what, argument

    @torch.no_grad()
    def _pass(self, parts: Sequence[Part]) -> Tensor | None:
        """This rank's part of a pass; the logits on rank 0."""
        work = self._work(parts)
        hidden = self._layers(work)
        layout = self._run.layout
        if not self._run.is_last_stage:
            dist.send(hidden, self._run.rank + layout.tensor)
            if self._run.rank == 0:
                found = torch.empty(work.wanted.numel(), self.vocab_size, dtype=self._dtype, device=self._device)
                dist.recv(found, (layout.pipeline - 1) * layout.tensor)
                return found.float()
            return None
        logits = self._stage.logits(hidden[work.wanted])
        if self._run.rank == 0:
            return logits.float()
        if self._run.rank == (layout.pipeline - 1) * layout.tensor:
            dist.send(logits.contiguous(), 0)
        return None

    def _layers(self, work: "_Work") -> Tensor:
        """[t, 1, h] behind this stage's layers."""
        tokens = None
        if self._run.is_first_stage:
            tokens = work.tokens[None]
        else:
            before = torch.empty(len(work.tokens), 1, self._hidden, dtype=self._dtype, device=self._device)
            dist.recv(before, self._run.rank - self._run.layout.tensor)
            self._stage.set_input_tensor(before)
        hidden = self._stage(tokens, work.segments)
        assert isinstance(hidden, Tensor)
        return hidden

    def _work(self, parts: Sequence[Part]) -> "_Work":
        """A pass as the layers take it. Its numbers go to the device in one transfer, and a second of the offsets."""
        in_order = sorted(range(len(parts)), key=lambda number: _place(parts[number]))
        first_row, offset = [0] * len(parts), 0
        lengths, tokens = [], []
        for number in in_order:
            first_row[number] = offset
            offset += parts[number].tokens.numel()
            tokens.append(parts[number].tokens)
            lengths.append(parts[number].tokens.numel())
        wanted = torch.cat([part.wanted + first for part, first in zip(parts, first_row, strict=True)])
        kept = [parts[number] for number in in_order if parts[number].kept != WHOLE]
        positions = [torch.arange(len(one.tokens)) if one.positions is None else one.positions for one in kept]
        rows = [where + self._kept.start(part.kept) for part, where in zip(kept, positions, strict=True)]
        numbers = [torch.cat(tokens), wanted, *(torch.cat(one) for one in (positions, rows) if one)]
        sent = torch.cat(numbers).to(self._device).split([one.numel() for one in numbers])
        some = [part for part in kept if part.positions is not None]
        whole = lengths[: len(lengths) - len(some)]
        longest = max([*whole, *(part.length for part in some)])
        segments = self._packed(lengths, longest)
        if kept:
            texts = [KeptText(part.tokens.numel(), part.length, self._kept.start(part.kept)) for part in some]
            segments.kept = KeptPass(self._packed(whole, longest), texts, self._kept, sent[2], sent[3])
        return _Work(sent[0], sent[1], segments)

    def _packed(self, lengths: Sequence[int], longest: int) -> Segments:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(self._device, torch.int32)
        return pack(offsets, longest, lengths)


@dataclass(frozen=True)
class _Work:
    """A pass: the texts in the order that `KeptPass` asks for."""

    tokens: Tensor  # [t] int64, on the device
    wanted: Tensor  # [m] int64, on the device: of the t rows
    segments: Segments


def _kept_bytes(device: torch.device) -> int:
    """Of a rank, where nobody has said it."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 4 << 30


def _place(part: Part) -> tuple[bool, bool, int, int]:
    """In a pass. Texts of the same shape attend in one call where they are neighbours."""
    return part.kept != WHOLE, part.positions is not None, part.tokens.numel(), part.length


def _waiting_group() -> dist.ProcessGroup:
    """On the CPU, so that a message costs a GPU nothing; ranks may wait in it until somebody wants something."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    assert group is not None
    return group
