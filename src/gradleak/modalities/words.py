"""What flags and files say in one word of a few. Importing this costs nothing."""

from typing import Literal

Task = Literal["classification", "causal-lm", "masked-lm"]  # what a language model is trained for
Optimizer = Literal["sgd", "momentum", "adam", "adamw"]  # momentum: SGD with 0.9
Canary = Literal["text", "mislabelled", "pattern"]
