"""`python -m workbench` and the `workbench` command."""

import os
import sys


def main() -> None:
    """Run the command line; an expected failure is one line on stderr and an exit code, never a traceback."""
    # transformers reads these when it is imported; the command has a progress bar and messages of its own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from workbench.cli import app
    from workbench.errors import InputError, RunError

    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # `workbench query … | head`
        sys.stderr.close()
        sys.exit(0)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
