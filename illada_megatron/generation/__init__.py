"""Text from a mask predictor: continuation, infilling, and how they look while they happen.

In: a model as a function from texts to logits (`Model`), or a checkpoint (`Generator.open`); prompts.
Out: tokens, and the steps in which they came.
Never imported here: training, evaluation, the command line. Megatron-core only in `layers.py`, through `model/`.
"""

from illada_megatron.generation.engine import Engine, Job, Step
from illada_megatron.generation.generator import Generator, Result
from illada_megatron.generation.model import FunctionModel, Model, Part, Predict
from illada_megatron.generation.proposing import Words
from illada_megatron.generation.render import render
from illada_megatron.generation.settings import Settings
from illada_megatron.generation.text import GIVEN, Text

__all__ = [
    "GIVEN",
    "Engine",
    "FunctionModel",
    "Generator",
    "Job",
    "Model",
    "Part",
    "Predict",
    "Result",
    "Settings",
    "Step",
    "Text",
    "Words",
    "render",
]
