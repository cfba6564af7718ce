"""Small things that Ray runs. In a file that imports little, for Ray keeps their module with all that it imports."""

from collections import Counter


class Tries:
    """An actor that counts how often each shard was begun: a worker that died doesn't know."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, first: int) -> int:
        """The number of this try, from 1, of the shard that begins with batch `first`."""
        self._begun[first] += 1
        return self._begun[first]


def here() -> None:
    """A task that says, by ending, that there was a place for one."""
