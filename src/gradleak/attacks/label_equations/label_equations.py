"""Labels of a small batch out of the equations of the last layer, whatever the training; an attack of our own.

Sees      the gradients of the last layer's weight and bias, dW (classes, features) and db (classes,), for batches below the classes
Recovers  the number of samples of each class
Solves    batch [dW, db] = D^T H with D = softmax(H [W, b]^T) - Y, H (batch, features + 1) the features with a 1 behind, Y the labels.
          The rank of [dW, db] is the batch: with its singular value decomposition U S V^T, H = K V^T. So K (batch, batch) is all that is
          unknown, in (classes - 1) batch + batch equations: too many by batch (classes - batch), but for the right labels. Features
          that left a ReLU are not negative, which is as many inequalities again: samples with many zeros are corners of them, and told
          one by one (corners.py). K by Levenberg and Marquardt, of many labels side by side (equations.py): the exact samples with
          corners and mixtures of corners that go together; the best of these with up to three samples drawn anew; then, of the
          best few, one label changed at a time, from the mean features moved along the head's own direction of each label until it
          is predicted as surely as trained networks predict
Misses    batches of as many samples as classes; samples so sure that rounding hides them; most of what a defense changes
"""

import torch
from torch import Tensor

from gradleak.attacks.label_equations.corners import Samples, exact_samples, mixtures, sets
from gradleak.attacks.label_equations.equations import DRAWN, Equations, Tried, key

MOST = 9, 16  # samples and classes: a step inverts a matrix of batch^2 rows, for each label and each other class
SOLVED = 1e-6  # squared error, in units of the singular values, that labels which are right come below, and others hardly ever
BEAM, TRIED, ROUNDS = 4, 12, 8  # labels that are kept; of all that differ by one, solved to the end; how often
DRAWS, SIDE, SETS = 12, 6, 6  # rounds from corners; in every third, starts from the exact samples; sets of each start


def counts_by_equations(equations: Equations, targets: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """The counts (classes,) int64 under which the equations are solved best, and the error that is left: right below `SOLVED`.

    targets (classes, classes): row k is what class k is trained on. start: counts to begin with.
    """
    generator, classes = torch.Generator().manual_seed(0), len(targets)
    typical = equations.typical(0.8)

    def drawn(exact: Samples, listed: Tensor, found: Tried | None, anew: bool) -> Tried:
        """From corners that go together: all samples but the exact ones, if anew; and up to three of the best found."""
        r, starts = len(equations.S), list[tuple[Tensor, Tensor]]()
        pool = mixtures(equations, targets, listed, generator)
        pairs = pool.clash(pool)
        kept = [exact] * (SIDE if anew else 0)
        for labels, K in () if found is None else zip(found.labels, found.K, strict=True):
            for _ in range(2):
                stay = torch.randperm(r, generator=generator)[int(torch.randint(1, 4, (), generator=generator)) :]
                kept.append(Samples.of(equations, targets, K[stay], labels[stay]))
        for known in kept:
            for rows in sets(pool, pairs, known, r - len(known.K), SETS, generator):
                starts.append((torch.cat([known.labels, pool.labels[rows]]), torch.cat([known.K, pool.K[rows]])))
        labels, K = (torch.stack(part) for part in zip(*starts, strict=True))
        K = equations.solve(targets[labels], K, steps=5, power=0.5)[1]
        again = equations.labels(K)  # once the samples have moved
        other = (again != labels).any(1)
        labels, K = torch.cat([labels, again[other]]), torch.cat([K, K[other]])
        error, K = equations.solve(targets[labels], K, steps=6)
        close = Tried.best([Tried(labels, K, error)], TRIED)
        error, K = equations.solve(targets[close.labels], close.K, steps=20)
        best = Tried.best([Tried(close.labels, K, error)] + ([] if found is None else [found]), BEAM)
        error, K = equations.solve(targets[best.labels], best.K, steps=25)
        return Tried.best([Tried(best.labels, K, error)], BEAM)

    def changed(found: Tried, seen: set[tuple[int, ...]]) -> Tried | None:
        """What differs by one label, of what was not seen before: from the K that was found, that sample's from what is typical."""
        r = found.labels.shape[1]
        labels = found.labels[:, None, None].repeat(1, r, classes, 1)  # (n, r, classes, r)
        for i in range(r):
            labels[:, i, :, i] = torch.arange(classes)
        labels = labels.reshape(-1, r)
        keys = [key(row) for row in labels]
        new = torch.tensor([i for i, k in enumerate(keys) if k not in seen], dtype=torch.int64)
        seen |= set(keys)
        if not len(new):
            return None
        K = found.K[:, None, None].repeat(1, r, classes, 1, 1)
        for i in range(r):
            K[:, i, :, i] = typical
        labels, K = labels[new], K.reshape(-1, r, r)[new]
        error, K = equations.solve(targets[labels], K, steps=10, power=0.5, drawn=DRAWN / 100)
        close = Tried.best([Tried(labels, K, error)], TRIED)
        error, K = equations.solve(targets[close.labels], close.K, steps=20)
        return Tried(close.labels, K, error)

    found: Tried | None = None
    if equations.nonnegative:
        exact, listed = exact_samples(equations, targets)
        for turn in range(DRAWS):
            found = drawn(exact, typical if listed is None else listed, found, turn % 3 == 0)
            if float(found.error[0]) < SOLVED:
                break
    if found is None or float(found.error[0]) > SOLVED:
        begun = equations.tried(torch.arange(classes).repeat_interleave(start)[None], targets, generator)
        found = begun if found is None else Tried.best([found, begun], BEAM)
    seen = {key(labels) for labels in found.labels}
    for _ in range(ROUNDS):
        if float(found.error[0]) < SOLVED or (more := changed(found, seen)) is None:
            break
        found = Tried.best([found, more], BEAM)
        if float(found.error[0]) > SOLVED:
            found = Tried.best([found, equations.tried(found.labels, targets, generator)], BEAM)
    return found.labels[0].bincount(minlength=classes), float(found.error[0])
