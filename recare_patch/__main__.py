"""``python -m recare_patch`` is the command ``recare-patch``."""

from recare_patch.cli import main

if __name__ == "__main__":
    main()
