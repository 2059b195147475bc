"""`python -m enstack_lightning` is `enstack`."""

from enstack_lightning.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
