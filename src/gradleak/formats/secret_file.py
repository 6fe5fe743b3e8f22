"""What the attacker must not see, in memory and on disk. Only victims (who keep it), the audit (which opens it) and studies
import this file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from gradleak.errors import BadInput, checked
from gradleak.observations import tensor_file

SCHEMA, PICTURES, TEXTS = "gradleak/secret/2", "gradleak/secret/1", "gradleak/text-secret/1"
Sentence = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]


@dataclass(frozen=True)
class Secret:
    """The private training data behind an observation.

    inputs  as the model was fed with them: pictures (batch, channel, height, width) float32 in [0, 1], or sentences of token
            ids, special tokens and masks included
    labels  (batch,) int64; (batch, longest) of a masked language model: the tokens under the masks, else -100; or None where
            the task has none
    source  where they came from, e.g. "embedded test 0 1 2"; printed in reports that are scored
    classes what the labels are called, where that is known; as many as there are, or none
    """

    inputs: Any
    labels: Tensor | None
    source: str = ""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)


class About(msgspec.Struct, frozen=True):
    """The header of a secret: tokens where the inputs are sentences, else they are the tensor `inputs`."""

    source: str = ""
    tokens: Annotated[list[Sentence], Meta(min_length=1)] | None = None
    labelled: bool = True
    classes: tuple[str, ...] = ()


def save_secret(secret: Secret, path: Path) -> None:
    """Write what only the audit may open; nobody else on this machine may read it."""
    tensors = {} if secret.labels is None else {"labels": secret.labels}
    about: dict[str, Any] = {"source": secret.source, "labelled": secret.labels is not None}
    about |= {"classes": secret.classes} if secret.classes else {}
    if isinstance(secret.inputs, Tensor):
        tensors["inputs"] = secret.inputs
    else:
        about["tokens"] = secret.inputs
    tensor_file.write(tensors or {"none": torch.zeros(0)}, SCHEMA, about, path, private=True)


def load_secret(path: Path) -> Secret:
    """Read a secret back, of this version or an older one; BadInput if the file is something else."""
    tensors, header = tensor_file.open_tensors(path)
    schema = header.get("schema", "")
    plain = tensor_file.described(header, schema if schema in (PICTURES, TEXTS) else SCHEMA, path)
    about = checked(plain, About, f"{path} is damaged")
    labels = tensors.get("labels") if about.labelled else None
    inputs: Any = tensors.get("images", tensors.get("inputs"))
    if about.tokens is not None:
        inputs = tuple(map(tuple, about.tokens))
    elif inputs is None or inputs.ndim != 4 or not inputs.numel() or not inputs.is_floating_point():
        raise BadInput(f"{path} is damaged: it holds neither pictures (n, channel, height, width) nor texts.")
    elif float(inputs.min()) < 0 or float(inputs.max()) > 1:
        raise BadInput(f"{path} is damaged: its pictures have pixels outside [0, 1].")
    else:
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    if about.labelled and (labels is None or labels.dtype != torch.int64 or labels.ndim not in (1, 2)):
        raise BadInput(f"{path} is damaged: its labels are no class indices.")
    if labels is not None and len(labels) != len(inputs):
        raise BadInput(f"{path} is damaged: it holds {len(labels)} labels for {len(inputs)} inputs.")
    return Secret(inputs, labels, about.source, about.classes)
