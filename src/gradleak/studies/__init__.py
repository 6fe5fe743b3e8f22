"""Published experiments, one short file each. RECIPES is the only place where a recipe has a name.

A recipe is called with (data, size, *, seed, start), and with device where it can use one.
"""

from collections.abc import Callable, Iterator

from gradleak.studies import (
    dager_decoder,
    dager_encoder,
    dager_fedavg,
    dager_noise,
    dsire,
    fresh_vs_saved,
    git_architecture,
    git_cifar10,
    git_discrepancy,
    git_exact,
    git_models,
    git_noise,
    git_prior,
    git_shift,
    kkt,
    kkt_lora,
    lora_text,
    ntk,
    past_the_rank,
    phase0,
    phase1,
    phase2,
    rank_heatmap,
    recursion,
    starts,
)
from gradleak.studies.findings import Findings

RECIPES: dict[str, Callable[..., Iterator[Findings]]] = {
    "fresh-vs-saved": fresh_vs_saved.run,
    "phase0": phase0.run,
    "phase1": phase1.run,
    "phase2": phase2.run,
    "starts": starts.run,
    "dsire": dsire.run,
    "git-cifar10": git_cifar10.run,
    "git-exact": git_exact.run,
    "git-noise": git_noise.run,
    "git-shift": git_shift.run,
    "git-discrepancy": git_discrepancy.run,
    "git-architecture": git_architecture.run,
    "git-prior": git_prior.run,
    "git-faces": git_models.run_faces,
    "git-resnet": git_models.run_resnet,
    "git-vit": git_models.run_vit,
    "recursion": recursion.run,
    "kkt": kkt.run,
    "kkt-lora": kkt_lora.run,
    "rank-heatmap": rank_heatmap.run,
    "ntk": ntk.run,
    "dager-encoder": dager_encoder.run,
    "dager-decoder": dager_decoder.run,
    "dager-noise": dager_noise.run,
    "dager-fedavg": dager_fedavg.run,
    "lora-text": lora_text.run,
    "past-the-rank": past_the_rank.run,
}
