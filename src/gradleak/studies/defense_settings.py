"""What the study of defenses plays: settings, for each kind of data from its own list of defenses and attacks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gradleak.studies.study import Row, Size

Case = tuple[str, str, int]  # the model, what is shared, of how many samples
NONE, UTILITY, GRADIENT, ADAPTER = "none", "training", "gradient", "adapter"


@dataclass(frozen=True)
class Setting:
    """model: a perceptron for pictures, an encoder or decoder for texts. shared: a gradient of `batch` samples, or an adapter. defense: as
    --defense takes it, several with blanks between. attack: a name, or training. knows: whether the attacker is told."""

    model: str
    shared: str
    batch: int
    defense: str
    attack: str
    knows: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The defenses, one by one."""
        return () if self.defense == NONE else tuple(self.defense.split())


@dataclass(frozen=True)
class Kind:
    """What is played with one kind of data.

    noun     of one sample
    measure  of what leaks, in words
    every    {(model, what is shared, of how many samples): defenses}; smoke: at that size
    by       {(model, what is shared, of how many samples): attacks}
    unaware  of the attacks, those that are tried without the knowledge, too; untold: those to whom it would change nothing
    smoke_by attacks that are tried at smoke size
    left_out defenses that are tried at paper size only
    leaked   what a row says that an attack has of its samples, in [0, 1]; chance: what somebody has who saw nothing
    """

    noun: str
    measure: str
    every: Mapping[Case, tuple[str, ...]]
    smoke: Mapping[Case, tuple[str, ...]]
    by: Mapping[Case, tuple[str, ...]]
    unaware: tuple[str, ...]
    untold: tuple[str, ...]
    smoke_by: tuple[str, ...]
    left_out: tuple[str, ...]
    leaked: Callable[[Row], float]
    chance: Callable[[Row], float]

    def settings(self, size: Size) -> Iterator[Setting]:
        """Every defense: what it costs, then every attack that knows it, and that does not."""
        for case, defenses in (self.smoke if size == "smoke" else self.every).items():
            for defense in defenses:
                if size == "small" and defense in self.left_out:
                    continue
                yield Setting(*case, defense, UTILITY)
                for attack in self.smoke_by if size == "smoke" else self.by[case]:
                    yield Setting(*case, defense, attack)
                    if defense != NONE and size != "smoke" and (attack in self.unaware or size == "paper"):
                        yield Setting(*case, defense, attack, knows=False)
