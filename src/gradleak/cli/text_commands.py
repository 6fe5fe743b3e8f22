"""What `capture`, `attack` and `audit` do where texts are concerned."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from gradleak.audit.text_audit import audit_text
from gradleak.cli import flags as arguments
from gradleak.cli.progress import progress
from gradleak.errors import BadInput
from gradleak.formats import text_files
from gradleak.formats.language_folder import is_language_model, read_language_model, read_text_adapter
from gradleak.formats.observation_file import RECIPE
from gradleak.modalities.texts import load_texts
from gradleak.observations.observation import TextObservation
from gradleak.observations.training import Recipe
from gradleak.report.record import Record
from gradleak.victims.text import capture_text_gradient, share_text_update
from gradleak.victims.text_lora import fine_tune_texts

PUBLIC = 500  # public texts for controls


def capture_text(args: arguments.Victim, out: Path) -> None:
    """Write observation.safetensors and secret.safetensors of a batch of texts; of an adapter its folder and base too."""
    for name in ("weights", "resize"):
        if getattr(args, name) is not None:
            raise BadInput(f"--{name} is for pictures: a language model comes with its weights and takes texts.")
    if getattr(args, "mode", "eval") == "train":
        raise BadInput("Language models are trained without dropout here: --mode eval is all there is.")
    private = load_texts(args.data, args.split, indices=args.indices)
    model = read_language_model(Path(args.model), args.task, classes=private.classes, seed=args.seed)
    precision = getattr(torch, args.precision)
    shared: dict[str, Any] = {
        "precision": precision,
        "reveal_batch_size": not args.hide_batch_size,
        "source": f"{private.source} {private.split} {' '.join(map(str, args.indices))}",
        "seed": args.seed,
    }
    observation: TextObservation
    if isinstance(args, arguments.CaptureAdapter):
        if args.init != "default" or args.reveal_labels:
            raise BadInput(
                "Adapters of language models start at PEFT's default here, and labels play no part in the attack."
            )
        targets = args.target_modules
        recipe = Recipe(
            optimizer=args.optimizer, learning_rate=args.lr, steps=args.steps, batch_size=args.local_batch_size
        )
        observation, secret = fine_tune_texts(
            model,
            private.texts,
            private.labels,
            rank=args.rank,
            alpha=args.alpha,
            target_modules=tuple(targets.split(",")) if "," in targets else targets,
            rslora=args.rslora,
            recipe=recipe,
            out=out,
            **shared,
        )
        print(f"{out / 'adapter'}: the adapter, as PEFT saves it\n{out / 'base'}: the model that it belongs to")
    else:
        observation, secret = capture_text_gradient(
            model, private.texts, private.labels, reveal_labels=args.reveal_labels, **shared
        )
    if isinstance(args, arguments.CaptureUpdate):
        local = {name: getattr(args, name) for name in RECIPE}
        observation = share_text_update(observation, secret, **local)
    text_files.save_text_observation(observation, out / "observation.safetensors")
    text_files.save_text_secret(secret, out / "secret.safetensors")
    print(
        f"{out / 'observation.safetensors'}: what the attacker sees\n{out / 'secret.safetensors'}: what only audit opens"
    )


def observed_text(args: arguments.Observed) -> TextObservation | None:
    """The observation of text that a command was given: a file, or a PEFT folder with a language model for --base; or None."""
    base = None if args.base is None else Path(args.base)
    if args.observation.is_dir() and base is not None and is_language_model(base):
        recipe = None
        if args.lr is not None:
            recipe = Recipe(optimizer=args.optimizer, learning_rate=args.lr, steps=args.steps)
        model = read_language_model(base, args.task)
        return read_text_adapter(args.observation, model, recipe=recipe, batch_size=args.batch_size)
    return text_files.load_text_observation(args.observation) if text_files.is_text(args.observation) else None


def attack_text(
    observation: TextObservation,
    args: arguments.Observed,
    attacks: dict[str, Any],
    written: Record,
    out: Path,
    secret: Path | None,
) -> Record:
    """Fill a record with every attack on an observation of text; texts.json holds what came out."""
    known = None if secret is None else text_files.load_text_secret(secret)
    public = load_texts(args.data, args.public_split, limit=PUBLIC) if known is not None else None
    rows = list(written["results"])
    for name, attack in attacks.items():
        with progress() as start:
            row, found = audit_text(
                observation, name, attack, secret=known, public=public, seed=args.seed, on_step=start(name)
            )
        if found is None and len(attacks) == 1:
            raise BadInput(row["status"].removeprefix("Not run: "))
        rows.append(row)
        print(row["status"])
        if found is not None:
            about = {field.name: getattr(found, field.name) for field in fields(found)}
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(about, ensure_ascii=False, indent=1)
            (out / f"{name}-texts.json").write_text(text, encoding="utf-8")
    return {**written, "results": rows, "verdict": _verdict(rows, known is not None)}


def _verdict(rows: list[Any], scored: bool) -> Any:
    if not scored:
        return {"level": "unscored", "sentence": "There was no secret to compare with."}
    best = max((sum(r["scores"]["rouge1"]) / len(r["scores"]["rouge1"]) for r in rows if r["scores"]), default=0.0)
    exact = max((sum(r["scores"]["exact_match"]) for r in rows if r["scores"]), default=0.0)
    level = "recovered" if exact else "partial" if best > 0.5 else "nothing"
    return {"level": level, "sentence": f"{exact:.0f} texts came back word for word; mean ROUGE-1 {best:.3f}."}
