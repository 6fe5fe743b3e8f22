"""What whoever shares may change, for each kind of release and of data: what it did to attackers who knew of it, what it cost, and on
which page of docs/ that was measured. Where an attack through a change was measured, the change is not called a protection."""

from dataclasses import dataclass

GRADIENT, UPDATE, ADAPTER, WEIGHTS = "gradient", "update", "adapter", "weights"
PICTURES, TEXTS = "pictures", "texts"


@dataclass(frozen=True)
class Remedy:
    """One change, its effect, its cost, and the page."""

    change: str
    effect: str
    cost: str
    source: str


PRIVATE = Remedy(
    "Train with differential privacy (DP-SGD): cut each sample's gradient, add noise. The library Opacus does it.",
    "The only change here with a proof, against every attack. Its measure is epsilon: the smaller, the more private. At epsilon 8 (delta 1e-5) the "
    "best attacker who sees a step picks the true one of 100 pictures in at most 25 % of cases by proof, and in 17 % as measured; at epsilon 4 in 8 "
    "and 6 %. Chance is 1 %.",
    "Accuracy, the more the smaller epsilon and the data are. In an example of 200 digits and two epochs it fell from 0.88 to 0.28 at epsilon 8.6 "
    "(docs/findings/defenses.md): measure it on your task.",
    "findings/canaries.md",
)
SHORTER = Remedy(
    "Keep the largest tenth of the entries, or round to 8 bits.",
    "Hides next to nothing: 91 to 100 % of the words of single texts still came back.",
    "Not measured for texts.",
    "findings/defenses.md",
)
NOISE = Remedy(
    "Add noise as large as ten times the gradient, or keep 2 bits of each number.",
    "Words came back no better than by chance, of five texts. Noise of the gradient's own size left 78 % of them. Nothing is proven.",
    "Not measured.",
    "findings/defenses.md",
)
COARSER = Remedy(
    "Share less of each number: the largest entries alone, their signs, 8, 4 or 2 bits, or noise of a tenth of the gradient.",
    "Hides nothing that matters: behind each of these, some attack that knew of it still picked all of three digits out of 100 candidates. What "
    "stops one attack does not stop the next.",
    "Accuracy between 0.73 (2 bits) and 0.86, where it was 0.85: no reason to do it for privacy.",
    "findings/defenses.md",
)
STEPS = Remedy(
    "Share the change after several local steps on more samples, in place of a gradient.",
    "In fully connected networks eight images were no longer recognisable (SSIM below 0.5) after 5 steps, sixteen after 2; two stayed recognisable "
    "after 1,000 steps. Nothing is proven.",
    "Not measured.",
    "findings/weights.md",
)
START = Remedy(
    "Begin the training from true randomness in place of a seed (lora_A drawn from the operating system's), and never share the adapter as it was before "
    "training.",
    "Takes the exact attacks away that know where training began: they read hundreds of steps on many samples, and usual seeds are found in "
    "seconds. One step on one sample is read without it. Nothing is proven.",
    "None: one random start is as good as another.",
    "findings/adapters.md",
)
RANK = Remedy(
    "A small rank (2 or less) with several pictures in each step.",
    "After one step, rank 2 gave one picture away, and no batch of two. Nothing is proven, and a start that is known undoes it.",
    "What a small rank costs your task: measure it.",
    "findings/lora_bridge.md",
)
EARLY = Remedy(
    "More samples, no weight decay, and a training that ends before nothing changes any more.",
    "Two images came back exactly, of twenty 9 to 13 were recognisable; weight decay helped the attacker. Nothing is proven.",
    "Accuracy, where the training needs either.",
    "findings/weights.md",
)

OF_TEXTS, OF_PICTURES = (PRIVATE, NOISE, SHORTER), (PRIVATE, STEPS, COARSER)
REMEDIES: dict[tuple[str, str], tuple[Remedy, ...]] = {
    (GRADIENT, PICTURES): OF_PICTURES,
    (UPDATE, PICTURES): OF_PICTURES,
    (GRADIENT, TEXTS): OF_TEXTS,
    (UPDATE, TEXTS): OF_TEXTS,
    (ADAPTER, PICTURES): (PRIVATE, START, RANK),
    (ADAPTER, TEXTS): (PRIVATE, START),
    (WEIGHTS, PICTURES): (PRIVATE, EARLY),
}


def remedies(release: str, modality: str) -> tuple[Remedy, ...]:
    """The changes that were measured for such a release of such data; for one that is not listed, what is proven for all."""
    return REMEDIES.get((release, modality), (PRIVATE,))
