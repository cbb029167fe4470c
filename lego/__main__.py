"""The `lego` command."""

import os


def main() -> int:
    """Run the command line; see lego.cli. Returns the exit code."""
    # two OpenMP threads that spin on a busy core train 5 to 10 times slower than two that sleep;
    # libgomp reads this once, when torch loads it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lego.cli import run_command

    return run_command()


if __name__ == "__main__":
    raise SystemExit(main())
