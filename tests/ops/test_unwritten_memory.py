"""With AMX, oneDNN reads a bf16 product's left operand beyond its end and multiplies that by zero: NaN stays NaN."""

import pytest
import torch

from illada_megatron.ops.logit_passes import REFERENCE
from illada_megatron.ops.logit_sweeps import ALIGN_ROWS, memory_elements, plain_sweeps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(33, 3000), (64, 3008), (1, 65), (33, 0)])
def test_nothing_unwritten_lies_beside_the_logits(rows: int, width: int, dtype: torch.dtype) -> None:
    memory = torch.full((memory_elements(rows, width),), float("nan"), dtype=dtype)
    hidden, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(width, 24, dtype=dtype)
    targets = torch.randint(max(width, 1), (rows,))
    sweeps = plain_sweeps(REFERENCE)
    logits, _ = sweeps.forward(memory, hidden, weight, targets, 0.0)
    padded = -(-rows // ALIGN_ROWS) * ALIGN_ROWS * logits.stride(0)
    assert not memory[:padded].isnan().any()
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros(width, 24)
    row_values = torch.zeros(4, rows)
    sweeps.backward(logits, hidden, weight, targets, row_values, 0.0, hidden_gradient, weight_gradient)
    assert not hidden_gradient.isnan().any()
    assert not weight_gradient.isnan().any()
