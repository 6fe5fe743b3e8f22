"""Can members and fresh samples be told apart without the model? Then they are of two sources, and whatever separates them is no
membership (Duan et al. 2024, arXiv:2402.07841; Das, Zhang and Tramer 2024, arXiv:2406.16201)."""

from typing import Any

import torch

from gradleak.audit.membership.rates import auc, auc_interval

PARTS = 5  # of the cross-validation


def told_apart(features: Any, is_member: list[bool], seed: int) -> tuple[float, float, float]:
    """(AUC, low, high) of a logistic regression that has seen neither model nor release, on samples that it was not fitted to."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    parts = StratifiedKFold(PARTS, shuffle=True, random_state=seed)
    classifier = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1_000))
    scores = cross_val_predict(classifier, features, is_member, cv=parts, method="decision_function")
    values, member = torch.from_numpy(scores), torch.tensor(is_member)
    area = auc(values[member], values[~member])
    return (area, *auc_interval(area, int(member.sum()), int((~member).sum())))
