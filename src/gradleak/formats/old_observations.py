"""Observation files of older versions: their provenance in the words of today."""

from pathlib import Path
from typing import Any

from gradleak.errors import BadInput
from gradleak.observations.tensors import Tensors

PICTURES, TEXTS = "gradleak/observation/1", "gradleak/text-observation/1"
OLD = (PICTURES, TEXTS)
KINDS = {"Gradient": "gradient", "Update": "update", "Adapter": "adapter", "Weights": "weights"}
BLUEPRINT = ("name", "config", "tokenizer", "special", "task")
SAME = ("frozen", "state_hash", "batch_size", "precision")


def modern(about: dict[str, Any], tensors: Tensors, schema: str, path: Path) -> dict[str, Any]:
    """The provenance of a file of schema 1 as `observation_file.Provenance` has it; BadInput where a part is missing."""
    kind = str(about.get("kind")).removeprefix("Text")
    try:
        settings: dict[str, Any] = {}
        if kind == "Update":
            recipe = about["recipe"]
            rate, steps, size = (recipe[key] for key in ("learning_rate", "local_steps", "local_batch_size"))
            settings["recipe"] = {"learning_rate": rate, "steps": steps, "batch_size": size}
        elif kind == "Adapter":
            settings |= about["adapter"]
        elif kind == "Weights":
            settings |= about["weights"]
        if ("recipe" in about, "adapter" in about, "weights" in about) != tuple(
            kind == name for name in ("Update", "Adapter", "Weights")
        ):
            raise KeyError(kind)
        common = {"release": KINDS[kind], "settings": settings, **{key: about[key] for key in SAME}}
        names = [name.removeprefix("parameters/") for name in tensors if name.startswith("parameters/")]
        if kind == "Weights":
            common["known"] = [name for name in names if name not in about["frozen"]]
        if schema == TEXTS:
            blueprint = {key: about[key] for key in BLUEPRINT}
            more = {"modality": "texts", "blueprint": blueprint, "mode": "eval", "buffers_revealed": True}
            return {**common, **more, "criterion": {"name": "cross-entropy"}}
        if kind in ("Gradient", "Update"):
            common["released"] = [name for name in names if name not in about["frozen"]]
        more = {"modality": "pictures", "blueprint": about["architecture"], "mode": about["mode"]}
        more |= {"criterion": {"name": "cross-entropy", "reduction": about["reduction"]}}
        return {**common, **more, "buffers_revealed": about["buffers_revealed"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{path} has no usable provenance: it cannot be trusted to be what it says.") from error
