"""`python -m fallow` is the `fallow` command."""

from fallow.cli.entry import main

if __name__ == "__main__":
    main()
