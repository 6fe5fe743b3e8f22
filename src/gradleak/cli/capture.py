"""What `capture` and `train` do: play a victim, make pairs, train the generators of learned attacks."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gradleak.attacks.exact_git.exact_git import Recovered
from gradleak.attacks.learned import generator, pairs
from gradleak.attacks.learned.git import Transcript
from gradleak.attacks.learned.lti import Perceptron
from gradleak.audit.progress import progress
from gradleak.audit.scoring import SCORING
from gradleak.cli import flags
from gradleak.cli.folders import folder_for, is_finished, tell
from gradleak.cli.inputs import observed
from gradleak.errors import BadInput
from gradleak.formats.observation_file import save_observation
from gradleak.formats.secret_file import Secret, save_secret
from gradleak.observations.defense_names import Chosen
from gradleak.observations.defenses import Defense
from gradleak.observations.observation import Observation
from gradleak.victims.publish import UNFINISHED

GENERATORS: dict[str, Any] = {"train git": Transcript, "train exact-git": Recovered, "train lti": Perceptron}


def capture(args: Any, name: str) -> None:
    """Play a victim: observation.safetensors, secret.safetensors, and what else it shares."""
    out = args.out if (args.out / UNFINISHED).is_file() else folder_for(args)
    if is_finished(name, args):
        print(f"{out} is finished already.")
    else:
        with progress() as start:
            observation, secret = args(out, args.seed, start)
        kept(observation, secret, out)
        (out / UNFINISHED).unlink(missing_ok=True)
        tell(name, args)
    seen, hidden = out / "observation.safetensors", out / "secret.safetensors"
    seen = seen if seen.is_file() else out  # a folder of rounds
    print(f"Now: gradleak audit {seen} --secret {hidden} --out ...")


def kept(observation: Observation[Any], secret: Secret, out: Path) -> None:
    """Write the two files, of several rounds one each beside the secret, and say what they are."""
    hidden, rounds = out / "secret.safetensors", observation.alone()
    for number, one in rounds.items():
        seen = out / (f"round-{number}" if len(rounds) > 1 else "") / "observation.safetensors"
        seen.parent.mkdir(exist_ok=True)
        save_observation(one, seen)
        print(f"{seen}: what the attacker sees")
    save_secret(secret, hidden)
    print(f"{hidden}: what only audit opens")


def capture_pairs(args: flags.CapturePairs) -> None:
    """Write shards of pairs to a folder."""
    observation, public = pairs_of(args)
    with progress() as start:
        pairs.write(
            args.out,
            observation.model,
            public,
            count=args.count,
            batch=args.pair_batch,
            defenses=defense_of(args),
            seed=args.seed,
            on_step=start("pairs"),
        )
    print(f"{args.out}: {args.count:,} pairs")


def train_by_descent(args: flags.TrainByDescent, name: str) -> None:
    """Write generator.safetensors, trained on pairs of the observed model."""
    train(args, name, args.training_epochs)


def train_exactly(args: flags.Train, name: str) -> None:
    """Write generator.safetensors, solved from pairs of the observed model."""
    train(args, name, 0)


def train(args: flags.Train, name: str, epochs: int) -> None:
    """Write generator.safetensors. name: of the command, which says of which attack."""
    out, attack = folder_for(args), name.removeprefix("train ")
    if args.pairs is not None and (args.defense, args.pair_batch) != ((), 1):
        raise BadInput(f"The pairs in {args.pairs} are made: --defense and --pair-batch go with `capture pairs`.")
    observation, public = pairs_of(args)
    model, folder, defenses = observation.model, args.pairs, defense_of(args)

    def shards() -> Iterator[pairs.Pairs]:
        if folder is not None:
            return pairs.read(folder, model)
        return pairs.stream(model, public, count=args.count, batch=args.pair_batch, defenses=defenses, seed=args.seed)

    path = out / "generator.safetensors"
    if is_finished(name, args):
        print(f"{path} is finished already.")
        return
    batch = next(iter(shards())).labels.shape[1]
    with progress() as start:
        trained = generator.train(
            attack,
            GENERATORS[name],
            {"batch": batch},
            model,
            shards,
            epochs=epochs,
            generator=torch.Generator().manual_seed(args.seed),
            on_step=start(f"training {attack}"),
        )
    trained.save(path)
    tell(name, args)
    error = f": training error {trained.trace[-1][1]:.4f} (mean squared, per pixel)" if trained.trace else ""
    print(
        f"{path}{error}, of {len(trained.pictures):,} public samples\nNow: gradleak attack {args.observation} --attack {attack} --{attack}.generator {path} --out ..."
    )


def pairs_of(args: flags.CapturePairs) -> tuple[Observation[Any], Any]:
    """The observation whose model the pairs are of, and the public data with labels that the model has."""
    observation = observed(args)
    if observation.release.sketched:
        raise BadInput("Pairs are of whole gradients, and this is an adapter: decoders are what is trained for those.")
    model = observation.model
    limit = args.count * args.pair_batch
    public = SCORING[model.architecture.modality].public(args.data, args.public_split, model, limit)
    return observation, dataclasses.replace(public, labels=public.labels % model.architecture.classes)


def defense_of(args: flags.CapturePairs) -> tuple[Defense, ...]:
    """The defenses that the pairs go through; BadInput for one that is a part of the training, or of private pictures."""
    defenses = Chosen.of(args.defense).defenses
    for text, defense in zip(args.defense, defenses, strict=False):
        if type(defense).training is not Defense.training or type(defense).bound is not Defense.bound:
            raise BadInput(f"Pairs go through what is done to a gradient, and {text} is done before there is one.")
    return defenses
