"""One cache of one capacity, filled and emptied step by step: what the simulator of all capacities must agree with."""

from fractions import Fraction


class Memory:
    """What a policy knows at one moment: the events of the stream, and how far each use has happened."""

    def __init__(self, events: list[list[int]], policy: str, span: int, half_life: Fraction):
        self.events, self.policy, self.span, self.half_life = events, policy, span, half_life
        self.done: list[tuple[int, int, int]] = []  # (event, place in the event, expert)

    def rank(self, expert: int, now: int) -> tuple:
        """The larger, the better."""
        mine = [(event, place) for event, place, other in self.done if other == expert]
        last = mine[-1] if mine else (-1, -1)
        if self.policy == "lru":
            return last
        if self.policy == "lfu":
            return (len(mine), last)
        if self.policy == "window":
            return (sum(now - self.span < event <= now for event, _ in mine), last)
        if self.policy == "aged-lfu":  # exact: 1/half_life is whole, so every weight is a whole number
            return (sum(2 ** int(event / self.half_life) * (2**32 + place) for event, place in mine),)
        happened = {(event, other) for event, _, other in self.done}
        ahead = [event for event in range(now, len(self.events)) if expert in self.events[event]]
        ahead = [event for event in ahead if (event, expert) not in happened]
        if self.policy == "lookahead":
            return (sum(event < now + self.span for event in ahead), last)
        following = [(event, self.events[event].index(expert)) for event in ahead]
        return tuple(-at for at in following[0]) if following else (-len(self.events) - 1, 0)


def brute(runs, capacity, policy, *, access="token", admission="forced", keep=True, span=3, half_life=Fraction(1, 2)):
    """Hits, cold misses into a free place, and other cold misses of one cache, by doing what it does."""
    hits = free = cold = 0
    if keep:
        runs = [[event for run in runs for event in run]]
    for events in runs:
        held: set[int] = set()
        seen: set[int] = set()
        memory = Memory(events, policy, span, half_life)
        for now, event in enumerate(events):
            before = set(held)
            groups = [event] if access == "token" else [[expert] for expert in event]
            for group in groups:
                for expert in group:
                    if expert in (held if access == "single" else before):
                        hits += 1
                    elif expert not in seen:
                        free, cold = free + (len(seen) < capacity), cold + 1
                    seen.add(expert)
                    memory.done.append((now, event.index(expert), expert))
                protected = set(group) if admission == "forced" else set()
                others = sorted((held | set(group)) - protected, key=lambda e: memory.rank(e, now), reverse=True)
                held = protected | set(others[: capacity - len(protected)])
    return hits, free, cold
