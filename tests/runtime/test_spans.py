"""The names that blocks have in a trace."""

import torch

from illada_megatron.runtime.spans import named_spans, span


def test_names_are_said_until_the_last_who_asked_is_gone() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with span("before"):
            pass
        with named_spans(nvtx=False):
            with named_spans(nvtx=False), span("within both"):
                pass
            with span("within one"):
                pass
        with span("behind"):
            pass
    found = {event.key for event in profiler.key_averages()} & {"before", "within both", "within one", "behind"}
    assert found == {"within both", "within one"}
