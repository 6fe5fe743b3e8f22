"""What each command does. Results go to a folder of their own, the record first, everything else from it."""

import base64
import csv
import hashlib
import inspect
import io
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from gradleak import arguments, files, learned, pairs, text_commands
from gradleak import audit as auditing
from gradleak.attacks import ATTACKS, TEXT_ATTACKS, WEIGHTS_ATTACKS, exact_git
from gradleak.attacks.git import Transcript
from gradleak.attacks.lti import Perceptron
from gradleak.attacks.start import Given
from gradleak.base_folder import read_base
from gradleak.data import Pictures, load, public_pool
from gradleak.defenses import LEAKS, Defense, GaussianNoise
from gradleak.errors import BadInput
from gradleak.language_folder import is_language_model
from gradleak.lora import Recipe
from gradleak.models import BINARY, MODELS, Architecture
from gradleak.observations import Adapter, Gradient, Model
from gradleak.peft_folder import is_adapter, read_adapter
from gradleak.progress import progress
from gradleak.report import html, record
from gradleak.report.sheet import save_sheet
from gradleak.secret import Secret
from gradleak.text import TextGradient
from gradleak.trained_weights import Weights
from gradleak.victims.federated import share_update
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.lora import fine_tune
from gradleak.victims.trained import FullBatch, first_of_each, publish_weights
from gradleak.victims.training import prepare_model

PUBLIC_TRAINING = 2_000  # pictures a victim is trained on with --epochs
PUBLIC_ADAPTED = 5_000  # the same, before an adapter is trained on it
PUBLIC_POOL = 2_000  # pictures that priors, controls and decoys are made of
RERUNNABLE = ("demo", "attack", "audit", "reproduce")  # the commands that leave a record
GENERATORS = {
    "git": Transcript,
    "exact-git": exact_git.Recovered,
    "lti": Perceptron,
}  # what `train` builds
DEMO_ATTACKS = ("map-inversion",)  # on the adapter
DEMO_ROWS = (0,)  # of the embedded pictures: an astronaut's face


def victim(args: arguments.Victim, public: int) -> tuple[nn.Module, Architecture, Pictures]:
    """The model, trained on so many `public` pictures if it has to be, and the private pictures."""
    private = load(args.data, args.split, indices=args.indices, resize=args.resize)
    shape = (private.images.shape[1], private.images.shape[2], private.images.shape[3])
    classes = 2 if args.model in BINARY else max(len(private.classes), 2)
    architecture = Architecture(args.model, shape, classes)
    with progress() as start:
        on_step = start("training the victim") if args.epochs else None
        train_on = public_pool(args.data, "train", shape=shape, limit=public) if args.epochs else None
        if train_on and args.model in BINARY:
            train_on = replace(train_on, labels=train_on.labels % 2)
        module = prepare_model(
            architecture, seed=args.seed, weights=args.weights, train_on=train_on, epochs=args.epochs, on_step=on_step
        )
    return module, architecture, replace(private, labels=private.labels % 2) if args.model in BINARY else private


def capture(args: arguments.Capture, argv: list[str]) -> None:
    """Write observation.safetensors and secret.safetensors."""
    out = fresh_folder(args.out)
    if Path(args.model).is_dir() and is_language_model(Path(args.model)):
        if isinstance(args, arguments.CaptureUpdate):
            raise BadInput("Of language models only gradients can be captured here, not yet updates.")
        return text_commands.capture_text(args, out)
    module, architecture, private = victim(args, PUBLIC_TRAINING)
    observation, secret = capture_gradient(
        module,
        architecture,
        private,
        mode=args.mode,
        precision=getattr(torch, args.precision),
        reveal_labels=args.reveal_labels,
        reveal_buffers=not args.hide_buffers,
        reveal_batch_size=not args.hide_batch_size,
    )
    if isinstance(args, arguments.CaptureUpdate):
        own = Model.of(module, architecture, mode=args.mode)
        recipe = {name: getattr(args, name) for name in files.RECIPE}
        observation = share_update(observation, secret, own, **recipe)
    keep(observation, secret, args, out)


def capture_adapter(args: arguments.CaptureAdapter, argv: list[str]) -> None:
    """Write adapter/ and base/ as PEFT and transformers do, observation.safetensors and secret.safetensors."""
    out = fresh_folder(args.out)
    recipe = Recipe(optimizer=args.optimizer, learning_rate=args.lr, steps=args.steps, batch_size=args.local_batch_size)
    if Path(args.model).is_dir():
        module, architecture = read_base(args.model)
        resize = args.resize or architecture.input_shape[1:]
        private = load(args.data, args.split, indices=args.indices, resize=resize)
    else:
        module, architecture, private = victim(args, PUBLIC_ADAPTED)
    targets = args.target_modules
    observation, secret = fine_tune(
        module,
        architecture,
        private,
        rank=args.rank,
        alpha=args.alpha,
        target_modules=tuple(targets.split(",")) if "," in targets else targets,
        recipe=recipe,
        seed=args.seed,
        init=True if args.init == "default" else args.init,
        rslora=args.rslora,
        precision=getattr(torch, args.precision),
        reveal_labels=args.reveal_labels,
        reveal_batch_size=not args.hide_batch_size,
        out=out,
    )
    print(f"{out / 'adapter'}: the adapter, as PEFT saves it\n{out / 'base'}: the model that it belongs to")
    if (out / "initial").is_dir():
        print(f"{out / 'initial'}: the adapter before training, without which its change is not known")
    keep(observation, secret, args, out)


def capture_weights(args: arguments.CaptureWeights, argv: list[str]) -> None:
    """Write observation.safetensors and secret.safetensors; training.safetensors until training is done."""
    unfinished = args.out / "training.safetensors"
    out = args.out if unfinished.is_file() else fresh_folder(args.out)
    private = first_of_each(args.data, args.split, args.per_class, resize=args.resize)
    shape = (private.images.shape[1], private.images.shape[2], private.images.shape[3])
    architecture = Architecture(args.model, shape, 2)
    recipe = FullBatch(
        learning_rate=args.lr,
        epochs=args.epochs,
        loss=args.loss,
        weight_decay=args.weight_decay,
        loss_based=args.loss_based,
    )
    with progress() as start:
        observation, secret = publish_weights(
            architecture.build(args.seed).to(getattr(torch, args.precision)),
            architecture,
            private,
            recipe,
            reveal_initial=args.reveal_initial,
            reveal_labels=args.reveal_labels,
            reveal_batch_size=not args.hide_batch_size,
            resume=unfinished,
            on_step=start("training"),
        )
    save(observation, secret, out)
    unfinished.unlink(missing_ok=True)


def capture_pairs(args: arguments.CapturePairs, argv: list[str]) -> None:
    """Write shards of pairs to a folder."""
    observation, public, defense = pairs_asked_for(args)
    with progress() as start:
        pairs.write(
            args.out,
            observation.model,
            public,
            count=args.count,
            batch=args.pair_batch,
            defense=defense,
            seed=args.seed,
            on_step=start("pairs"),
        )
    print(f"{args.out}: {args.count:,} pairs")


def train(args: arguments.Train, argv: list[str]) -> None:
    """Write generator.safetensors, trained on pairs of the observed model."""
    out, kind = fresh_folder(args.out), argv[1]
    observation, public, defense = pairs_asked_for(args)
    model, folder = observation.model, args.pairs

    def shards() -> Iterator[pairs.Pairs]:
        if folder is not None:
            return pairs.read(folder, model)
        return pairs.stream(model, public, count=args.count, batch=args.pair_batch, defense=defense, seed=args.seed)

    batch = next(iter(shards())).labels.shape[1]
    with progress() as start:
        trained = learned.train(
            kind,
            GENERATORS[kind],
            {"batch": batch},
            model,
            shards,
            epochs=args.training_epochs if kind in ("git", "lti") else 0,  # exact forms are solved, not trained
            generator=torch.Generator().manual_seed(args.seed),
            on_step=start(f"training {kind}"),
        )
    trained.save(out / "generator.safetensors")
    told = f": training error {trained.trace[-1][1]:.4f} (mean squared, per pixel)" if trained.trace else ""
    print(f"{out / 'generator.safetensors'}{told}")


def pairs_asked_for(args: arguments.CapturePairs) -> tuple[Gradient, Pictures, Defense | None]:
    """The observation whose model the pairs are of, the public pictures, and what is shared of a gradient."""
    observation = observed(args)
    if isinstance(observation, Adapter):
        raise BadInput("Pairs are of gradients, and this is an adapter: bridge decoders are what is trained for those.")
    if args.noise and args.leak != "none":
        raise BadInput("Give --noise or --leak, not both.")
    shape = observation.model.architecture.input_shape
    public = public_pool(args.data, args.public_split, shape=shape, limit=args.count * args.pair_batch, seed=args.seed)
    public = replace(public, labels=public.labels % observation.model.architecture.classes)
    return observation, public, GaussianNoise(args.noise) if args.noise else LEAKS[args.leak]


def keep(observation: Gradient, secret: Secret, args: arguments.Victim, out: Path) -> None:
    """Write what the attacker sees and what only audit opens."""
    save(observation, replace(secret, source=f"{secret.source} {' '.join(map(str, args.indices))}"), out)


def save(observation: Gradient, secret: Secret, out: Path) -> None:
    """The two files, and what they are."""
    files.save_observation(observation, out / "observation.safetensors")
    files.save_secret(secret, out / "secret.safetensors")
    print(
        f"{out / 'observation.safetensors'}: what the attacker sees\n{out / 'secret.safetensors'}: what only audit opens"
    )


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
    observation: TextGradient, args: arguments.Observed, attacks: dict[str, Any], argv: list[str], secret: Path | None
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


def public_pictures(args: arguments.Observed, observation: Gradient) -> Pictures:
    """What everybody may know, in the shape that the model takes."""
    shape = observation.model.architecture.input_shape
    return public_pool(args.data, args.public_split, shape=shape, limit=PUBLIC_POOL)


def run_audit(
    observation: Gradient,
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
    from gradleak.recipes import RECIPES

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
    from gradleak.cli import run

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
    from gradleak.recipes import RECIPES

    print("Attacks")
    everything: dict[str, type] = {**ATTACKS, **WEIGHTS_ATTACKS, **TEXT_ATTACKS}
    for name, kind in everything.items():
        print(f"  {name}")
        header = inspect.getdoc(sys.modules[kind.__module__]) or ""
        for section in re.findall(r"^(?:Sees|Recovers) .*(?:\n +.*)*", header, re.MULTILINE):
            print(textwrap.indent(section, "      "))
    print(f"Recipes\n  {', '.join(RECIPES)}\nModels\n  {', '.join(MODELS)}, or package.module:factory of your own")


def observed(args: arguments.Observed) -> Gradient:
    """The observation of a file, with provenance checked, of an adapter's folder, or of a plain gradient file."""
    if args.observation.is_dir():
        return observed_adapter(args)
    if files.has_provenance(args.observation):
        observation = files.load_observation(args.observation, factory=args.model)
        files.check_provenance(observation, weights=args.weights, mode=args.mode)
        return observation
    if args.model is None or args.weights is None:
        raise BadInput(
            f"{args.observation} carries no provenance: say with --model and --weights what it was taken from."
        )
    architecture = Architecture(args.model, args.input_shape, args.classes)
    module = prepare_model(architecture, weights=args.weights)
    model = Model.of(module, architecture, mode=args.mode or "eval")
    released = files.load_tensors(args.observation)
    precision = min(
        (tensor.dtype for tensor in released.values()), key=lambda dtype: dtype.itemsize, default=torch.float32
    )
    if not precision.is_floating_point:
        raise BadInput(f"{args.observation} holds {precision} numbers, which are no gradient.")
    return Gradient(
        model=model,
        released={name: tensor.float() for name, tensor in released.items()},
        batch_size=args.batch_size,
        precision=str(precision).removeprefix("torch."),
    )


def observed_adapter(args: arguments.Observed) -> Gradient:
    """The adapter in a PEFT folder, on its base model."""
    if not is_adapter(args.observation):
        raise BadInput(f"{args.observation} is no folder of a LoRA adapter: it has no adapter_config.json.")
    if args.base is None:
        raise BadInput(f"{args.observation} holds an adapter: say with --base which model it belongs to.")
    model = Model.of(*read_base(args.base, factory=args.model))
    recipe = None
    if args.lr is not None:
        recipe = Recipe(optimizer=args.optimizer, learning_rate=args.lr, steps=args.steps)
    return read_adapter(args.observation, model, recipe=recipe, batch_size=args.batch_size, initial=args.initial)


def observed_files(args: arguments.Observed) -> list[Path]:
    """The files that the observation was read from; of an adapter, those of its folder."""
    if not args.observation.is_dir():
        return [args.observation]
    return sorted(path for path in args.observation.iterdir() if path.suffix in (".json", ".safetensors"))


def fresh_folder(path: Path) -> Path:
    """BadInput if the folder holds anything: results are never overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} holds other results already: choose another --out.")
    return path


def check_device(name: str) -> None:
    """BadInput if torch cannot compute there, before anything runs."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"Device {name!r} is not to be had here: {reason}.") from error


def new_record(argv: list[str], seed: int, observation: Gradient, inputs: list[Path]) -> record.Record:
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file; BadInput when it is not there."""
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    return hashlib.sha256(path.read_bytes()).hexdigest()
