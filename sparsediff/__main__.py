"""`python -m sparsediff` is the `sparsediff` command."""

from sparsediff.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
