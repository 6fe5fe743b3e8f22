"""`python -m gradleak.cli` is `gradleak`."""

import sys

from gradleak.cli.app import main

sys.exit(main())
