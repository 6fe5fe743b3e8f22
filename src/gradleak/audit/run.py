"""An audit in one call: `gradleak audit` for Python."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gradleak.attacks import ATTACKS
from gradleak.attacks.adam_step import with_step_undone
from gradleak.attacks.factor import with_factor_found
from gradleak.attacks.merged import with_merged_recovered
from gradleak.attacks.parameters import check_names
from gradleak.attacks.seed import has_open_start, with_start_recovered
from gradleak.audit.loop import audit
from gradleak.audit.membership.audited import membership
from gradleak.audit.membership.words import with_membership
from gradleak.audit.plan import plan_of
from gradleak.audit.scoring import SCORING
from gradleak.audit.verdict import judged
from gradleak.audit.written import describe, untried
from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_observation, usable_labels
from gradleak.formats.peft import read_adapter_and_base
from gradleak.formats.secret_file import Secret, load_secret
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe
from gradleak.report import record
from gradleak.report.report import Report


def run_audit(
    observation: Observation[Any] | str | Path,
    attacks: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    secret: Secret | str | Path | None = None,
    base: str | Path | None = None,
    recipe: Recipe | None = None,
    members: str | None = None,
    non_members: str | None = None,
    limit: int | None = None,
    public: Any = "embedded",
    split: str = "train",
    seed: int = 0,
    repeats: int = 1,
    device: str = "cpu",
    progress: bool = True,
) -> Report:
    """Run attacks on an observation, score them if the secret is there, and return the report.

    observation  what the attacker sees: a value, the place of an observation.safetensors, or the folder of a LoRA adapter
    attacks      names, or attacks such as `DLG(restarts=1)`, or {name: attack}; all that recover such data and end within half an hour
                 unless this is given
    secret       the private data, or the place of a secret.safetensors
    base         of an adapter's folder: its base model, a folder or a name on the hub; what its config names unless this is given
    recipe       of an adapter's folder: how it was trained; one step, compared in direction, unless this is given
    members      samples that it was trained on, "DATA" or "DATA:SPLIT", to ask which of them an attacker tells from non_members, fresh ones
                 of the same kind; limit: so many of each at most. Attacks run beside only where they are given
    public       what everybody may know: embedded, a folder, a name on the hub, or data of the observation's kind; split: of these
    repeats      under how many seeds each attack runs, from `seed` on; the run that explains most is kept
    progress     show how far it is: bars in a notebook or a terminal, else a line a minute on stderr

    Raises BadInput for what cannot be read, for unknown attacks, and for a secret of another kind.
    """
    if members is None and (non_members is not None or limit is not None):
        raise BadInput("non_members and limit go with members, the samples that it was trained on.")
    seen = known(observed(observation, base, recipe))
    model, modality = seen.model, seen.model.architecture.modality
    hidden = load_secret(Path(secret)) if isinstance(secret, str | Path) else secret
    if hidden is not None:
        SCORING[modality].check(hidden.inputs, model)
        usable_labels(hidden.labels, model, len(hidden), Path(hidden.source))
    data = SCORING[modality].public(public, split, model) if isinstance(public, str | Path) else public
    chosen = {} if attacks is None and members is not None else named(attacks, modality)
    plan = plan_of(seen, chosen, data, named=attacks is not None, scored=hidden is not None, device=device)
    command: record.Command = {"name": "run_audit", "arguments": {"attacks": list(chosen), "public": str(public)[:100]}}
    written, found = record.new_record(command, seed, []), {}
    describe(written, seen, "")
    with shown(progress) as start:
        about: dict[str, Any] = {"secret": hidden, "seed": seed, "repeats": repeats, "device": device, "on_step": start}
        for done in audit(seen, chosen, data, **about, skipped=plan.skipped):
            written["results"].append(done.result)
            if done.reconstruction is not None:
                found[done.result["attack"]] = done.reconstruction
        told = (
            None if members is None else membership(seen, members, non_members, seed=seed, limit=limit, on_step=start)
        )
    if chosen or told is None:
        judged(written, {seen.release.name: untried(seen, set(chosen) - set(plan.skipped))})
    if told is not None:
        with_membership(written, told)
    return Report(written, found)


def observed(given: Observation[Any] | str | Path, base: str | Path | None, recipe: Recipe | None) -> Observation[Any]:
    """The observation itself, or what lies there."""
    if isinstance(given, str | Path) and Path(given).is_dir():
        return read_adapter_and_base(Path(given), base, recipe=recipe)
    if base is not None or recipe is not None:
        raise BadInput("base and recipe belong to the folder of an adapter: an observation says them itself.")
    return load_observation(Path(given)) if isinstance(given, str | Path) else given


def known(observation: Observation[Any]) -> Observation[Any]:
    """With what everybody can know besides: the start that a usual seed drew, the step behind a change, the factor of a release."""
    recover = with_start_recovered if has_open_start(observation) else with_merged_recovered
    return with_factor_found(with_step_undone(recover(observation)))


def named(attacks: Sequence[Any] | Mapping[str, Any] | None, modality: str) -> dict[str, Any]:
    """{name: attack} of names and attacks; of nothing, all that a bare audit runs."""
    if attacks is None:
        every = {name: kind() for name, kind in ATTACKS.items() if kind.modality == modality}  # type: ignore[attr-defined]
        return {name: attack for name, attack in every.items() if not getattr(attack, "by_name_only", False)}
    if isinstance(attacks, Mapping):
        return dict(attacks)
    if isinstance(attacks, str):
        raise BadInput(f"attacks is a list of names or attacks: give [{attacks!r}].")
    check_names([one for one in attacks if isinstance(one, str)])
    names = {kind: name for name, kind in ATTACKS.items()}
    return {
        one if isinstance(one, str) else names.get(type(one), type(one).__name__): ATTACKS[one]()
        if isinstance(one, str)
        else one
        for one in attacks
    }


def shown(progress: bool) -> Any:
    """Around an audit: what opens its bars, or nothing."""
    if not progress:
        return nullcontext(None)
    from gradleak.audit import progress as bars

    return bars.progress()
