"""What a checkpoint of the Trainer of transformers tells of its training: trainer_state.json. training_args.bin would tell more, but it is
a pickle, which could run code, and is never opened."""

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from gradleak.errors import BadInput, checked, shortened
from gradleak.observations.orders import Schedule, scheduled
from gradleak.observations.release import Reservation

STATE, ARGUMENTS = "trainer_state.json", "training_args.bin"
LARGEST = 2**26  # bytes
FEWEST, SAME = 3, 1e-9  # rates in a log that tell a schedule, and how far they may be from it, relative to the largest
FEW, MOST = 300, 100_000  # steps of which every warm-up is tried; and of which any is


class Log(msgspec.Struct, frozen=True):
    """One line of a Trainer's log."""

    step: int | None = None
    learning_rate: float | None = None


class Trainer(msgspec.Struct, frozen=True):
    """What matters in trainer_state.json, which the Trainer of transformers writes into a checkpoint."""

    global_step: Annotated[int, Meta(ge=0, le=1_000_000_000)]
    max_steps: int | None = None
    num_train_epochs: float | None = None
    train_batch_size: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    log_history: list[Log] = []

    @property
    def rates(self) -> list[float]:
        """The learning rates that were logged before this checkpoint."""
        lines = [line for line in self.log_history if line.step is None or line.step <= self.global_step]
        return [line.learning_rate for line in lines if line.learning_rate is not None]

    @property
    def rate(self) -> float | None:
        """The learning rate, where it was constant as far as the log tells: one step, or several entries that agree."""
        rates, few = self.rates, self.global_step > 1 and len(self.rates) < 2
        constant = bool(rates) and min(rates) > 0 and max(rates) <= min(rates) * (1 + 1e-6)
        return rates[0] if constant and not few else None

    @property
    def course(self) -> tuple[float, ...]:
        """The learning rate of each step: constant, or a schedule of transformers that gives what was logged; nothing where none does, or
        the log has too few entries to tell. Of two that do, that with the shorter warm-up."""
        if self.rate is not None:
            return (self.rate,) * min(self.global_step, MOST)
        logged = [(line.step, line.learning_rate) for line in self.log_history if line.learning_rate is not None]
        seen = {step: rate for step, rate in logged if step is not None and 0 < step <= self.global_step}
        planned, largest = self.max_steps or 0, max(seen.values(), default=0.0)
        if len(set(seen.values())) < FEWEST or not self.global_step <= planned <= MOST or not largest > 0:
            return ()
        warmups = range(planned) if planned <= FEW else (0, *(round(planned * k / 100) for k in range(1, 21)))
        for warmup in warmups:
            for kind in get_args(Schedule):
                shares = (*scheduled(kind, 1.0, planned, warmup=warmup), 0.0)
                for late in (1, 0):  # what is logged is the rate of the step itself, or, in older versions, of the next
                    now = {step: shares[step - late] for step in seen}
                    step = max(now, key=lambda s: now[s])
                    peak = seen[step] / now[step] if now[step] > 0 else 0.0
                    if peak > 0 and all(abs(rate - peak * now[s]) <= SAME * largest for s, rate in seen.items()):
                        return tuple(peak * share for share in shares[: self.global_step])
        return ()

    @property
    def per_epoch(self) -> int | None:
        """Steps in an epoch, where the log tells."""
        if not self.max_steps or not self.num_train_epochs or self.num_train_epochs < 1:
            return None
        return max(1, round(self.max_steps / self.num_train_epochs))

    @property
    def several(self) -> bool:
        """Whether there must have been several samples: a batch of them, or an epoch of several steps."""
        return (self.train_batch_size or 1) > 1 or (self.per_epoch or 1) > 1

    def remarks(self, folder: Path, *, used: bool, optimizer: str | None) -> tuple[Reservation, ...]:
        """What it tells of the training, and whether that was used as its recipe, with the optimiser that was given, or the usual one; and
        that nothing else in the folder was opened."""
        told = [f"{self.global_step} steps" if self.global_step > 1 else "1 step"]
        if self.rates:
            least, most = min(self.rates), max(self.rates)
            told.append(
                f"learning rate {most:g}" if least == most else f"learning rates between {least:g} and {most:g}"
            )
        if self.train_batch_size:
            told.append(f"{self.train_batch_size} samples a step on each device unless gradients were accumulated")
        if self.per_epoch:
            told.append(f"{self.per_epoch} steps an epoch")
        recipe = f"It does not say the optimiser: {optimizer} was given."
        if optimizer is None:
            recipe = "It does not say the optimiser: AdamW without decay is assumed, the Trainer's default."
        if used and self.rate is None:
            recipe = f"That is a schedule from {max(self.course):g} at most, which the recipe follows. {recipe}"
        elif not used and not self.course:
            recipe = "The learning rate is not known to have been constant, so no recipe is made of it, and what assumes one step is approximate."
        elif not used:
            recipe = "The recipe is that of the flags."
        sentence = f"{STATE} says of the training: {', '.join(told)}. {recipe}"
        remarks: list[Reservation] = [("trainer", "info" if used or self.course else "warning", sentence)]
        if (folder / ARGUMENTS).is_file():
            sentence = f"{ARGUMENTS} is a pickle, which could run code: it was not opened."
            remarks.append(("pickle", "info", sentence))
        return tuple(remarks)


def read_trainer(folder: Path) -> Trainer | None:
    """The state of the training, where a checkpoint tells it; BadInput where it is damaged."""
    path = folder / STATE
    if not path.is_file() or path.stat().st_size > LARGEST:
        return None
    try:  # Trainers write NaN, which is no JSON
        about: Any = json.loads(path.read_bytes().decode(), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({shortened(str(error))}): leave it out of the folder.") from error
    state = checked(about, Trainer, f"{path} is no state of a Trainer")
    return state if state.global_step else None
