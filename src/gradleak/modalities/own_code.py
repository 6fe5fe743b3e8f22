"""Code of the user's own, named on the command line as package.module:name: a model's factory, an attack."""

import importlib
import os
import sys
from typing import Any

from gradleak.errors import BadInput, shortened


def named(place: str, what: str) -> Any:
    """What package.module:name names; also looked for in the current folder, after all else. Raises BadInput."""
    module, _, attribute = place.partition(":")
    here = os.getcwd()
    sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"Cannot import {what} {shortened(place)!r}: {shortened(str(error))}.") from error
    finally:
        sys.path.remove(here)
