"""What all sections have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
"""A word of the keys that noise is drawn with (`diffusion/noise.py`)."""
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["fp32", "bf16"]
Precision = Literal["fp32", "bf16", "fp8"]
Recompute = Literal["none", "selective", "full"]


class Section(BaseModel):
    # strict: "8" is not 8 and 1.5 is not 1; an int is still accepted where a float is expected
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
