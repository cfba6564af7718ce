"""`python -m workbench` and the `workbench` command."""

import errno
import os
import re
import sys

_NO_MEMORY = re.compile(
    r"can(no|')t allocate memory|failed to map segment|can't start new thread|resource temporarily unavailable",
    re.IGNORECASE,
)
"""What torch, the system, the loader of libraries, Python and Rust say."""

_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)
"""A path that nobody can open, or this user can't: what a command was given, wherever it is noticed."""


def main() -> None:
    """Run the command line; an expected failure is one line on stderr and an exit code, never a traceback."""
    # transformers reads these when it is imported; the command has a progress bar and messages of its own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from workbench.errors import InputError, RunError, interruptible

    try:
        with interruptible():
            from workbench.cli import app

            app()
    except KeyboardInterrupt:  # what is said of it was said
        sys.exit(130)
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # `workbench query … | head`
        sys.stderr.close()
        sys.exit(0)
    except BaseException as error:  # Rust's panics are no Exceptions
        if isinstance(error, OSError) and error.errno in _NO_SUCH_NAME and error.filename:
            _fail(f"{_shortened(str(error.filename))}: {error.strerror}. Check the path.", 2)
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        _fail("memory ran out. Give the command more, or ask for less of it at once. What it had written is whole.", 1)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}…{text[-50:]}"


def _fail(message: str, code: int) -> None:
    from workbench.printing import paragraphs

    print(f"error: {paragraphs(message)}", file=sys.stderr)  # names from a trace or a corpus are in it
    sys.exit(code)


if __name__ == "__main__":
    main()
