"""The plan on disk, so that memory does not grow with the number of rows. SQLite; made anew from table and journal."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .tasks import COLUMNS, Planned, Task, task_of

NAME = "index.sqlite"
_DIGESTS = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stamp TEXT, digest TEXT)"
_TABLES = """
DROP TABLE IF EXISTS tasks; DROP TABLE IF EXISTS needs; DROP TABLE IF EXISTS groups;
CREATE TABLE tasks (
  no INTEGER PRIMARY KEY, id TEXT UNIQUE, row INTEGER, name TEXT UNIQUE COLLATE NOCASE, key TEXT, encodes INTEGER,
  grouped TEXT, sort TEXT, spec TEXT, grp INTEGER, rank INTEGER, state TEXT, waiting INTEGER DEFAULT 0,
  attempts INTEGER DEFAULT 0, avoid TEXT DEFAULT '', alone INTEGER DEFAULT 0,
  message TEXT DEFAULT '', result TEXT DEFAULT '', begun TEXT DEFAULT '');
CREATE TABLE needs (task INTEGER, encoding INTEGER);
CREATE TABLE groups (g INTEGER PRIMARY KEY, ready INTEGER DEFAULT 0, owner TEXT);
"""
_INDEXES = """
CREATE INDEX by_group ON tasks (grp, state, waiting, rank); CREATE INDEX by_state ON tasks (state, waiting);
CREATE INDEX groups_free ON groups (owner, g) WHERE ready > 0; CREATE INDEX groups_ready ON groups (ready);
CREATE TRIGGER counted AFTER UPDATE OF state, waiting ON tasks BEGIN
  UPDATE groups SET ready = ready - (OLD.state = 'pending' AND OLD.waiting = 0)
    + (NEW.state = 'pending' AND NEW.waiting = 0) WHERE g = NEW.grp; END;
"""
ENDED = ("ok", "invalid", "refused", "failed", "poison")


class Index:
    """Tasks, their states and their groups; and digests of files, which outlive a plan."""

    def __init__(self, folder: Path) -> None:
        """Open it; a damaged file is made anew."""
        path = folder / NAME
        try:
            self._open(path)
        except sqlite3.DatabaseError:
            path.unlink(missing_ok=True)
            self._open(path)
        self._next = 0
        self._last_rank = 0

    def _open(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for line in ("synchronous = OFF", "journal_mode = OFF", "temp_store = FILE", "cache_size = -20000"):
            self._db.execute(f"PRAGMA {line}")
        self._db.execute(_DIGESTS)
        self._db.executescript(_TABLES)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def digest(self, path: str, stamp: str) -> str | None:
        """The digest of a file that has not changed since it was remembered."""
        found = self._db.execute("SELECT digest FROM digests WHERE path = ? AND stamp = ?", (path, stamp)).fetchone()
        return str(found[0]) if found else None

    def remember_digest(self, path: str, stamp: str, digest: str) -> None:
        """See `digest`."""
        self._db.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (path, stamp, digest))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Many changes at once."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def find(self, task_id: str) -> tuple[int, str, str] | None:
        """Number, key and state of a task by id."""
        found = self._db.execute("SELECT no, key, state FROM tasks WHERE id = ?", (task_id,)).fetchone()
        return (int(found[0]), str(found[1]), str(found[2])) if found else None

    def row_of(self, name: str) -> int | None:
        """The row whose picture has this name."""
        found = self._db.execute("SELECT row FROM tasks WHERE name = ?", (name,)).fetchone()
        return int(found[0]) if found else None

    def add(self, task: Planned, state: str = "pending", message: str = "") -> int:
        """Put a task in; its number."""
        self._next += 1
        values = (task.id, task.row, task.name, task.key, task.encodes, task.grouped, task.sort, json.dumps(task.spec))
        self._db.execute(
            "INSERT INTO tasks (no, id, row, name, key, encodes, grouped, sort, spec, state, message, waiting) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self._next, *values, state, message, len(task.needs)),
        )
        self._db.executemany("INSERT INTO needs VALUES (?, ?)", [(self._next, other) for other in task.needs])
        return self._next

    def note(self, no: int, state: str, message: str = "", result: dict[str, Any] | None = None) -> None:
        """Before `group`: what the journal says of a task."""
        self._db.execute(
            "UPDATE tasks SET state = ?, message = ?, result = ?, begun = '' WHERE no = ?",
            (state, message, json.dumps(result) if result else "", no),
        )

    def note_begun(self, no: int, begun: dict[str, Any]) -> None:
        """Before `group`: an attempt of which the journal knows no end."""
        self._db.execute("UPDATE tasks SET begun = ? WHERE no = ?", (json.dumps(begun), no))

    def begun(self) -> list[tuple[int, dict[str, Any]]]:
        """The tasks that wait to be done and had begun when an earlier driver ended."""
        query = "SELECT no, begun FROM tasks WHERE begun <> '' AND state = 'pending' AND waiting = 0 ORDER BY no"
        return [(int(no), json.loads(begun)) for no, begun in self._db.execute(query)]

    def start(self, no: int) -> Task:
        """A task that waits to be done is running then."""
        self._db.execute("UPDATE tasks SET state = 'running' WHERE no = ?", (no,))
        return self.by_number(no)

    def group(self) -> None:
        """Once all tasks and what the journal says of them are there: what waits for what, and in which order."""
        db = self._db
        waits = "SELECT count(*) FROM needs n JOIN tasks e ON e.no = n.encoding WHERE n.task = tasks.no"
        db.execute("CREATE INDEX by_encoding ON needs (encoding)")
        db.execute("CREATE INDEX by_task ON needs (task)")
        db.execute(f"UPDATE tasks SET waiting = ({waits} AND e.state <> 'ok') WHERE encodes = 0")
        ended = "('refused', 'failed', 'poison')"
        for no, state, message in db.execute(
            f"SELECT no, state, message FROM tasks WHERE encodes = 1 AND state IN {ended}"
        ).fetchall():
            self.set_state(no, state, message)
        wanted = (
            "SELECT 1 FROM needs n JOIN tasks t ON t.no = n.task WHERE n.encoding = tasks.no AND t.state = 'pending'"
        )
        db.execute(
            f"UPDATE tasks SET state = 'spare' WHERE encodes = 1 AND state = 'pending' AND NOT EXISTS ({wanted})"
        )
        db.execute("CREATE TEMP TABLE ordered AS SELECT no FROM tasks ORDER BY encodes DESC, grouped, sort, no")
        db.execute("CREATE UNIQUE INDEX temp.ordered_no ON ordered (no)")
        db.execute("UPDATE tasks SET rank = (SELECT o.rowid FROM ordered o WHERE o.no = tasks.no)")
        db.execute(
            "CREATE TEMP TABLE named AS SELECT encodes, grouped, min(rank) AS first FROM tasks "
            "GROUP BY encodes, grouped ORDER BY first"
        )
        db.execute("CREATE INDEX temp.named_by ON named (encodes, grouped)")
        db.execute(
            "UPDATE tasks SET grp = (SELECT n.rowid FROM named n WHERE n.encodes = tasks.encodes "
            "AND n.grouped = tasks.grouped)"
        )
        db.execute("INSERT INTO groups (g) SELECT rowid FROM named")
        db.execute("DROP TABLE ordered")
        db.execute("DROP TABLE named")
        self._last_rank = self._next
        db.execute("PRAGMA journal_mode = MEMORY")  # the plan itself is made anew at each start, and takes nothing back
        db.executescript(_INDEXES)
        db.execute(
            "UPDATE groups SET ready = (SELECT count(*) FROM tasks WHERE grp = g AND state = 'pending' AND waiting = 0)"
        )

    def set_state(self, no: int, state: str, message: str = "", result: dict[str, Any] | None = None) -> None:
        """What became of a task; the tasks that need it go on, or end with it."""
        self._db.execute(
            "UPDATE tasks SET state = ?, message = ?, result = ? WHERE no = ?",
            (state, message, json.dumps(result) if result else "", no),
        )
        dependent = "no IN (SELECT task FROM needs WHERE encoding = ?)"
        if state == "ok":
            self._db.execute(f"UPDATE tasks SET waiting = waiting - 1 WHERE {dependent}", (no,))
        elif state in ENDED:
            self._db.execute(
                f"UPDATE tasks SET state = ?, message = ? WHERE state = 'pending' AND {dependent}",
                (state, f"its encoding: {message}", no),
            )

    def charge(self, no: int, worker: str) -> int:
        """Count a failed attempt against a task, which is alone from then on; how many it has."""
        self._db.execute("UPDATE tasks SET attempts = attempts + 1, avoid = ?, alone = 1 WHERE no = ?", (worker, no))
        return int(self._db.execute("SELECT attempts FROM tasks WHERE no = ?", (no,)).fetchone()[0])

    def forgive(self, no: int) -> None:
        """Forget what was charged; the task is alone, as it may fail again."""
        self._db.execute("UPDATE tasks SET attempts = 0, avoid = '', alone = 1 WHERE no = ?", (no,))

    def set_alone(self, no: int) -> None:
        """A task is to share no prompt with others any more."""
        self._db.execute("UPDATE tasks SET alone = 1 WHERE no = ?", (no,))

    def beside(self, no: int, most: int) -> list[Task]:
        """Tasks of the group of one that wait to be done and may share a prompt, in their order."""
        where = "grp = (SELECT grp FROM tasks WHERE no = ?) AND state = 'pending' AND waiting = 0 AND alone = 0"
        query = f"SELECT {COLUMNS} FROM tasks WHERE {where} ORDER BY rank LIMIT ?"
        return [task_of(found) for found in self._db.execute(query, (no, most)).fetchall()]

    def put_back(self, no: int, last: bool = False) -> None:
        """A task is to be done again; `last`: after all others of its group."""
        self._last_rank += 1
        rank = self._last_rank if last else None
        self._db.execute(
            "UPDATE tasks SET state = 'pending', rank = coalesce(?, rank) WHERE no = ? AND state = 'running'",
            (rank, no),
        )

    def take(self, worker: str, alone: bool, encodes: bool | None = None) -> Task | None:
        """The next task for a worker, which is running then.

        First of the group that the worker is at, then of the first group that is nobody's, then from the largest.

        Args:
            alone: There is no other worker: it may have what it failed on before.
            encodes: Only encodings, or only what is none.
        """
        only = "" if encodes is None else f" AND encodes = {int(encodes)}"
        where = f"state = 'pending' AND waiting = 0 AND avoid <> ?{only} ORDER BY rank LIMIT 1"
        wanted = worker if not alone else "\0"
        for query in (
            "SELECT g FROM groups WHERE owner = ? AND ready > 0 ORDER BY g LIMIT 1",
            "SELECT g FROM groups WHERE owner IS NULL AND ready > 0 AND ? <> '' ORDER BY g LIMIT 1",
            "SELECT g FROM groups WHERE ready > 0 AND ? <> '' ORDER BY ready DESC LIMIT 1",
        ):
            found = self._db.execute(query, (worker,)).fetchone()
            if found:
                task = self._one(f"grp = ? AND {where}", (found[0], wanted))
                if task:
                    return self._started(task, worker, int(found[0]))
        task = self._one(where, (wanted,))
        return self._started(task, worker, None) if task else None

    def _started(self, task: Task, worker: str, group: int | None) -> Task:
        if group is not None:
            self._db.execute("UPDATE groups SET owner = NULL WHERE owner = ? AND g <> ?", (worker, group))
            self._db.execute("UPDATE groups SET owner = ? WHERE g = ? AND owner IS NULL", (worker, group))
        self._db.execute("UPDATE tasks SET state = 'running' WHERE no = ?", (task.no,))
        return task

    def release(self, worker: str) -> None:
        """A worker is gone: its groups are nobody's."""
        self._db.execute("UPDATE groups SET owner = NULL WHERE owner = ?", (worker,))

    def by_number(self, no: int) -> Task:
        """A task."""
        found = self._one("no = ?", (no,))
        assert found is not None
        return found

    def encodings_of(self, no: int) -> Iterator[Task]:
        """The encodings that a task needs."""
        for (other,) in self._db.execute("SELECT encoding FROM needs WHERE task = ?", (no,)).fetchall():
            yield self.by_number(int(other))

    def tasks(self, encodes: bool | None = False) -> Iterator[Task]:
        """All tasks, in the order of the table."""
        only = "" if encodes is None else f" WHERE encodes = {int(encodes)}"
        for found in self._db.execute(f"SELECT {COLUMNS} FROM tasks{only} ORDER BY no"):
            yield task_of(found)

    def counts(self, encodes: bool) -> dict[str, int]:
        """How many tasks are in each state."""
        query = "SELECT state, count(*) FROM tasks WHERE encodes = ? GROUP BY state"
        return {str(state): int(count) for state, count in self._db.execute(query, (encodes,))}

    def sizes(self, most: int) -> list[int]:
        """Bytes of what some finished tasks gave, pictures only, at most so many."""
        query = "SELECT result FROM tasks WHERE state = 'ok' AND encodes = 0 LIMIT ?"
        results = (json.loads(found) for (found,) in self._db.execute(query, (most,)))
        return [sum(file["bytes"] for file in result["files"]) for result in results]

    def pending(self, most: int) -> list[Task]:
        """Some pictures that are still to be made, from all over the table."""
        query = "SELECT no FROM tasks WHERE state = 'pending' AND encodes = 0 ORDER BY key LIMIT ?"
        return [self.by_number(no) for (no,) in self._db.execute(query, (most,)).fetchall()]

    def to_encode(self) -> Iterator[Task]:
        """Of each group with subjects that are still to be encoded, one."""
        query = "SELECT min(no) FROM tasks WHERE encodes = 1 AND state = 'pending' GROUP BY grp"
        for (no,) in self._db.execute(query).fetchall():  # numbers alone: what is sorted lies in memory
            yield self.by_number(no)

    def _one(self, where: str, values: tuple[Any, ...]) -> Task | None:
        found = self._db.execute(f"SELECT {COLUMNS} FROM tasks WHERE {where}", values).fetchone()
        return task_of(found) if found else None
