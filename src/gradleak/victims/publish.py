"""The settings of a victim who publishes the weights of a trained network; as `play.py`, importing this costs nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gradleak.formats.secret_file import Secret
    from gradleak.observations.observation import Observation
    from gradleak.victims.play import Start

UNFINISHED = "training.safetensors"  # what an interrupted victim leaves in its folder, and goes on from


@dataclass(frozen=True, kw_only=True)
class CaptureWeights:
    """Train a network on the first pictures of two classes, all at once, until little changes; keep its weights."""

    model: str = "homogeneous1000"
    """A fully connected ReLU network of `gradleak list`, or package.module:factory of your own."""
    data: str = "digits"
    """embedded, digits, a folder (parquet or images), or a name on the Hugging Face hub."""
    split: str = "train"
    """Split of the data that holds the private pictures."""
    per_class: int = 10
    """Private pictures per class: the first odd and even labels; of CIFAR-10, vehicles and animals."""
    resize: tuple[int, int] | None = None
    """Height and width to bring the pictures to."""
    epochs: int = 20_000
    """Steps of gradient descent on all pictures, at most. Training that was interrupted in --out goes on."""
    lr: float = 0.2
    """Learning rate; with --loss-based, the step in the logarithm of the loss."""
    loss: float = 0.0
    """Loss at which training ends."""
    weight_decay: float = 0.0
    """Times the parameters, added to the gradient."""
    loss_based: bool = False
    """Steps in inverse proportion to the loss: exponentially faster once all pictures are classified (try --lr 0.1)."""
    precision: Literal["float64", "float32"] = "float64"
    """Number format of training and weights."""
    reveal_initial: bool = False
    """Tell the attacker the parameters that training started from."""
    reveal_labels: bool = False
    """Tell the attacker the labels."""
    hide_batch_size: bool = False
    """Withhold the number of pictures."""

    def __call__(self, out: Path, seed: int, start: "Start") -> "tuple[Observation[Any], Secret]":
        """The observation and the secret; out/training.safetensors holds what is not finished."""
        import torch

        from gradleak.modalities.networks import Architecture
        from gradleak.observations.model import Model
        from gradleak.victims.weights import FullBatch, first_of_each, publish_weights

        unfinished = out / UNFINISHED
        private = first_of_each(self.data, self.split, self.per_class, resize=self.resize)
        shape = (private.images.shape[1], private.images.shape[2], private.images.shape[3])
        architecture = Architecture(self.model, shape, 2)
        recipe = FullBatch(
            learning_rate=self.lr,
            epochs=self.epochs,
            loss=self.loss,
            weight_decay=self.weight_decay,
            loss_based=self.loss_based,
        )
        observation, secret = publish_weights(
            Model.of(architecture.build(seed).to(getattr(torch, self.precision)), architecture),
            private,
            recipe,
            reveal_initial=self.reveal_initial,
            reveal_labels=self.reveal_labels,
            reveal_batch_size=not self.hide_batch_size,
            resume=unfinished,
            on_step=start("training"),
        )
        return observation, secret
