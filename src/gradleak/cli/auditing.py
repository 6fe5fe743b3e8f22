"""What `attack`, `audit` and `demo` do: an observation, attacks, a record that is written again after each of them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from gradleak.attacks import ATTACKS
from gradleak.attacks.attack import refusal
from gradleak.attacks.parameters import built
from gradleak.attacks.search.start import Given
from gradleak.attacks.seed import with_start_recovered
from gradleak.audit.loop import Audited
from gradleak.audit.loop import audit as run_audit
from gradleak.audit.membership.audited import membership
from gradleak.audit.membership.words import with_membership
from gradleak.audit.metrics import lpips_from
from gradleak.audit.plan import plan_of
from gradleak.audit.privacy import mechanism_of
from gradleak.audit.progress import progress
from gradleak.audit.scoring import SCORING
from gradleak.audit.verdict import judged
from gradleak.audit.written import describe, finish, finished_in, keep_shown, untried, written_audit
from gradleak.cli import flags
from gradleak.cli.commands import new_record
from gradleak.cli.folders import folder_for, fresh_folder, same_command
from gradleak.cli.informed import informed
from gradleak.cli.inputs import check_device, observed_files
from gradleak.cli.priors import REFINING, UNDER_PRIOR, with_prior
from gradleak.errors import BadInput, shortened
from gradleak.formats.observation_file import load_observation, usable_labels
from gradleak.formats.reconstruction_file import load_reconstruction, save_reconstruction
from gradleak.formats.secret_file import Secret, load_secret
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.observation import Observation
from gradleak.observations.whole_weights import whole_weights
from gradleak.report import record
from gradleak.report.gate import check_bar, exit_code
from gradleak.report.membership import Membership
from gradleak.report.pdf import browser, printed
from gradleak.report.private import private
from gradleak.report.redaction import redacted
from gradleak.victims.demo import DEMO

CLOSED = ("analytic",)  # attacks in closed form, which are tried on what was trained as a whole beside an adapter


def attack(args: flags.Attack, options: dict[str, dict[str, Any]]) -> None:
    """Write reconstruction.safetensors, what it shows, and record.json, from the observation alone."""
    check_device(args.device)
    check_named([args.attack], options)
    out, observation = folder_for(args), informed(args)
    [(name, chosen)] = built(options).items()
    if reason := refusal(chosen, observation):
        raise BadInput(f"{name} cannot run here. {reason} {reading(observation)}")
    public = public_data(args, observation)
    inputs = observed_files(args)
    if args.refine is not None and name != REFINING:
        raise BadInput(f"--refine goes with --attack {REFINING}.")
    chosen = with_prior({name: chosen}, args, observation, public)[name]
    if args.start is not None:
        chosen, inputs = started(name, chosen, args.start, observation), [*inputs, args.start]
    written = new_record("attack", args, options, inputs)
    if args.resume and went_on(written, out):
        print(shown(written), f"See {out / 'report.html'}.", sep="\n")
        return
    describe(written, observation, "")
    with progress() as start:
        for done in run_audit(observation, {name: chosen}, public, seed=args.seed, device=args.device, on_step=start):
            if done.reconstruction is None:
                raise BadInput(done.result["status"].removeprefix("Not run: "))
            written["results"].append(done.result)
            save_reconstruction(done.reconstruction, out / "reconstruction.safetensors")
            with private():
                keep_shown(done, out)
            judged(written, {})
            finish(written, out)
            print(said(done), f"See {out / 'report.html'}.", sep="\n")


def audit(args: flags.Audit, options: dict[str, dict[str, Any]]) -> int:
    """Write record.json, report.html and what was recovered; after each attack, so that an interrupt loses one at most. Returns the
    exit code that `gate` gives."""
    with lpips_from(args.lpips):
        return whole_audit(args, options)


def whole_audit(args: flags.Audit, options: dict[str, dict[str, Any]]) -> int:
    """`audit`, where what is measured is settled."""
    check_device(args.device)
    check_bar(args.fail_on, members=args.non_members is not None)
    if args.pdf:
        browser()
    if args.repeats < 1:
        raise BadInput(f"--repeats {args.repeats} would try nothing: give at least 1.")
    if args.attacks is not None:
        check_named(args.attacks, options)
    out, observation = folder_for(args), informed(args)
    attacks = built(options)
    if args.members is None and (args.non_members is not None or args.limit is not None):
        name = "--non-members" if args.non_members is not None else "--limit"
        raise BadInput(f"{name} goes with --members, the samples that it was trained on.")
    if args.attacks is None and args.members is not None:
        attacks = {}
    elif args.attacks is None:
        modality = observation.model.architecture.modality
        added = UNDER_PRIOR if args.prior is not None else ()
        usual = [n for n, a in attacks.items() if n in added or not getattr(a, "by_name_only", False)]
        attacks = {n: attacks[n] for n in usual if attacks[n].modality == modality}
    secret = load_secret(args.secret) if args.secret else None
    if secret is not None and args.secret is not None:
        SCORING[observation.model.architecture.modality].check(secret.inputs, observation.model)
        usable_labels(secret.labels, observation.model, len(secret), args.secret)
    samples = [Path(path) for path in (args.members, args.non_members) if path is not None and Path(path).is_file()]
    inputs = [*observed_files(args), *([args.secret] if args.secret else []), *samples]
    written = new_record("audit", args, {name: options[name] for name in attacks}, inputs)
    stream = sys.stderr if args.json else sys.stdout
    if args.resume and went_on(written, out):
        print(f"{len(written['results'])} attacks are finished in {out}.", file=stream)
    mechanism_of(
        observation, private := private_training(args)
    )  # what contradicts the observation is told before anything runs
    about: dict[str, Any] = {
        "told": private,
        "seed": args.seed,
        "device": args.device,
        "redact": args.redact,
        "repeats": args.repeats,
    }
    found = None if args.members is None else written.get("membership") or told_members(args, observation, written, out)
    if attacks:
        left, public = dict[str, list[str]](), public_data(args, observation)
        attacks = with_prior(attacks, args, observation, public)
        finished = finished_in(written, observation.release.name)
        missing = {title: one for title, one in attacks.items() if title not in finished}
        known = {"named": args.attacks is not None, "scored": secret is not None}
        plan = plan_of(observation, missing, public, **known, repeats=args.repeats, device=args.device)
        out.mkdir(parents=True, exist_ok=True)  # where that fails, nothing was said yet
        print(plan.sentence(), flush=True, file=stream)
        audit_one(observation, attacks, public, secret, written, left, out, stream, **about, skipped=plan.skipped)
        whole, closed = whole_weights(observation), {name: a for name, a in attacks.items() if name in CLOSED}
        if whole is not None and any(done.reconstruction is not None for done in run_audit(whole, closed, None)):
            audit_one(whole, closed, public, secret, written, left, out, stream, name="weights beside", **about)
    if attacks and found is not None:
        with_membership(written, found)
        finish(written, out, args.redact)
    if args.pdf:
        printed((out / "report.html").read_text(encoding="utf-8"), out / "report.pdf")
    if args.verbose:
        print(*details(redacted(written) if args.redact else written), sep="\n", file=stream)
    print(shown(written, args.redact), f"See {out / 'report.html'}.", sep="\n", file=stream)
    if args.json:
        print((out / "summary.json").read_text(encoding="utf-8"), end="")
    return exit_code(written, args.fail_on)


def told_members(args: flags.Audit, observation: Observation[Any], written: record.Record, out: Path) -> Membership:
    """Which samples of --members an attacker tells from others, put into the record and the report."""
    describe(written, observation, "")
    with progress() as start:
        about: Any = {"seed": args.seed, "limit": args.limit, "redacted": args.redact, "on_step": start}
        found = membership(observation, str(args.members), args.non_members, **about)
    with_membership(written, found)
    finish(written, out, args.redact)
    return found


def demo(args: flags.Demo) -> None:
    """One embedded photograph, a LoRA adapter and a gradient made of it, an adapter of four, attacks on all, one report."""
    from gradleak.cli.capture import kept

    check_device(args.device)
    out = fresh_folder(args.out)
    written = new_record("demo", args, {}, [])
    out.mkdir(parents=True, exist_ok=True)  # where that fails, nothing was said yet
    print("Two adapters and a gradient are made and attacked, which takes about a CPU-minute.", flush=True)
    left: dict[str, list[str]] = {}
    for name, (victim, shown_with) in DEMO.items():
        with progress() as start:
            kept(*victim(out / name, args.seed, start), out / name)
        observation = with_start_recovered(load_observation(out / name / "observation.safetensors"))
        secret = load_secret(out / name / "secret.safetensors")
        public = SCORING[observation.model.architecture.modality].public("embedded", "train", observation.model)
        attacks = {attack: ATTACKS[attack](**given) for attack, given in shown_with.items()}
        about: dict[str, Any] = {"seed": args.seed, "device": args.device, "name": name, "bound": False}
        audit_one(observation, attacks, public, secret, written, left, out, sys.stdout, **about)
    print(shown(written), f"Open {out / 'report.html'} in a browser.", sep="\n")


def audit_one(
    observation: Observation[Any],
    attacks: dict[str, Any],
    public: Any,
    secret: Secret | None,
    written: record.Record,
    left: dict[str, list[str]],
    out: Path,
    stream: TextIO,
    **about: Any,
) -> None:
    """Audit one observation into a record that may hold others, with progress, and say what each attack found; about: as
    `written_audit` takes it."""
    with progress() as start:
        for done in written_audit(
            observation, attacks, public, written, out, secret=secret, left=left, on_step=start, **about
        ):
            if done.reconstruction is not None:
                print(said(done, about.get("redact", False)), file=stream)


def went_on(written: record.Record, out: Path) -> bool:
    """Put what was finished in a folder into the record of the same command; whether there was anything. What was left out for want of time or
    memory is asked again."""
    path = out / "record.json"
    if not path.is_file():
        return False
    before = record.read(path)
    now = redacted(written) if before.get("redacted") else written
    same_command(out, before["command"], now["command"])
    written["results"] = [row for row in before["results"] if not row["status"].startswith("Not tried: ")]
    written["threat_model"] = before["threat_model"]
    if "membership" in before:
        written["membership"] = before["membership"]
    written["metrics"], written["controls"] = before.get("metrics", {}), before.get("controls", {})
    written["verdict"], written["verdicts"] = before["verdict"], before.get("verdicts", [])
    return bool(written["results"])


def shown(written: record.Record, redact: bool = False) -> str:
    """The table of the attacks and the verdict, for the terminal."""
    from gradleak.report.terminal import text

    return text(redacted(written) if redact else written)


def details(written: record.Record) -> list[str]:
    """What did not run and why, and what the checks say."""
    rows = [f"{row['attack']}: {row['status']}" for row in written["results"] if not row.get("ran")]
    flags = dict.fromkeys((flag["level"], flag["sentence"]) for row in written["results"] for flag in row["flags"])
    return [*rows, *(f"{level}: {sentence}" for level, sentence in flags)]


def private_training(args: flags.Audit) -> Mechanism | None:
    """The private training that the flags tell; BadInput where they tell a part of one."""
    given = {
        "--noise-multiplier": args.noise_multiplier,
        "--sample-rate": args.sample_rate,
        "--dp-steps": args.dp_steps,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and args.delta is None:
        return None
    if args.noise_multiplier is None or args.sample_rate is None or args.dp_steps is None:
        raise BadInput(
            f"A private training is told by its noise, its sample rate and its steps: give {' and '.join(missing)} too."
        )
    delta = 1e-5 if args.delta is None else args.delta
    return Mechanism(
        noise_multiplier=args.noise_multiplier, sample_rate=args.sample_rate, steps=args.dp_steps, delta=delta
    )


def check_named(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """BadInput where the parameters are not those of the attacks that were asked for."""
    if set(names) != set(options):
        given = ", ".join(map(shortened, options)) or "none"
        raise BadInput(f"Parameters are given of {given}, and what is to run is {', '.join(map(shortened, names))}.")


def reading(observation: Observation[Any]) -> str:
    """Which attacks read such an observation, as a sentence."""
    return f"Attacks that do: {', '.join(untried(observation, {}))}."


def started(name: str, attack: Any, path: Path, observation: Observation[Any]) -> Any:
    """The attack on this observation, beginning at the reconstruction in this file."""
    if "start" not in {field.name for field in fields(attack)}:
        able = [other for other, kind in ATTACKS.items() if "start" in {field.name for field in fields(kind)}]
        raise BadInput(f"{name} is no search and has no start: --start goes with {', '.join(able)}.")
    reconstruction = load_reconstruction(path)
    usable_labels(reconstruction.labels, observation.model, len(reconstruction.value), path)
    return replace(attack, start=Given(reconstruction))


def public_data(args: flags.Seen, observation: Observation[Any]) -> Any:
    """What everybody may know, as the model takes it."""
    model = observation.model
    return SCORING[model.architecture.modality].public(args.data, args.public_split, model)


def said(done: Audited, redact: bool = False) -> str:
    """An attack's status for the terminal, and the texts that came out, unless they are to be kept to themselves."""
    row = done.result
    texts = (
        [] if redact else row["shown"]["reconstruction"] if row.get("media") == "text/plain" and "shown" in row else []
    )
    lines = [f"{row['attack']}: {row['status']}", *(f"  {shortened(text)}" for text in texts if text)]
    return "\n".join(lines)
