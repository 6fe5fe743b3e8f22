"""The settings of every victim, as frozen dataclasses: the flags of `gradleak capture`. The strings under the fields are their
help, and calling one plays it. Importing this costs nothing: what a victim does is imported when it does it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import UseAppendAction

from gradleak.errors import BadInput
from gradleak.modalities.words import Optimizer, Task

if TYPE_CHECKING:
    from gradleak.formats.secret_file import Secret
    from gradleak.observations.model import Mode, Model
    from gradleak.observations.observation import Observation
    from gradleak.victims.adapter import Init

PUBLIC_TRAINING = 2_000  # pictures a victim is trained on with --epochs
OTHERS = 160  # texts that others train a model on from round to round
PUBLIC_ADAPTED = 5_000  # the same, before an adapter is trained on it
Start = Callable[[str], Callable[[int, int, float], None]]  # opens a progress bar


@dataclass(frozen=True, kw_only=True)
class Private:
    """What every victim is asked that holds a batch."""

    model: str = "lenet"
    """A model of `gradleak list`, package.module:factory of your own, or a model of the transformers library, as a folder or a name on the
    Hugging Face hub; of a language model --data are texts, and "pictures" below means texts."""
    weights: Path | None = None
    """Start from these parameters (safetensors) in place of a random initialisation; of pictures only."""
    epochs: int | None = 0
    """First train for so many epochs on public pictures of the training split; cached. Of pictures only."""
    data: str = "embedded"
    """embedded, digits, a folder (parquet or images), or a name on the Hugging Face hub."""
    split: str = "test"
    """Split of the data that holds the private pictures."""
    indices: tuple[int, ...] = (0,)
    """Rows of the private pictures: the batch."""
    resize: tuple[int, int] | None = None
    """Height and width to bring the pictures to; of pictures only."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of what is shared."""
    task: Task | None = None
    """What a language model is trained for: classification (the default), causal-lm or masked-lm; of texts only."""
    reveal_labels: bool = False
    """Tell the attacker the labels."""
    hide_batch_size: bool = False
    """Withhold the number of pictures."""

    def private(self, mode: "Mode", public: int, seed: int, start: Start) -> "tuple[Model[Any], Any]":
        """The model, trained on so many `public` pictures if it has to be, and the private data."""
        from gradleak.formats.model_folder import folder_of, is_language_model, read_base
        from gradleak.modalities.networks import BINARY, Architecture
        from gradleak.modalities.pictures import load, public_pool
        from gradleak.observations.model import Model
        from gradleak.victims.training import prepare_model

        folder = folder_of(self.model)
        if folder is not None and self.epochs:
            raise BadInput(f"{self.model} is trained already: leave --epochs out.")
        if folder is not None and is_language_model(folder):
            return self.private_texts(folder, mode, seed)
        if self.task is not None:
            raise BadInput("--task is for language models: give the folder of one with --model.")
        resize = self.resize
        if folder is not None:
            module, architecture = read_base(folder)
            resize = resize or (architecture.input_shape[1], architecture.input_shape[2])
        data = load(self.data, self.split, indices=self.indices, resize=resize)
        if folder is None:
            shape = (data.images.shape[1], data.images.shape[2], data.images.shape[3])
            binary = self.model in BINARY
            architecture = Architecture(self.model, shape, 2 if binary else max(len(data.classes), 2))
            pool = public_pool(self.data, "train", shape=shape, limit=public) if self.epochs else None
            if binary:
                data = replace(data, labels=data.labels % 2)
                pool = pool and replace(pool, labels=pool.labels % 2)
            on_step = start("training the victim") if self.epochs else None
            module = prepare_model(
                architecture, seed=seed, weights=self.weights, train_on=pool, epochs=self.epochs or 0, on_step=on_step
            )
        elif self.weights is not None:
            raise BadInput(f"{folder} comes with its weights: leave --weights out.")
        return Model.of(module, architecture, mode=mode), data

    def private_texts(self, folder: Path, mode: "Mode", seed: int) -> "tuple[Model[Any], Any]":
        """The language model of a folder, and the private texts."""
        from gradleak.formats.model_folder import read_language_model
        from gradleak.modalities.texts import load_texts

        for name in ("weights", "resize"):
            if getattr(self, name) is not None:
                raise BadInput(f"--{name} is for pictures: a language model comes with its weights and takes texts.")
        if mode == "train":
            raise BadInput("Language models are trained without dropout here: --mode eval is all there is.")
        data = load_texts(self.data, self.split, indices=self.indices)
        model = read_language_model(folder, self.task or "classification", classes=data.classes, seed=seed)
        return model, data

    def shown(self) -> dict[str, Any]:
        """What is revealed, as the victims take it."""
        import torch

        return {
            "precision": getattr(torch, self.precision),
            "reveal_labels": self.reveal_labels,
            "reveal_batch_size": not self.hide_batch_size,
        }

    def sourced(self, secret: "Secret") -> "Secret":
        """The secret with the rows that it came from."""
        return replace(secret, source=f"{secret.source} {' '.join(map(str, self.indices))}")


@dataclass(frozen=True, kw_only=True)
class CaptureGradient(Private):
    """Play the victim: train a model on private pictures for one step, keep what is shared."""

    mode: Literal["eval", "train"] = "eval"
    """BatchNorm by running statistics (eval) or by those of the batch (train)."""
    hide_buffers: bool = False
    """Withhold BatchNorm's running statistics."""
    hide_last_layer: bool = False
    """Share every layer's gradient but the last one's, the classifier."""
    rounds: int = 1
    """Rounds of federated training in which the same pictures take part; from one to the next, others train the model on public ones."""
    defense: UseAppendAction[tuple[str, ...]] = ()
    """What is done to it before it is shared, in this order, each as NAME:NUMBER, like top-k:0.1 or noise:0.01 (see `gradleak list`);
    unknown as the last withholds from the attacker those before it."""

    def __call__(self, out: Path, seed: int, start: Start) -> "tuple[Observation[Any], Secret]":
        """The observation, of all rounds where there are several, and the secret."""
        from gradleak.victims.rounds import federated

        if self.rounds < 1:
            raise BadInput(f"A client takes part in 1 round or more, not in {self.rounds}.")
        model, data = self.private(self.mode, PUBLIC_TRAINING, seed, start)
        observation, secret = self.captured(model, data, seed)
        if self.rounds > 1:
            play = partial(self.shared, data=data)
            observation = federated(model, self.others(model), self.rounds, play, seed=seed)
        return observation, self.sourced(secret)

    def others(self, model: "Model[Any]") -> Any:
        """Public data of the training split, that others hold."""
        from gradleak.modalities.pictures import public_pool
        from gradleak.modalities.texts import load_texts

        shape = getattr(model.architecture, "input_shape", None)
        if shape is None:
            return load_texts(self.data, "train", limit=OTHERS)
        pool = public_pool(self.data, "train", shape=shape, limit=PUBLIC_TRAINING)
        return replace(pool, labels=pool.labels % model.architecture.classes)

    def shared(self, model: "Model[Any]", seed: int, data: Any) -> "Observation[Any]":
        """What is shared of one round."""
        return self.captured(model, data, seed)[0]

    def captured(self, model: "Model[Any]", data: Any, seed: int) -> "tuple[Observation[Any], Secret]":
        """What is shared of one round at this global model, and the secret."""
        from gradleak.observations.defense_names import Chosen
        from gradleak.victims.gradient import capture_gradient

        return capture_gradient(
            model,
            data,
            reveal_buffers=not self.hide_buffers,
            reveal_last_layer=not self.hide_last_layer,
            defenses=(chosen := Chosen.of(self.defense)).defenses,
            told=chosen.told,
            seed=seed,
            **self.shown(),
        )


@dataclass(frozen=True, kw_only=True)
class CaptureUpdate(CaptureGradient):
    """Play a client of federated averaging: local SGD on private pictures, then share the change of the parameters."""

    learning_rate: float = 1e-2
    """Of the local SGD."""
    local_steps: int = 5
    """Number of local SGD steps."""
    local_batch_size: int = 1
    """Pictures per local step."""

    def captured(self, model: "Model[Any]", data: Any, seed: int) -> "tuple[Observation[Any], Secret]":
        """What is shared of one round at this global model, and the secret."""
        from gradleak.observations.defense_names import Chosen
        from gradleak.observations.training import Recipe
        from gradleak.victims.gradient import share_update

        recipe = Recipe(learning_rate=self.learning_rate, steps=self.local_steps, batch_size=self.local_batch_size)
        gradient, secret = CaptureGradient.captured(self, model, data, seed)
        defenses = Chosen.of(self.defense).defenses
        return share_update(gradient, secret, recipe, model=model, defenses=defenses, seed=seed), secret


@dataclass(frozen=True, kw_only=True)
class CaptureAdapter(Private):
    """Fine-tune a LoRA adapter on private pictures with the PEFT library, keep the folder that it saves."""

    model: str = "vit"
    """A model of `gradleak list`, package.module:factory of your own, or a trained model of the transformers library, of pictures or of
    texts, as a folder or a name on the Hugging Face hub."""
    epochs: int | None = None
    """Before that, train the base model for so many epochs on 5,000 pictures of the training split; cached. 5 unless this is
    given; of a model of `gradleak list` only."""
    rank: int = 8
    """Rank of the adapter."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; 1 unless this is given."""
    target_modules: str = "all-linear"
    """all-linear, all (convolutions too), or the ends of modules' names with commas between, like q_proj,v_proj."""
    init: Literal["default", "gaussian", "pissa", "olora", "lora_ga"] = "default"
    """How PEFT initialises the adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    optimizer: Optimizer = "sgd"
    """sgd, momentum (0.9), adam or adamw, with torch's defaults."""
    lr: float = 1e-2
    """Learning rate of the fine-tuning."""
    steps: int = 1
    """Number of its steps."""
    local_batch_size: int | None = None
    """Pictures per step; all of them unless this is given."""
    defense: UseAppendAction[tuple[str, ...]] = ()
    """What is done in its training (frozen-a, lora-dropout:0.1, clients:4, mix-up:0.7) or to its factors before they are shared (svd:2,
    noise:1e-4), in this order; unknown as the last withholds from the attacker those before it."""

    def __call__(self, out: Path, seed: int, start: Start) -> "tuple[Observation[Any], Secret]":
        """The observation and the secret; out/adapter, out/base and perhaps out/initial are written."""
        from gradleak.formats.model_folder import folder_of
        from gradleak.observations.training import Recipe
        from gradleak.victims.adapter import fine_tune

        trained = (
            self
            if folder_of(self.model) is not None
            else replace(self, epochs=5 if self.epochs is None else self.epochs)
        )
        model, data = trained.private("eval", PUBLIC_ADAPTED, seed, start)
        init: Init = True if self.init == "default" else self.init
        observation, secret = fine_tune(
            model,
            data,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=tuple(self.target_modules.split(",")) if "," in self.target_modules else self.target_modules,
            recipe=Recipe(
                optimizer=self.optimizer, learning_rate=self.lr, steps=self.steps, batch_size=self.local_batch_size
            ),
            seed=seed,
            init=init,
            rslora=self.rslora,
            defenses=self.defense,
            out=out,
            **self.shown(),
        )
        print(f"{out / 'adapter'}: the adapter, as PEFT saves it\n{out / 'base'}: the model that it belongs to")
        if (out / "initial").is_dir():
            print(f"{out / 'initial'}: the adapter before training, without which its change is not known")
        return observation, self.sourced(secret)
