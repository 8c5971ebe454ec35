"""`python -m spectral_paged.cli` runs the command line."""

from spectral_paged.cli import main

raise SystemExit(main())
