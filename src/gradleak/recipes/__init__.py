"""Published experiments, one short file each. RECIPES is the only place where a recipe has a name."""

from gradleak.recipes import (
    dsire,
    fresh_vs_saved,
    git_architecture,
    git_cifar10,
    git_discrepancy,
    git_models,
    git_noise,
    git_prior,
    git_shift,
    phase0,
    phase1,
    phase2,
    recursion,
    starts,
)

RECIPES = {
    "fresh-vs-saved": fresh_vs_saved.run,
    "phase0": phase0.run,
    "phase1": phase1.run,
    "phase2": phase2.run,
    "starts": starts.run,
    "dsire": dsire.run,
    "git-cifar10": git_cifar10.run,
    "git-noise": git_noise.run,
    "git-shift": git_shift.run,
    "git-discrepancy": git_discrepancy.run,
    "git-architecture": git_architecture.run,
    "git-prior": git_prior.run,
    "git-faces": git_models.run_faces,
    "git-resnet": git_models.run_resnet,
    "git-vit": git_models.run_vit,
    "recursion": recursion.run,
}
