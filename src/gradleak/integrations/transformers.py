"""The Trainer of transformers with a LoRA adapter of PEFT: what does each checkpoint give away?

    trainer = Trainer(..., callbacks=[LeakageCallback()])

A Trainer knows what a published adapter does not tell: where training began, the optimizer, its learning rates, how many steps. All of
that is taken to be known to the attacker.
"""

import copy
import logging
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradleak.attacks.parameters import check_names
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.peft import read_adapter
from gradleak.formats.secret_file import Secret
from gradleak.integrations.auditing import CHEAP, audit_to
from gradleak.integrations.fed_batches import Fed
from gradleak.modalities.language_models import LanguageArchitecture, Task, build
from gradleak.modalities.transformers_networks import quiet_transformers, structure
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.release import Reservation
from gradleak.observations.training import BETAS, EPSILON, MOMENTUM, Optimizer, Recipe

TASKS: dict[str, Task] = {  # by the end of the class of the base model
    "ForSequenceClassification": "classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
}
INITIAL, LEAKAGE, FINAL = "initial", "leakage", "final"
SAME = 1e-6  # relative: two learning rates that differ by less are one
UNABLE = (BadInput, RuntimeError, MemoryError, OSError)  # what an audit may end with; a training goes on
LOG = logging.getLogger(__name__)


class LeakageCallback(TrainerCallback):
    """Audits every checkpoint that the Trainer saves, and the end of the training.

    When training begins, the adapter is kept in `initial`. Each checkpoint gets a folder `leakage`, with record.json, report.html, a
    paragraph for the model card (leakage.md) and, of small models, observation.safetensors. If the last step was not saved, the adapter
    goes to `final`. A training that is resumed finds `initial` where the first one has left it.

    attacks  names of `gradleak list`; those that are no matter of hours unless others are given
    seconds  for each audit
    secret   the private samples, to score with: Secret(inputs, labels) as the model is fed with them, in the Trainer's order; or "batches":
             those that it was fed with, kept in memory while it trains
    out      where all of that goes; the Trainer's output_dir unless given. It holds what was recovered of private data: do not share it

    `verdicts` is {step: verdict}. An audit that fails is told in the log, and in leakage.md; the training goes on. Training raises
    BadInput at its beginning where the model has no LoRA adapter of PEFT, or where results would be pushed to the hub.
    """

    def __init__(
        self,
        *,
        attacks: Sequence[str] = CHEAP,
        seconds: float = 60.0,
        secret: Secret | Literal["batches"] | None = None,
        out: Path | str | None = None,
    ) -> None:
        check_names(list(attacks))
        self.attacks, self.seconds, self.secret = tuple(attacks), seconds, secret
        self.out = None if out is None else Path(out)
        self.verdicts: dict[int, Any] = {}
        self.rates: list[float] = []
        self.audited: set[int] = set()  # steps
        self.begun = 0  # the step at which this process began
        self.fed = Fed()
        self.watching: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the adapter as it is before training, with what its base model is read with."""
        model = kwargs["model"]
        if not isinstance(model, PeftModel) or model.peft_config[model.active_adapter].peft_type != "LORA":
            raise BadInput("LeakageCallback audits LoRA adapters: give the Trainer a model of PEFT's get_peft_model.")
        if args.push_to_hub and self.out is None:
            raise BadInput(
                "This Trainer pushes its output_dir to the hub, and an audit's folder holds what it recovered of the private data: give "
                "LeakageCallback(out=...) a folder elsewhere."
            )
        self.rates, self.begun = [], state.global_step
        if self.secret == "batches" and not self.begun:
            self.fed = Fed()
            self.watching = self.fed.watch(model)
        initial = self.folder(args) / INITIAL
        if state.is_world_process_zero and not (self.begun and initial.is_dir()):
            with quiet_transformers():
                model.save_pretrained(str(initial))
                model.config.save_pretrained(initial)
                if (reader := kwargs.get("processing_class")) is not None:
                    reader.save_pretrained(initial)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the learning rate of this step."""
        self.rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit the checkpoint that was just written."""
        checkpoint = f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            self.audit(Path(str(args.output_dir)) / checkpoint, self.folder(args) / checkpoint, args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit the adapter as training left it, unless that was a checkpoint. A best model that was loaded in the end was one."""
        if self.watching is not None:
            self.watching.remove()
        if not state.is_world_process_zero or state.global_step in self.audited or args.load_best_model_at_end:
            return
        folder = self.folder(args) / FINAL
        with quiet_transformers():
            kwargs["model"].save_pretrained(str(folder))
        self.audit(folder, folder, args, state, **kwargs)

    def folder(self, args: TrainingArguments) -> Path:
        """Where results go."""
        return Path(str(args.output_dir)) if self.out is None else self.out

    def audit(self, adapter: Path, out: Path, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Audit the adapter in a folder, into a folder `leakage` in another."""
        self.audited.add(state.global_step)
        try:
            model, optimizer, loader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
            training = Training.of(args, state, model, optimizer, loader, self.rates, self.begun)
            initial = self.folder(args) / INITIAL
            with torch.random.fork_rng(devices=[]), quiet_transformers():
                base = base_model(model, kwargs.get("processing_class"), initial)
                observation = observed(adapter, initial, base, training)
            secret = self.scored_with(base, observation.batch_size)
            written = audit_to(observation, out / LEAKAGE, attacks=self.attacks, seconds=self.seconds, secret=secret)
            self.verdicts[state.global_step] = written["verdict"]
        except UNABLE as error:
            sentence = f"The adapter in {adapter} could not be audited: {error}"
            LOG.warning(sentence)
            (out / LEAKAGE).mkdir(parents=True, exist_ok=True)
            (out / LEAKAGE / "leakage.md").write_text(f"{sentence}\n", encoding="utf-8")

    def scored_with(self, base: Model[Any], samples: int | None) -> Secret | None:
        """The secret that was given, or what the training was fed with; None, which the log tells, where that is not there."""
        if self.secret != "batches":
            return self.secret
        try:
            return self.fed.secret(base, samples)
        except NotObserved as error:
            LOG.warning("The audit is not scored: %s", error)
            return None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a Trainer knows of its training.

    recipe   None where it is none that gradleak knows
    samples  how many were seen, or None
    dropout  the largest probability of a dropout in the base model
    precision  the number format of its gradients
    remarks  what a reader of the report has to know of it
    """

    recipe: Recipe | None
    samples: int | None
    dropout: float
    precision: str
    remarks: tuple[Reservation, ...] = field(default=())

    @classmethod
    def of(
        cls,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        optimizer: Any,
        loader: Any,
        rates: Sequence[float],
        begun: int,
    ) -> "Training":
        """From the Trainer's objects; rates: of the steps since `begun`."""
        layers = [layer for name, layer in model.named_modules() if "lora_dropout" not in name]
        remarks: tuple[Reservation, ...] = ()
        dropped = max((m.p for m in layers if isinstance(m, nn.modules.dropout._DropoutNd)), default=0.0)
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        data = getattr(loader, "dataset", None)
        total = len(data) if isinstance(data, Sized) else None
        samples = None if total is None else min(total, size * state.global_step)
        kind, decay = kind_of(optimizer)
        known = bool(rates) and max(rates) > 0 and len(rates) == state.global_step and not begun
        constant = known and max(rates) <= min(rates) * (1 + SAME)
        precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        steps = f"{state.global_step} steps" if state.global_step > 1 else "1 step"
        spread = f"learning rates between {min(rates):g} and {max(rates):g}" if rates else "unknown learning rates"
        spread += f", resumed at step {begun}" if begun else ""
        if kind is None or not known:
            why = (
                f"The Trainer took {steps} by {type(bare(optimizer)).__name__} at {spread}: that is no recipe that can be replayed, so "
                "what assumes one step is approximate."
            )
            remarks = (("trainer", "warning", why),)
            return cls(recipe=None, samples=samples, dropout=dropped, precision=precision, remarks=remarks)
        recipe = Recipe(
            optimizer=kind,
            learning_rate=max(rates),
            rates=() if constant else tuple(rates),
            steps=state.global_step,
            batch_size=None if total is not None and total <= size else size,
            weight_decay=decay,
            clip=args.max_grad_norm or None,
        )
        if recipe.batch_size is not None and state.global_step > 1:
            said = "The Trainer shuffles: which samples met in a step is not known, and a replay takes them in their order."
            remarks = (*remarks, ("shuffled", "warning", said))
        if args.gradient_accumulation_steps > 1:
            said = (
                f"Gradients were accumulated over {args.gradient_accumulation_steps} batches: whether that makes a mean or a sum, depends on the "
                "model's loss; a mean is assumed."
            )
            remarks = (*remarks, ("accumulated", "warning", said))
        return cls(recipe=recipe, samples=samples, dropout=dropped, precision=precision, remarks=remarks)


def kind_of(optimizer: Any) -> tuple[Optimizer | None, float]:
    """(the optimizer as recipes know it, or None; its weight decay, of the largest group of parameters)."""
    inner = bare(optimizer)
    group = max(inner.param_groups, key=lambda group: sum(p.numel() for p in group["params"]))
    decay = float(group.get("weight_decay", 0.0))
    usual = tuple(group.get("betas", BETAS)) == BETAS and group.get("eps", EPSILON) == EPSILON
    odd = any(group.get(name) for name in ("nesterov", "amsgrad", "maximize", "dampening")) or not usual
    kinds: dict[type, Optimizer] = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam"}
    kind = kinds.get(type(inner))
    if type(inner) is torch.optim.SGD:
        momenta: dict[float, Optimizer] = {0.0: "sgd", MOMENTUM: "momentum"}
        kind = momenta.get(group["momentum"])
    return (None if odd else kind), decay


def bare(optimizer: Any) -> Any:
    """The optimizer inside that of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def base_model(adapted: Any, reader: Any, folder: Path) -> Model[Any]:
    """The base model as it is in memory, without the adapter. reader: the tokenizer, or the image processor; folder: which holds the
    configuration of the base model, and the image processor."""
    base = copy.deepcopy(adapted).unload()
    kind, state = type(base).__name__, base.state_dict()
    if kind.endswith("ForImageClassification"):
        if not (folder / "preprocessor_config.json").is_file():
            raise BadInput("How pixels are normalised is not known: give the Trainer its processing_class.")
        module, pictures = structure(folder)
        module.network.load_state_dict(state)
        norms = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())
        return Model.of(module, pictures, mode="train" if norms else "eval")
    task = next((task for ending, task in TASKS.items() if kind.endswith(ending)), None)
    if task is None or not hasattr(reader, "backend_tokenizer"):
        raise BadInput(
            f"A {kind} is neither an image classifier nor a language model with a fast tokenizer: give the Trainer its processing_class."
        )
    classes = int(base.config.num_labels)
    network, config = build(copy.deepcopy(base.config), task, classes=classes, tokenizer=reader, seed=0)
    network.load_state_dict(state)
    return Model.of(network, LanguageArchitecture(kind, config, task, reader))


def observed(adapter: Path, initial: Path, base: Model[Any], training: Training) -> Observation[Any]:
    """The adapter in a folder as an observation, with all that the Trainer knows."""
    observation = read_adapter(adapter, base, recipe=training.recipe, batch_size=training.samples, initial=initial)
    release, remarks = observation.adapter, observation.adapter.remarks
    release = replace(release, dropout=max(release.dropout, training.dropout), remarks=(*remarks, *training.remarks))
    # As in memory: a start that PEFT subtracts from the weights (PiSSA, OLoRA) is subtracted there already.
    weights = {name: base.parameters[name] for name in (f"{module}.weight" for module in release.scaling)}
    model = replace(observation.model, parameters={**observation.model.parameters, **weights})
    short = observation.precision if training.precision == "float32" else training.precision
    return replace(observation, model=model, release=release, precision=short)
