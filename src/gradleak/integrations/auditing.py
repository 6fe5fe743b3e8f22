"""An audit that somebody else's training waits for: a few attacks, a limit of time, everything in one folder, and a paragraph for the
model card that holds nothing of what was recovered."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.adam_step import with_step_undone
from gradleak.attacks.factor import with_factor_found
from gradleak.attacks.parameters import check_names
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.scoring import SCORING
from gradleak.audit.written import written_audit
from gradleak.errors import NotObserved
from gradleak.formats.observation_file import save_observation
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import MODELS, Architecture
from gradleak.observations.observation import Observation, a
from gradleak.report import record
from gradleak.report.risk import risk

# Those with a closed form, or a search of seconds: no priors, no networks to train, no gradient of a gradient a thousand times.
CHEAP = (
    *("analytic", "recursive", "patch-embedding", "token-span", "activation-patterns", "unmixing"),
    *("adam-epsilon", "adam-unmixing"),
    *("dager", "sparse-words"),
)
LARGEST = 2**27  # numbers of a model that an observation is written to disk with: half a gigabyte

SAID = {  # by the level of a verdict
    "recovered": "All private samples that were looked for came back.",
    "partial": "Private samples, or parts of them, came back.",
    "nothing": "No private sample came back. That proves nothing: another attack may find more.",
    "absent": "No private sample came back: what was shared does not hold the information.",
    "unscored": "Nothing that was found could be compared with the private samples, or proves itself: this says nothing.",
    "void": "A check says that these results cannot be relied on: this says nothing.",
}


def audit_to(
    observation: Observation[Any],
    out: Path,
    *,
    attacks: Sequence[str] = CHEAP,
    seconds: float = 60.0,
    secret: Secret | None = None,
    seed: int = 0,
) -> record.Record:
    """Audit into a folder: record.json, report.html, what was recovered, leakage.md, and observation.safetensors where the model has at
    most `LARGEST` numbers; from that `gradleak rerun` and other attacks go on.

    seconds: when these are over, an attack ends at its next step, and the others do not begin. Attacks of one closed form have
    no steps: the audit may last as long as one of them more. What the release determines at all is not asked; `gradleak rerun` asks it.
    Random numbers of the training are left as they are. Raises BadInput for unknown attacks, and for a secret that is not of this model.
    """
    check_names(list(attacks))
    observation = observation.to(torch.device("cpu"))  # the training's device is left to the training
    modality = observation.model.architecture.modality
    every: dict[str, Any] = {name: ATTACKS[name]() for name in attacks}
    chosen = {name: attack for name, attack in every.items() if attack.modality == modality}
    out.mkdir(parents=True, exist_ok=True)
    command: record.Command = {"name": "integration", "arguments": {"attacks": list(chosen), "seconds": seconds}}
    if sum(p.numel() for p in observation.model.parameters.values()) <= LARGEST:
        file = out / "observation.safetensors"
        save_observation(observation, file)
        arguments: dict[str, Any] = {
            "observation": str(file.resolve()),
            "attacks": list(chosen),
            "seed": seed,
            "out": str(out),
        }
        architecture = observation.model.architecture
        if isinstance(architecture, Architecture) and architecture.name not in MODELS:
            arguments["model"] = architecture.name
        command = {"name": "audit", "arguments": arguments, "attacks": {name: {} for name in chosen}}
    written = record.new_record(command, seed, [])
    with torch.random.fork_rng(devices=[]):
        ready = with_factor_found(with_step_undone(observation))
        public = SCORING[modality].public("embedded", "train", ready.model)
        limit = within(seconds)
        for _ in written_audit(
            ready, chosen, public, written, out, secret=secret, seed=seed, on_step=limit, bound=False
        ):
            pass
    (out / "leakage.md").write_text(card(written, ready), encoding="utf-8")
    return written


def within(seconds: float) -> Callable[[str], OnStep]:
    """For the audit: ends an attack at its first step after so many seconds from now, and all that would begin then."""
    end = time.monotonic() + seconds

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise NotObserved(f"The {seconds:g} seconds of this audit were over.")

    def start(_: str) -> OnStep:
        check()
        return check

    return start


def card(written: record.Record, observation: Observation[Any]) -> str:
    """A paragraph for a model card, made of the record. No word or picture that was recovered is in it."""
    ran = [row["attack"] for row in written["results"] if row.get("ran")]
    late = [
        row["attack"] for row in written["results"] if not row.get("ran") and "seconds of this audit" in row["status"]
    ]
    known = [str(row["item"]) for row in observation.threat_model() if row["revealed"]]
    tried = f"tried {', '.join(ran)}" if ran else "found no attack among those asked for that could run"
    more = f" For {', '.join(late)} there was no time." if late else ""
    samples = "" if observation.batch_size is None else f" made of {observation.batch_size} samples"
    found = risk(written)
    label = "" if found is None else f"\n\nRisk of sharing it: **{found.label}** ({found.why})."
    return (
        "## What this gives away about its training data\n\n"
        f"gradleak {written['gradleak']} audited {a(observation.release.name)}{samples}, and {tried}.{more} "
        f"{SAID[written['verdict']['level']]} The attacker was taken to know: {', '.join(known)}."
        f"{label}\n"
    )
