"""``python -m pylomin``."""

from pylomin.cli import main

if __name__ == "__main__":
    main()
