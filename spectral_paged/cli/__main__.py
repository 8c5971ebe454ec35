"""`python -m spectral_paged.cli`."""

from spectral_paged.cli import main

raise SystemExit(main())
