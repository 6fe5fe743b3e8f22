"""The two ways gradleak says no. Both carry one sentence that a user can act on; the command line prints it and exits with 2."""


class BadInput(ValueError):
    """Something given to gradleak cannot be used as it is: the sentence says what and what would help."""


class NotObserved(BadInput):
    """An attack needs something this observation does not reveal: the sentence names the field and the reason."""
