"""`python -m phf`, which `torchrun -m phf` needs too."""

from phf.cli import main

if __name__ == "__main__":
    main()
