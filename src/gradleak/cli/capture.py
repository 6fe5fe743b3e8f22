"""What `capture` and `train` do: play the victim, and make the pairs and generators of learned attacks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gradleak.attacks.exact_git import exact_git
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned import pairs
from gradleak.attacks.learned.git import Transcript
from gradleak.attacks.learned.lti import Perceptron
from gradleak.cli import flags as arguments
from gradleak.cli import text_commands
from gradleak.cli.inputs import fresh_folder, observed
from gradleak.cli.progress import progress
from gradleak.errors import BadInput
from gradleak.formats import observation_file as files
from gradleak.formats.base_folder import read_base
from gradleak.formats.language_folder import is_language_model
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import BINARY, Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.defenses import LEAKS, Defense, GaussianNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Adapter
from gradleak.observations.training import Recipe
from gradleak.victims.adapter import fine_tune
from gradleak.victims.federated import share_update
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.training import prepare_model
from gradleak.victims.weights import FullBatch, first_of_each, publish_weights

PUBLIC_TRAINING = 2_000  # pictures a victim is trained on with --epochs
PUBLIC_ADAPTED = 5_000  # the same, before an adapter is trained on it
GENERATORS = {
    "git": Transcript,
    "exact-git": exact_git.Recovered,
    "lti": Perceptron,
}  # what `train` builds


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
    if Path(args.model).is_dir() and is_language_model(Path(args.model)):
        return text_commands.capture_text(args, out)
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


def pairs_asked_for(args: arguments.CapturePairs) -> tuple[PictureObservation, Pictures, Defense | None]:
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


def keep(observation: PictureObservation, secret: Secret, args: arguments.Victim, out: Path) -> None:
    """Write what the attacker sees and what only audit opens."""
    save(observation, replace(secret, source=f"{secret.source} {' '.join(map(str, args.indices))}"), out)


def save(observation: PictureObservation, secret: Secret, out: Path) -> None:
    """The two files, and what they are."""
    files.save_observation(observation, out / "observation.safetensors")
    files.save_secret(secret, out / "secret.safetensors")
    print(
        f"{out / 'observation.safetensors'}: what the attacker sees\n{out / 'secret.safetensors'}: what only audit opens"
    )
