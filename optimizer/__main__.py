"""``python -m optimizer`` is the command ``optimize``."""

from optimizer.cli import main

if __name__ == "__main__":
    main()
