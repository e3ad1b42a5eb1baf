"""The model of a checkpoint as the engine asks for it, on one rank or divided over several.

Rank 0 has the engine. Of each pass it tells the other ranks what to compute (`follow`), and all compute their part:
layers are divided over tensor-parallel ranks, and between pipeline stages. Nothing else of generation knows of ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from illada_megatron.config import RunConfig
from illada_megatron.generation.model import WHOLE, Part
from illada_megatron.model.kept_keys import KeptKeys, KeptPass, KeptText
from illada_megatron.model.mask_predictor import MaskPredictor
from illada_megatron.model.packing import Segments, pack
from illada_megatron.runtime import Runtime


class LayerModel:
    """A `generation.model.Model` of a mask predictor's stages."""

    def __init__(self, stage: MaskPredictor, config: RunConfig, run: Runtime) -> None:
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
        self.row_multiple = _row_multiple(stage, self._group) if self._device.type == "cpu" else None
        """See `_row_multiple`; None on a GPU, too."""
        self._kept: dict[int, KeptKeys] = {}
        self._next = 0

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
        """As `Model.keep`."""
        self._next += 1
        with self._in_step():
            self._tell("keep", (self._next, capacity))
        self._kept[self._next] = KeptKeys(capacity)
        return self._next

    def forget(self, kept: int) -> None:
        """As `Model.forget`."""
        if self._broken is None:
            with self._in_step():
                self._tell("forget", kept)
        del self._kept[kept]

    def follow(self) -> Any:
        """As `Divided.follow`: rank 0 leads."""
        while True:
            what, argument = self._told()
            if what == "logits":
                self._pass(argument)
            elif what == "keep":
                self._kept[argument[0]] = KeptKeys(argument[1])
            elif what == "forget":
                del self._kept[argument]
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
            raise RuntimeError(f"the ranks were left in the middle of a pass ({self._broken}): open the model anew")
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
        wanted, offset = [parts[0].wanted] * len(parts), 0
        order = sorted(range(len(parts)), key=lambda number: parts[number].kept != WHOLE)
        for number in order:
            wanted[number] = parts[number].wanted + offset
            offset += parts[number].tokens.numel()
        rows, in_order = torch.cat(wanted), [parts[number] for number in order]
        if missing := self._missing(offset):
            nothing = torch.empty(0, dtype=torch.int64)
            in_order.insert(0, Part(torch.zeros(missing, dtype=torch.int64), nothing))
            rows = rows + missing
        hidden = self._layers(in_order, [part.tokens.numel() for part in in_order])
        layout = self._run.layout
        if not self._run.is_last_stage:
            dist.send(hidden, self._run.rank + layout.tensor)
            if self._run.rank == 0:
                found = torch.empty(rows.numel(), self.vocab_size, dtype=torch.float32, device=self._device)
                dist.recv(found, (layout.pipeline - 1) * layout.tensor)
                return found
            return None
        filled = torch.cat((rows, rows[:1].expand(self._missing(rows.numel()))))
        logits = self._stage.logits(hidden[filled.to(self._device)])[: rows.numel()].float()
        if self._run.rank == 0:
            return logits
        if self._run.rank == (layout.pipeline - 1) * layout.tensor:
            dist.send(logits.contiguous(), 0)
        return None

    def _missing(self, rows: int) -> int:
        """Rows that matrix products of `rows` are filled up with."""
        return -rows % self.row_multiple if self.row_multiple else 0

    def _layers(self, parts: Sequence[Part], lengths: Sequence[int]) -> Tensor:
        """[t, 1, h] behind this stage's layers."""
        tokens = None
        if self._run.is_first_stage:
            tokens = torch.cat([part.tokens for part in parts])[None].to(self._device)
        else:
            dtype = next(self._stage.parameters()).dtype
            before = torch.empty(sum(lengths), 1, self._hidden, dtype=dtype, device=self._device)
            dist.recv(before, self._run.rank - self._run.layout.tensor)
            self._stage.set_input_tensor(before)
        hidden = self._stage(tokens, self._segments(parts, lengths))
        assert isinstance(hidden, Tensor)
        return hidden

    def _segments(self, parts: Sequence[Part], lengths: Sequence[int]) -> Segments:
        """parts: those of which nothing is kept come first."""
        whole = [length for part, length in zip(parts, lengths, strict=True) if part.kept == WHOLE]
        longest = max(
            length if part.kept == WHOLE else part.length for part, length in zip(parts, lengths, strict=True)
        )
        segments = self._packed(whole, longest)
        if len(whole) == len(parts):
            return segments
        texts, positions = [], []
        for part, rows in zip(parts[len(whole) :], lengths[len(whole) :], strict=True):
            where = torch.arange(rows) if part.positions is None else part.positions
            positions.append(where.to(self._device))
            own = None if part.positions is None else positions[-1]
            texts.append(KeptText(rows, own, self._kept[part.kept], part.length))
        mixed = self._packed(lengths, longest)
        mixed.kept = KeptPass(segments, texts, torch.cat(positions))
        return mixed

    def _packed(self, lengths: Sequence[int], longest: int) -> Segments:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(self._device, torch.int32)
        return pack(offsets, longest, lengths)


def _waiting_group() -> dist.ProcessGroup:
    """On the CPU, so that a message costs a GPU nothing; ranks may wait in it until somebody wants something."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    assert group is not None
    return group


_MULTIPLES = (16, 32, 64, 128)
_PROBED_ROWS = 4096


@torch.no_grad()
def _row_multiple(stage: MaskPredictor, group: dist.ProcessGroup | None) -> int | None:
    """The smallest multiple, on every rank of the group, to which rows are filled up so that each has the same bits in
    a product of few as in one of many; None: there is none. Libraries divide a product over threads, and sum in another
    order where few rows are left for one. Asked of the stage's own matrices (of large ones the first rows), on this
    machine and its threads."""
    weights = {tuple(one.shape): one[:_PROBED_ROWS] for one in stage.parameters() if one.dim() == 2}
    for multiple in _MULTIPLES:
        alike = torch.tensor(all(_rows_are_alike(weight, multiple) for weight in weights.values()), dtype=torch.int32)
        if group is not None:
            dist.all_reduce(alike, dist.ReduceOp.MIN, group)
        if alike:
            return multiple
    return None


def _rows_are_alike(weight: Tensor, multiple: int) -> bool:
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(9 * multiple, weight.shape[1], generator=source).to(weight.dtype)
    every = functional.linear(rows, weight)
    for count in (1, 2, 3, 5):
        first = (9 - count) * multiple
        some = functional.linear(rows[first : first + count * multiple], weight)
        if not torch.equal(some, every[first : first + count * multiple]):
            return False
    return True
