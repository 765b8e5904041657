"""`python -m unirank.cli`, for launchers that start modules, such as torchrun."""

from unirank.cli.main import main

if __name__ == "__main__":
    main()
