"""How a driver asks its worker groups to stop, and how their ranks agree on the place: in the cluster's shared table.

    driver                     rank                                   every rank's thread (worker/stop_gate.py)
      |                          |                                      |
      | a signal: make() ------->|------------------------------------->| is_made(): propose(unit it is in)
      |                          | waits before the unit after that     | rank 0: agree(the latest proposal)
      |                          |<-------------------------------------| agreed()
      |                          | works up to the agreed unit          |
      |                          | saves a checkpoint and ends          |
      |<- the group ends --------|                                      |

What the unit of work is, and why no rank waits for ever, stands in `pipelines.worker.stop_gate`.
"""

from dataclasses import dataclass
from uuid import uuid4

from pipelines.shared_table import SharedTable

_NONE = -1


@dataclass(frozen=True)
class StopRequest:
    """A request to stop all worker groups of one command; each of them is given it when it is launched."""

    key: str
    """Names the request among all of the cluster."""
    of_all: "StopRequest | None" = None
    """For a request to some of the groups: the one to all of them, which it includes."""

    @classmethod
    def new(cls) -> "StopRequest":
        """Return a request that is not made yet."""
        return cls(uuid4().hex)

    def for_some(self) -> "StopRequest":
        """Return a request to some of the groups, which is also made if this one is."""
        return StopRequest(uuid4().hex, self)

    def make(self) -> None:
        """Ask all groups to stop."""
        self._table.put("is made", 1)

    def make_and_allow(self, grace_s: float) -> float:
        """Ask all groups to stop; return the seconds to wait for them: `grace_s`, or 0 if none has begun to work."""
        self.make()
        return grace_s if self.is_work_reported() else 0.0

    def is_made(self) -> bool:
        """Return whether the groups are asked to stop."""
        return self.is_made_alone() or (self.of_all is not None and self.of_all.is_made())

    def is_made_alone(self) -> bool:
        """Return whether this request is made, whatever that to all groups is."""
        return self._table.get("is made", 0) == 1

    def report_work(self) -> None:
        """Record that a group has begun to work."""
        self._table.put("works", 1)
        if self.of_all is not None:
            self.of_all.report_work()

    def is_work_reported(self) -> bool:
        """Return whether a group has begun to work."""
        return self._table.get("works", 0) == 1

    def vote(self, group: str) -> "StopVote":
        """Return the vote of a group, whose name no other group of the cluster has, nor the same one restarted."""
        return StopVote(SharedTable(self._table.namespace, f"{self.key}/{group}"))

    @property
    def _table(self) -> SharedTable:
        return SharedTable("mae-stop", self.key)


@dataclass(frozen=True)
class StopVote:
    """The vote of a group's ranks on the unit of work after which all of them stop; units are numbered alike."""

    _table: SharedTable

    def propose(self, rank: int, unit: int) -> None:
        """Propose the unit that the rank is in, the earliest after which it can stop."""
        self._table.put(str(rank), unit)

    def proposals(self, world: int) -> list[int]:
        """Return the proposals that have been made."""
        found = [self._table.get(str(rank), _NONE) for rank in range(world)]
        return [unit for unit in found if unit != _NONE]

    def agree(self, unit: int) -> None:
        """Settle the vote on a unit."""
        self._table.put("agreed", unit)

    def agreed(self) -> int | None:
        """Return the unit that the vote was settled on; None before that."""
        unit = self._table.get("agreed", _NONE)
        return None if unit == _NONE else unit
