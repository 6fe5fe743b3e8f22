"""What `list` does: what there is, read off the sources; and, of a file, which attacks read it, why others do not, and what they cost."""

import dataclasses
import json
import textwrap
from typing import Any

from gradleak.cli import flags, sources
from gradleak.errors import BadInput

WIDTH = 120


def listed(args: flags.List) -> None:
    """Print it, as lines or as JSON."""
    if args.observation is not None:
        if args.what not in ("everything", "attacks"):
            raise BadInput(f"--for asks for attacks, not for {args.what}: leave {args.what} out.")
        rows = applying(args)
        print(json.dumps(rows, indent=1) if args.json else "\n".join(map(line, rows)))
        return
    everything: dict[str, Any] = {
        "attacks": [sources.attack(name) for name in sources.attack_names()],
        "defenses": sources.defenses(),
        "studies": sources.studies(),
        "models": sources.models(),
    }
    chosen = {name: held for name, held in everything.items() if args.what in ("everything", name)}
    if args.json:
        print(json.dumps(chosen, indent=1, default=as_json))
        return
    if "attacks" in chosen:
        print("Attacks", *map(attack_lines, chosen["attacks"]), sep="\n")
    if "defenses" in chosen:
        print("Defenses", *(beside(form, said) for form, said in chosen["defenses"].items()), sep="\n")
    if "studies" in chosen:
        print("Studies", *(beside(name, question) for name, question in chosen["studies"].items()), sep="\n")
    if "models" in chosen:
        print(f"Models\n  {', '.join(chosen['models'])}, a name on the hub, or package.module:factory of your own")


def beside(name: str, said: str) -> str:
    """A name, and what is said of it."""
    indent = " " * (35 if len(name) <= 32 else 6)
    return textwrap.fill(f"{name:32} {said}", WIDTH, initial_indent="  ", subsequent_indent=indent)


def attack_lines(attack: sources.Attack) -> str:
    """An attack: its name, what it sees and recovers."""
    told = [("Sees", attack.sees), ("Recovers", attack.recovers)]
    wrap = textwrap.TextWrapper(WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 16)
    return "\n".join([f"  {attack.name}", *(wrap.fill(f"{word:9} {said}") for word, said in told if said)])


def as_json(value: Any) -> Any:
    """An attack, and the type of a parameter."""
    if isinstance(value, sources.Attack | sources.Parameter):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.__name__ if isinstance(value, type) else str(value)


def applying(args: flags.List) -> list[dict[str, Any]]:
    """A row per attack: whether it reads the observation, why not, and its cost at most, in CPU-seconds; None: of a closed form."""
    from gradleak.attacks import ATTACKS
    from gradleak.attacks.attack import refusal
    from gradleak.audit.plan import duration, plan_of
    from gradleak.audit.scoring import SCORING
    from gradleak.cli.informed import informed

    observation = informed(args)
    model = observation.model
    public = SCORING[model.architecture.modality].public(args.data, args.public_split, model)
    attacks = {name: kind() for name, kind in ATTACKS.items()}
    plan = plan_of(observation, attacks, public, named=False)
    rows = []
    for name, attack in attacks.items():
        reason, needs = refusal(attack, observation), getattr(attack, "by_name_only", False)
        seconds = plan.seconds(name) if name in plan.efforts else None
        row = {"attack": name, "applies": not reason, "why": reason, "seconds": seconds, "bare": False, "cost": ""}
        if not reason:
            row["bare"] = not needs and name not in plan.skipped
            row["cost"] = "seconds to a few minutes" if seconds is None else f"at most {duration(seconds)}"
            row["why"] = plan.skipped.get(name, "Run where it is named." if needs else "")
        rows.append(row)
    return sorted(rows, key=lambda row: (not row["applies"], not row["bare"]))


def line(row: dict[str, Any]) -> str:
    """A row for a reader."""
    if not row["applies"]:
        return f"  {row['attack']:22} no: {row['why']}"
    more = "" if row["bare"] else f" In a bare audit: no. {row['why'][:1].upper()}{row['why'][1:]}"
    return f"  {row['attack']:22} {row['cost']}.{more}"
