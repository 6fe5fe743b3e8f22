"""Labels where the last layer was withheld: what the layers before it tell of them, for the report and for the attacks."""

from dataclasses import replace
from typing import Any

import torch

from gradleak.attacks.label_counts.label_counts import frequent_counts, label_counts, last_layer_withheld
from gradleak.audit.explanations import flag
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.observations.observation import Observation
from gradleak.report.record import Flag


def labels_told(
    observation: Observation[Any], public: Any | None, secret: Secret | None, seed: int
) -> tuple[Observation[Any], list[Flag]]:
    """The observation with the labels that were read, for attacks that need some; and a line on them, with their certainty, beside the
    truth, where it is there. Or why none were read, which proves nothing."""
    if not last_layer_withheld(observation):
        return observation, []
    try:
        if public is None:
            raise NotObserved("Labels were not given, and reading them takes public samples.")
        found = label_counts(observation, public, generator=torch.Generator().manual_seed(seed))
    except NotObserved as reason:
        sentence = f"The last layer was withheld, and no labels were read: {reason} That does not show them to be safe."
        return observation, [flag("labels_not_read", "warning", sentence)]
    sentence = f"The last layer was withheld. {found.sentence()}"
    if secret is not None and secret.labels is not None and secret.labels.ndim == 1:
        true = secret.labels.cpu().bincount(minlength=len(found.counts))
        guess = frequent_counts(public, len(true), len(secret))
        right, blind = (int(torch.minimum(counts, true).sum()) for counts in (found.counts, guess))
        sentence += f" {right} of {len(secret)} are; the frequencies of classes alone give {blind}."
    sentence += " Attacks that need labels are given these."
    labels = found.labels.to(next(iter(observation.released.values())).device)
    return replace(observation, read_labels=labels), [flag("labels_told", "warning", sentence)]
