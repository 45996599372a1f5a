"""`python -m compress`: the command line of `compress.cli.main`."""

from compress.cli.main import main

if __name__ == "__main__":
    main()
