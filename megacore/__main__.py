"""``python -m megacore``, the same as the ``megacore`` program."""

from megacore.cli import main

if __name__ == "__main__":
    main()
