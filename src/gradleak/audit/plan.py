"""What an audit is going to take, told before it begins: every attack says how many simulated releases it needs, and one of them is
computed for its time and memory. What takes too long for an audit that nobody asked it of is left out, and said so."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.attack import Attack, Effort, refusal
from gradleak.attacks.label_counts.label_counts import last_layer_withheld
from gradleak.audit.scoring import SCORING
from gradleak.errors import BadInput, NotObserved
from gradleak.observations.observation import Observation
from gradleak.observations.work import ROOM, Work, work_of

LONGEST = 1_800.0  # CPU-seconds that an attack may take which was not asked for by name
# Operations a second on one core: of small products side by side, which alone spend their time on calls; of large matrices.
SLOWEST, PRODUCTS = 5e9, 2e10
WIDE = 25  # rows side by side, at most, as far as there is `ROOM`
GIB = 2**30
MEMORY = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # of the machine, and of a container
OWN = Path("/proc/self/statm")


@dataclass(frozen=True)
class Plan:
    """efforts  of the attacks that tell theirs
    step     what one step of a simulated release takes, or None where no attack asks
    steps    of a simulation
    held     bytes that the observation takes
    taken    bytes that this process has already
    free     bytes that the machine has left, or None where nobody knows
    runs     of each attack: two where a control is attacked too
    skipped  attacks that are not tried, and why
    """

    efforts: Mapping[str, Effort]
    step: Work | None
    steps: int
    held: int
    taken: int
    free: int | None
    runs: int
    skipped: Mapping[str, str]

    def seconds(self, name: str) -> float:
        """Of this attack, at most."""
        assert self.step is not None
        effort, step = self.efforts[name], self.step
        arithmetic = min(step.seconds, step.operations / SLOWEST)
        simulated = self.steps * (effort.simulations * step.seconds + effort.abreast * arithmetic)
        return self.runs * (simulated + effort.algebra / PRODUCTS)

    def bytes(self, name: str) -> int:
        """Beside what is held anyway, of this attack, at most."""
        assert self.step is not None
        effort, step = self.efforts[name], self.step
        abreast = min(ROOM, WIDE * step.bytes) if effort.abreast else 0
        return max(int(effort.together * step.bytes), abreast + int(effort.matrices))

    def sentence(self) -> str:
        """One line for somebody who waits."""
        if self.step is None or not self.efforts:
            return f"Plan: closed forms, of seconds to a few minutes, and {size(self.taken + self.held)} or more."
        tried = [name for name in self.efforts if name not in self.skipped]
        parts = [f"{name} {duration(self.seconds(name))}" for name in tried]
        total, most = duration(sum(map(self.seconds, tried))), max(map(self.bytes, tried), default=self.step.bytes)
        each = f"{total} ({', '.join(parts)})" if len(parts) > 1 else "".join(parts)
        searches = f"at most {each}, less where a search converges; closed forms besides, of seconds to a few minutes"
        said = f"Plan: {searches if parts else 'closed forms, of seconds to a few minutes'}"
        said += f"; {size(self.taken + self.held + most)} of memory. One simulated release takes "
        said += f"{duration(self.steps * self.step.seconds)} and {size(self.step.bytes)}."
        left = [
            f"{name} ({duration(self.seconds(name))}, {size(self.held + self.bytes(name))})" for name in self.skipped
        ]
        if left:
            said += f" Not tried, which says nothing about what leaks: {', '.join(left)}. Name one with --attacks to run it."
        return said


def plan_of(
    observation: Observation[Any],
    attacks: Mapping[str, Attack],
    public: Any,
    *,
    named: bool,
    scored: bool = False,
    repeats: int = 1,
    device: str = "cpu",
) -> Plan:
    """What these attacks are going to take on this observation.

    public: data of the observation's kind, by which a simulation is timed. named: whether somebody has asked for these very attacks:
    those are tried however long they take. scored: whether a control is attacked too. repeats: under how many seeds each runs. Raises
    BadInput where the machine has too little memory for the model, or for an attack that was asked for.
    """
    where = torch.device(device)
    held, free = bytes_of(observation), free_bytes(where)
    if free is not None and 2 * held > free:
        raise BadInput(
            f"This takes {size(2 * held)} at least, and {size(free)} of memory are free: free some, or use another machine."
        )
    efforts = {
        name: effort for name, attack in attacks.items() if (effort := effort_of(attack, observation)) is not None
    }
    step = step_of(observation.to(where), public, where) if efforts else None
    runs = repeats + (1 if scored else 0)
    taken = max(resident(), held)
    plan = Plan(efforts if step else {}, step, observation.release.steps(), held, taken, free, runs, {})
    skipped: dict[str, str] = {}
    for name in plan.efforts:
        needed = held + plan.bytes(name)
        short = (
            f"would take {size(needed)} of memory, and {size(free)} are free"
            if free is not None and needed > free
            else ""
        )
        if short and named:
            raise BadInput(f"{name} {short}: lower its effort (try --attacks {name} --help), or use another machine.")
        if short:
            skipped[name] = f"{short}; this says nothing about what leaks."
        elif plan.seconds(name) > LONGEST and not named:
            count = plan.runs * (plan.efforts[name].simulations + plan.efforts[name].abreast)
            cost = f"{duration(plan.seconds(name))}, {count:,.0f} simulated releases"
            skipped[name] = (
                f"would cost up to {cost}: run it with --attacks {name}; this says nothing about what leaks."
            )
    return replace(plan, skipped=skipped)


def effort_of(attack: Any, observation: Observation[Any]) -> Effort | None:
    """What it says that it is going to take; None where it says nothing, or is going to refuse anyway."""
    if refusal(attack, observation) or not hasattr(attack, "effort"):
        return None
    if last_layer_withheld(observation) and observation.batch_size:  # labels will be read before attacks begin
        observation = replace(observation, read_labels=torch.zeros(observation.batch_size, dtype=torch.int64))
    try:
        effort: Effort = attack.effort(observation)
    except (NotObserved, BadInput):
        return None
    return effort


def step_of(observation: Observation[Any], public: Any, where: torch.device) -> Work | None:
    """What one step of a simulation takes, of as many public samples as there are private ones; None where there is no simulation."""
    model, count = observation.model, observation.batch_size or 1
    one = replace(observation, release=observation.release.one_step())
    try:
        inputs, labels = SCORING[model.architecture.modality].sample(model, public, count, 0)
        inputs, labels = (part.to(where) if isinstance(part, torch.Tensor) else part for part in (inputs, labels))
        return work_of(lambda: one.simulate(inputs, labels), where)
    except (BadInput, NotObserved, NotImplementedError):
        return None


def bytes_of(observation: Observation[Any]) -> int:
    """Of the model and of what was released."""
    model = observation.model
    tensors = (*model.parameters.values(), *(model.buffers or {}).values(), *observation.released.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_bytes(where: torch.device) -> int | None:
    """Bytes that are free there; None where nobody knows."""
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    machine, container = MEMORY
    if where.type != "cpu" or not machine.is_file():
        return None
    lines = dict(line.split(":", 1) for line in machine.read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    limit = container.read_text().strip() if container.is_file() else "max"
    return min(free, int(limit)) if limit.isdigit() else free


def resident() -> int:
    """Bytes of memory that this process has; 0 where nobody knows."""
    if not OWN.is_file():
        return 0
    return int(OWN.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def duration(seconds: float) -> str:
    """CPU time in words."""
    for unit, name in ((3600, "CPU-hours"), (60, "CPU-minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}" if seconds >= 10 * unit else f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} CPU-seconds" if seconds < 10 else f"{seconds:.0f} CPU-seconds"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{max(count / 2**20, 0.1):.1f} MiB"
