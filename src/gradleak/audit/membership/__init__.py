"""Which of the owner's own samples an attacker tells from fresh ones, with intervals."""
