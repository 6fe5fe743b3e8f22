"""The sentences of the page's own: what a level is called, what to do about it, what the words in tables mean."""

LEVELS = {
    "recovered": "Private data recovered",
    "partial": "Private data partly recovered",
    "members": "Who was in the training data can be told",
    "nothing": "No sample recovered: no proof of safety",
    "absent": "Not in the release: nothing to recover",
    "unscored": "Not scored",
    "void": "Void: these numbers mean nothing",
}
PRIVATELY = "Change how it is made, then audit again: differentially private training bounds every attack, rounding and pruning hide little."
WHAT_TO_DO = {
    "recovered": f"Do not share it as it is. {PRIVATELY}",
    "partial": f"Do not share it as it is. {PRIVATELY}",
    "members": f"Do not share it with anybody who may hold such samples, and learn from it whose they are. {PRIVATELY}",
    "nothing": "Do not take it for safe. Try what was not tried; if you hold the training data, ask with --members which samples it tells.",
    "absent": "Nothing, as long as nobody sees more than is said below.",
    "unscored": "Share nothing on the strength of this page: nothing was compared with the private data. Give them with --secret, or with "
    "--members and --non-members, and audit again.",
    "void": "Mend what the checks name, and run again. Share nothing on the strength of these numbers.",
}
WITH_MEMBERS = {  # the same where membership was asked for already
    "nothing": "Do not take it for safe: try what was not tried, and more samples.",
    "unscored": "Share nothing on the strength of this page: give samples that took no part with --non-members, and audit again.",
}
TERMS = {  # words of the page's own, explained where they are first used
    "Proven": "nothing else explains what was released. It takes no secret to know that.",
    "Gap": "by how much the attack is ahead of the best control that saw nothing of this secret. What leaks is the gap, not the score.",
    "Residual": "the share of what was shared that the reconstruction leaves unexplained, from 0 (explains all) to 1 (explains nothing).",
    "What was invented": "how far apart several answers are that explain what was shared: black where they agree, white where the prior "
    "alone decides (a quarter of the range of pixels).",
}
IDENTIFIED = "the true sample is told from so many candidates by the reconstruction alone."
MEMBER_TERMS = {
    "AUC": "how often a sample that was trained on scores higher than a fresh one. 0.5 is guessing, 1 is certainty.",
    "True positives at 1 % false alarms": "the share of your samples that an attacker picks out who accuses one of 100 others wrongly.",
    "Certificate": "a proof that one sample was trained on; p is how likely a sample that was not would pass it.",
}
OUTCOMES = {  # of what was observed
    "solved": "explains all",
    "close": "explains most",
    "guessed": "a guess",
    "stuck": "explains little",
    "nothing": "nothing came out",
    "diverged": "diverged",
}
SHOWN = {"truth": "Truth", "reconstruction": "Reconstruction", "invented": "What was invented"}  # beside the controls
EVIDENCE = {  # the heading over the strongest evidence; what the numbers are void for is no evidence, unless it is proven
    "recovered": "What came back: {}",
    "partial": "What came back: {}",
    "members": "The closest attack: {}",
    "nothing": "The closest attack: {}",
    "absent": "The closest attack: {}",
    "unscored": "What {} returned",
    "void": "What stands: {}",
}
CHANGING = ("recovered", "partial", "members", "nothing", "unscored")  # levels beside which changes are told
