"""`python -m gradleak.cli` is `gradleak`, as it was before `python -m gradleak`."""

import sys

from gradleak.cli.app import main

sys.exit(main())
