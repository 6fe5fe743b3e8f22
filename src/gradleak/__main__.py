"""`python -m gradleak` is `gradleak`."""

import sys

from gradleak.cli.app import main

sys.exit(main())
