"""``python -m bdprune``."""

from bdprune.cli.main import main

if __name__ == "__main__":
    main(prog_name="bdprune")
