"""What each command does. Results go to a folder of their own, the record first, everything else from it."""

import base64
import csv
import inspect
import io
import itertools
import re
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from gradleak.attacks import ALL_ATTACKS, ATTACKS, TEXT_ATTACKS, WEIGHTS_ATTACKS
from gradleak.attacks.search.start import Given
from gradleak.audit import audit as auditing
from gradleak.cli import flags as arguments
from gradleak.cli import text_commands
from gradleak.cli.capture import capture, capture_adapter
from gradleak.cli.inputs import check_device, file_hash, fresh_folder, observed, observed_files
from gradleak.cli.progress import progress
from gradleak.errors import BadInput
from gradleak.formats import observation_file as files
from gradleak.modalities.networks import MODELS
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.observation import PictureObservation, TextObservation
from gradleak.observations.releases import Weights
from gradleak.report import html, record
from gradleak.report.sheet import save_sheet

PUBLIC_POOL = 2_000  # pictures that priors, controls and decoys are made of
RERUNNABLE = ("demo", "attack", "audit", "reproduce")  # the commands that leave a record
DEMO_ATTACKS = ("map-inversion",)  # on the adapter
DEMO_ROWS = (0,)  # of the embedded pictures: an astronaut's face


def attack(args: arguments.Attack, attacks: dict[str, Any], argv: list[str]) -> None:
    """Write reconstruction.safetensors, its pictures and record.json, from the observation alone."""
    check_device(args.device)
    if (text := text_commands.observed_text(args)) is not None:
        return examine_text(text, args, attacks, argv, None)
    out, observation = fresh_folder(args.out), observed(args)
    public = public_pictures(args, observation)
    attacks = {name: auditing.with_prior(attack, public) for name, attack in attacks.items()}
    inputs = observed_files(args)
    if args.start is not None:
        attacks = {name: started(name, attack, args.start) for name, attack in attacks.items()}
        inputs = [*inputs, args.start]
    written = new_record(argv, args.seed, observation, inputs)
    with progress() as start:
        for done in auditing.audit(observation, attacks, None, seed=args.seed, device=args.device, on_step=start):
            if done.reconstruction is None:
                raise BadInput(done.result["status"].removeprefix("Not run: "))
            written["results"].append(done.result)
            files.save_reconstruction(done.reconstruction, out / "reconstruction.safetensors")
            save_pictures(done, out)
            print(f"{done.result['status']} See {out}.")
    finish(written, out, report=False)


def audit(args: arguments.Audit, attacks: dict[str, Any], argv: list[str]) -> None:
    """Write record.json, report.html and the pictures; after each attack, so that an interrupt loses one at most."""
    check_device(args.device)
    if (text := text_commands.observed_text(args)) is not None:
        return examine_text(text, args, attacks, argv, args.secret)
    out, observation = fresh_folder(args.out), observed(args)
    if isinstance(observation, Weights):  # a bare audit asks for every attack on gradients
        named = {name: attack for name, attack in attacks.items() if name in WEIGHTS_ATTACKS}
        attacks = named or {name: kind() for name, kind in WEIGHTS_ATTACKS.items()}
    secret = files.load_secret(args.secret) if args.secret else None
    public = public_pictures(args, observation)
    inputs = [*observed_files(args), *([args.secret] if args.secret else [])]
    run_audit(
        observation,
        attacks,
        public,
        secret,
        new_record(argv, args.seed, observation, inputs),
        out,
        args.seed,
        args.device,
    )


def examine_text(
    observation: TextObservation, args: arguments.Observed, attacks: dict[str, Any], argv: list[str], secret: Path | None
) -> None:
    """Attack or audit an observation of text: record.json, report.html and NAME-texts.json."""
    out = fresh_folder(args.out)
    chosen = {name: attack for name, attack in attacks.items() if name in TEXT_ATTACKS}
    if not chosen and argv[0] == "attack":
        raise BadInput(f"{args.observation} is of texts: choose among {', '.join(TEXT_ATTACKS)}.")
    chosen = chosen or {name: kind() for name, kind in TEXT_ATTACKS.items()}
    hashes = {str(path): file_hash(path) for path in (*observed_files(args), *([secret] if secret else []))}
    command: record.Command = {"name": argv[0], "arguments": {"argv": argv, "inputs": hashes}}
    threats: Any = observation.threat_model()
    written = record.new_record(command, args.seed, threats)
    finish(text_commands.attack_text(observation, args, chosen, written, out, secret), out)


def demo(args: arguments.Demo, argv: list[str]) -> None:
    """One embedded photograph, a LoRA adapter and a gradient made of it, attacks on both, one report."""
    check_device(args.device)
    out = fresh_folder(args.out)
    common: dict[str, Any] = {"seed": args.seed, "indices": DEMO_ROWS}
    adapter, gradient = out / "adapter", out / "gradient"
    capture_adapter(arguments.CaptureAdapter(out=adapter, model="convnet", target_modules="all", **common), argv)
    capture(arguments.Capture(out=gradient, **common), argv)
    written = None
    for folder, names in ((adapter, DEMO_ATTACKS), (gradient, ("dlg", "idlg", "inverting-gradients"))):
        observation = files.load_observation(folder / "observation.safetensors")
        secret = files.load_secret(folder / "secret.safetensors")
        public = public_pool("embedded", "train", shape=observation.model.architecture.input_shape, limit=PUBLIC_POOL)
        written = written or new_record(argv, args.seed, observation, [])
        attacks = {name: ATTACKS[name]() for name in names}
        run_audit(observation, attacks, public, secret, written, out, args.seed, args.device)
    print(f"Open {out / 'report.html'} in a browser.")


def started(name: str, attack: Any, path: Path) -> Any:
    """The attack, beginning at the reconstruction in this file."""
    if "start" not in {field.name for field in fields(attack)}:
        able = [other for other, kind in ATTACKS.items() if "start" in {field.name for field in fields(kind)}]
        raise BadInput(f"{name} is no search and has no start: --start goes with {', '.join(able)}.")
    return replace(attack, start=Given(files.load_reconstruction(path)))


def public_pictures(args: arguments.Observed, observation: PictureObservation) -> Pictures:
    """What everybody may know, in the shape that the model takes."""
    shape = observation.model.architecture.input_shape
    return public_pool(args.data, args.public_split, shape=shape, limit=PUBLIC_POOL)


def run_audit(
    observation: PictureObservation,
    attacks: dict[str, Any],
    public: Pictures,
    secret: Any,
    written: record.Record,
    out: Path,
    seed: int,
    device: str,
) -> None:
    """The audit loop with progress, writing after each attack."""
    attacks = {name: auditing.with_prior(attack, public) for name, attack in attacks.items()}
    with progress() as start:
        for done in auditing.audit(
            observation, attacks, public, secret=secret, seed=seed, device=device, on_step=start
        ):
            written["results"].append(done.result)
            written["verdict"] = auditing.verdict(written["results"])
            save_pictures(done, out)
            finish(written, out)
            save_sheet(written["results"], out / "pictures.png")
    print(written["verdict"]["sentence"])


def reproduce(args: arguments.Reproduce, argv: list[str]) -> None:
    """Run a recipe; record.json, report.html, table.csv and the plots are written again after every finished piece."""
    from gradleak.studies import RECIPES

    if args.name not in RECIPES:
        raise BadInput(f"Unknown recipe {args.name!r}. Recipes: {', '.join(RECIPES)}.")
    check_device(args.device)
    out = fresh_folder(args.out)
    written = record.new_record({"name": "reproduce", "arguments": {"argv": argv, "inputs": {}}}, args.seed, [])
    with progress() as start:
        for found in RECIPES[args.name](args.data, args.size, seed=args.seed, device=args.device, start=start):
            written["table"], written["plots"], written["results"] = found.table, found.plots, found.results
            written["verdict"] = {"level": "unscored", "sentence": found.sentence}
            finish(written, out)
            save_table(found.table, out / "table.csv")
            for number, plot in enumerate(found.plots):
                (out / f"plot-{number}.png").write_bytes(base64.b64decode(plot["image"].partition(",")[2]))
    print(written["verdict"]["sentence"])


def report(args: arguments.Report) -> None:
    """Render record.json again."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(html.render(record.read(args.record)), encoding="utf-8")
    print(args.out)


def rerun(args: arguments.Rerun, argv: list[str]) -> None:
    """The command of a record, again: same input files (by hash), seed and parameters, results to another folder."""
    from gradleak.cli.app import run

    stored = record.read(args.record)["command"]["arguments"]
    again = stored.get("argv")
    if not isinstance(again, list) or not all(isinstance(part, str) for part in again):
        raise BadInput(f"{args.record} does not say how it was made.")
    for path, digest in stored.get("inputs", {}).items():
        if file_hash(Path(path)) != digest:
            raise BadInput(f"{path} is no longer the file that the record was made from.")
    if again[:1] not in [[name] for name in RERUNNABLE]:
        raise BadInput(f"{args.record} was made by {again[:1]}, not by one of {', '.join(RERUNNABLE)}.")
    flags = [part for flag in again for part in flag.split("=", 1)]
    for code in (value for flag, value in itertools.pairwise(flags) if flag == "--model"):
        if ":" in code and code != args.model:
            raise BadInput(f"The record would import the code {code!r}: if you trust it, allow it with --model {code}.")
    if "--out" in again:
        where = again.index("--out")
        again = again[:where] + again[where + 2 :]
    run([*again, "--out", str(args.out)])


def list_all(args: arguments.List) -> None:
    """Attacks with what their files say they see and recover; recipes; models."""
    from gradleak.studies import RECIPES

    print("Attacks")
    for name, kind in ALL_ATTACKS.items():
        print(f"  {name}")
        header = inspect.getdoc(sys.modules[kind.__module__]) or ""
        for section in re.findall(r"^(?:Sees|Recovers) .*(?:\n +.*)*", header, re.MULTILINE):
            print(textwrap.indent(section, "      "))
    print(f"Recipes\n  {', '.join(RECIPES)}\nModels\n  {', '.join(MODELS)}, or package.module:factory of your own")


def new_record(argv: list[str], seed: int, observation: PictureObservation, inputs: list[Path]) -> record.Record:
    """A record that knows its command, its input files by hash, and the threat model."""
    hashes = {str(path): file_hash(path) for path in inputs}
    command: record.Command = {"name": argv[0], "arguments": {"argv": argv, "inputs": hashes}}
    return record.new_record(command, seed, observation.threat_model())  # type: ignore[arg-type]


def finish(written: record.Record, out: Path, *, report: bool = True) -> None:
    """record.json, and report.html from it."""
    record.write(written, out / "record.json")
    if report:
        (out / "report.html").write_text(html.render(written), encoding="utf-8")


def save_pictures(done: auditing.Audited, out: Path) -> None:
    """ATTACK-0.png, ATTACK-1.png, ...: the reconstructions, each eight times as large as its pixels."""
    out.mkdir(parents=True, exist_ok=True)
    for number, uri in enumerate(done.result.get("pictures", {}).get("reconstruction", [])):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        large = picture.resize((picture.width * 8, picture.height * 8), Image.Resampling.NEAREST)
        large.save(out / f"{done.result['attack']}-{number}.png")


def save_table(rows: list[dict[str, Any]], path: Path) -> None:
    """The recipe's table for a spreadsheet."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
