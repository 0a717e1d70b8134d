"""`python -m nestling`, and `torchrun -m nestling` for several processes."""

from __future__ import annotations

from nestling.cli.app import main

if __name__ == "__main__":
    main()
