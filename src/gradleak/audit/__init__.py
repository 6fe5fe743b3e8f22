"""What a reconstruction means: `from gradleak.audit import audit`, the one loop, and what it is made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradleak.audit.loop import audit as audit


def __getattr__(name: str) -> Any:
    if name != "audit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradleak.audit.loop import audit

    return audit
