"""`python -m mesh` is the `mesh` command, under the interpreter of one's choice."""

from mesh.cli import main

if __name__ == "__main__":
    main()
