"""The arguments of what somebody asks who has the private data: canaries, extraction. The strings under the fields are the command
line's help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from gradleak.cli.flags import Common
from gradleak.modalities.words import Canary, Task


@dataclass(frozen=True, kw_only=True)
class MakeCanaries(Common):
    """Make canaries, flip a coin for each, and write down those to train with, all candidates, and the coins."""

    count: int = 1_000
    """Number of canaries; a coin includes about half of them."""
    kind: Canary = "text"
    """text: the template, filled at random; mislabelled: pictures of the data with wrong labels; pattern: random blocks of colour."""
    template: str | None = None
    """For texts: with blanks {digits:N} or {words:N}, as in "My PIN is {digits:8}"; {words:12} unless this is given."""
    data: str = "embedded"
    """Where words or pictures come from: embedded, a folder, or a name on the Hugging Face hub."""
    split: str = "train"
    """Split of these data."""
    png: bool = False
    """For pictures: those to train with as PNGs, in a folder per class, in place of a parquet file."""


@dataclass(frozen=True, kw_only=True)
class Owned(Common):
    """What a question about a training of one's own takes."""

    release: Positional[Path]
    """What training left: the folder of a LoRA adapter, the folder of a whole model, or observation.safetensors."""
    base: str | None = None
    """The model that training began with: a folder, or a name on the Hugging Face hub; unless this is given, the one that an adapter's
    config names."""
    task: Task | None = None
    """Where it is a language model: what it was trained for; unless this is given, what its config says."""
    device: str = "cpu"
    """Where it runs: cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class ScoreCanaries(Owned):
    """Score each canary by what training changed, guess which were included, and say which epsilon that refutes."""

    canaries: Path
    """The folder of `gradleak canaries make`."""
    score: Literal["loss", "alignment"] | None = None
    """loss: by how much it fell since the base model; alignment: of its gradient with what was released. By loss unless this is given,
    of what holds no trained model by alignment."""
    guesses: int | None = None
    """How many canaries are guessed, half of them as included; to be fixed before anybody looks. A quarter unless this is given."""
    delta: float = 1e-5
    """The delta that the bound on epsilon is for."""
    model: str | None = None
    """package.module:factory, when the architecture is none of ours."""


@dataclass(frozen=True, kw_only=True)
class Extract(Owned):
    """Ask a causal language model for the texts that it was trained on, or which of a list of candidates is among them."""

    records: Path | None = None
    """Your texts: a .jsonl file with a field "text", or one text per line. Give these or --candidates."""
    prefix_tokens: int = 50
    """Tokens of a record that the attacker knows."""
    suffix_tokens: int = 50
    """Tokens that are to come out behind them; fewer where a record ends."""
    limit: int | None = None
    """Ask for the first so many records only."""
    tries: int = 100
    """How often the attacker may ask."""
    probability: float = 0.5
    """With which probability a record has to come out in so many tries to count."""
    temperature: float = 1.0
    """Of the sampling."""
    top_k: int | None = None
    """Sample of so many most likely tokens only; 1 is greedy decoding. All unless this is given."""
    candidates: Path | None = None
    """What the secret may be: one per line, or a .jsonl file with a field "text"."""
    template: str | None = None
    """For candidates: the text around them, with {} in their place, as in "My number is {}."; nothing unless this is given."""
