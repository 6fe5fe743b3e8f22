"""Hand the results of an audit on, to Weights & Biases or into a model card on the Hugging Face hub. Only what holds no private data is read:
summary.json and summary.md of the folder of `gradleak audit`.

    python examples/publish_results.py audited --wandb my-project      # WANDB_MODE=offline keeps it on this machine
    python examples/publish_results.py audited --card me/my-adapter

An adapter that is not on the hub yet is audited on its way there by `gradleak.integrations.hub.guarded_push`.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from gradleak.integrations.hub import update_card


def to_wandb(folder: Path, project: str) -> None:
    """A run with the verdict and the risk as its summary, and a table of the attacks."""
    wandb: Any = import_module("wandb")
    told = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    columns = ["attack", "observation", "ran", "status", "recovered", "partly", "proven", "lead", "residual", "seconds"]
    run = wandb.init(project=project, job_type="audit", config={"gradleak": told["gradleak"], "input": told["input"]})
    run.summary.update({"verdict": told["verdict"]["level"], "risk": (told["risk"] or {}).get("label")})
    table = wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in told["attacks"]])
    run.log({"attacks": table})
    run.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of gradleak audit")
    parser.add_argument("--wandb", metavar="PROJECT")
    parser.add_argument("--card", metavar="REPOSITORY")
    given = parser.parse_args()
    if given.wandb:
        to_wandb(given.folder, given.wandb)
    if given.card:
        update_card(given.card, (given.folder / "summary.md").read_text(encoding="utf-8"))
