"""`python -m pa_fast` is `pa-fast`."""

from pa_fast.cli import main

if __name__ == "__main__":
    main()
