"""What a power loss leaves of a directory, after each call of a run, made of the run's journal.

    before = Disk.of(directory)                       # all of it is durable
    ... a run with Injection(..., journal="contents") ...
    for number, disk in replayed(before, faults.journal()):
        for name, tree in disk.power_losses():
            write_tree(tree, copy)                    # and look at what a program makes of it

The model is what POSIX promises and no more, as in "All File Systems Are Not Created Equal" (OSDI 2014): a file's
bytes are durable after its fsync, a name after its directory's. Until then each change of a name may be on the disk or
not, in any order, a rename as a whole; bytes that are not durable may be lost, zeros (delayed allocation), or there.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from faults.injection import Call

Tree = dict[str, bytes | None]
"""Path -> a file's bytes, None for a directory."""

Bytes = Literal["lost", "zeros", "there"]


@dataclass
class _File:
    now: bytes = b""
    durable: bytes = b""
    written: list[tuple[int, int]] = field(default_factory=list)
    """(begin, end) of bytes that are not durable yet."""

    def after(self, unsynced: Bytes) -> bytes:
        if unsynced != "zeros":
            return self.now if unsynced == "there" else self.durable
        content = self.now
        for begin, end in self.written:
            end = min(end, len(content))
            if begin < end:
                content = content[:begin] + bytes(end - begin) + content[end:]
        return content


@dataclass
class _Directory:
    now: dict[str, "_Node"] = field(default_factory=dict)
    durable: dict[str, "_Node"] = field(default_factory=dict)


_Node = _File | _Directory


@dataclass
class _Change:
    """Of names, all at once; not durable yet. None: the name goes."""

    names: list[tuple[_Directory, str, _Node | None]]


class Disk:
    """Files and directories as programs see them, and what of them is durable."""

    def __init__(self) -> None:
        self.root = _Directory()
        self._by_inode: dict[int, _Node] = {}
        self._pending: list[_Change] = []

    @classmethod
    def of(cls, directory: Path) -> "Disk":
        """A directory as it is, all of it durable."""
        disk = cls()
        disk._read(directory, disk.root)
        return disk

    def _read(self, directory: Path, into: _Directory) -> None:
        self._by_inode[directory.stat().st_ino] = into
        for path in directory.iterdir():
            node: _Node
            if path.is_dir():
                node = _Directory()
                self._read(path, node)
            else:
                content = path.read_bytes()
                node = self._by_inode[path.stat().st_ino] = _File(content, content)
            into.now[path.name] = into.durable[path.name] = node

    def apply(self, call: Call) -> bool:
        """What a call of the journal has done. Returns whether anything is different now."""
        if call.result < 0:
            return False
        changes = {
            "open": self._opened,
            "write": self._written,
            "copy_file_range": self._written,
            "truncate": self._resized,
            "fallocate": self._resized,
            "fsync": self._synced,
            "rename": self._renamed,
            "link": self._linked,
            "mkdir": self._made,
            "unlink": self._removed,
            "rmdir": self._removed,
        }
        if call.name == "symlink":
            raise NotImplementedError(f"{call.name} {call.path}")
        change = changes.get(call.name)
        return change(call) if change is not None else False

    def power_losses(self) -> Iterator[tuple[str, Tree]]:
        """(what is lost, the tree): all that may be found if the power goes now, each once."""
        seen = set()
        several = [("one", self._pending[i : i + 1]) for i in range(len(self._pending))]
        several += [("all but one", self._pending[:i] + self._pending[i + 1 :]) for i in range(len(self._pending))]
        for which, changes in [("none", []), ("all", self._pending), *several]:
            for unsynced in ("lost", "zeros", "there"):
                tree = self._tree(changes, unsynced)
                digest = tree_digest(tree)
                if digest not in seen:
                    seen.add(digest)
                    yield (
                        f"{which} of {len(self._pending)} changes of names on the disk, unsynced bytes {unsynced}",
                        tree,
                    )

    def kill(self) -> Tree:
        """What is there if only the processes end."""
        return self._tree(self._pending, "there")

    def _tree(self, changes: Sequence[_Change], unsynced: Bytes) -> Tree:
        entries: dict[int, dict[str, _Node]] = {}

        def of(directory: _Directory) -> dict[str, _Node]:
            return entries.setdefault(id(directory), copy(directory.durable))

        for change in changes:
            for directory, name, node in change.names:
                if node is None:
                    of(directory).pop(name, None)
                else:
                    of(directory)[name] = node
        tree: Tree = {}

        def walk(directory: _Directory, prefix: str) -> None:
            for name, node in of(directory).items():
                if isinstance(node, _Directory):
                    tree[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = node.after(unsynced)

        walk(self.root, "")
        return tree

    def _parent(self, path: str) -> tuple[_Directory, str]:
        *parts, name = path.split("/")
        directory = self.root
        for part in parts:
            node = directory.now[part]
            assert isinstance(node, _Directory)
            directory = node
        return directory, name

    def _change(self, *names: tuple[_Directory, str, _Node | None]) -> bool:
        for directory, name, node in names:
            if node is None:
                directory.now.pop(name, None)
            else:
                directory.now[name] = node
        self._pending.append(_Change(list(names)))
        return True

    def _file(self, call: Call) -> _File:
        node = self._by_inode[call.inode]
        assert isinstance(node, _File)
        return node

    def _opened(self, call: Call) -> bool:
        if call.created:
            self._by_inode[call.inode] = _File()
            return self._change((*self._parent(call.path), self._by_inode[call.inode]))
        if not call.truncated or not self._file(call).now:
            return False
        self._file(call).now = b""
        return True

    def _written(self, call: Call) -> bool:
        file = self._file(call)
        assert len(call.data) == call.result, "the journal has to be one of contents"
        content = file.now.ljust(call.offset, b"\0")
        end = call.offset + len(call.data)
        file.now = content[: call.offset] + call.data + content[end:]
        file.written.append((call.offset, end))
        return True

    def _resized(self, call: Call) -> bool:
        file = self._file(call)
        length = call.offset if call.name == "truncate" else max(call.offset, len(file.now))
        file.now = file.now[:length].ljust(length, b"\0")
        return True

    def _synced(self, call: Call) -> bool:
        node = self.root if call.path == "." else self._by_inode[call.inode]
        if isinstance(node, _File):
            different, node.durable = node.durable != node.now, node.now
            node.written.clear()
            return different
        before = len(self._pending)
        node.durable = copy(node.now)
        # a rename between two directories is durable when one of them is
        self._pending = [one for one in self._pending if all(where is not node for where, _, _ in one.names)]
        return len(self._pending) != before

    def _renamed(self, call: Call) -> bool:
        assert call.other is not None
        directory, name = self._parent(call.path)
        return self._change((*self._parent(call.other), directory.now[name]), (directory, name, None))

    def _linked(self, call: Call) -> bool:
        assert call.other is not None
        directory, name = self._parent(call.path)
        return self._change((*self._parent(call.other), directory.now[name]))

    def _made(self, call: Call) -> bool:
        if call.path == ".":
            return False
        node = self._by_inode[call.inode] = _Directory()
        return self._change((*self._parent(call.path), node))

    def _removed(self, call: Call) -> bool:
        return self._change((*self._parent(call.path), None))


def replayed(before: Disk, journal: Sequence[Call]) -> Iterator[tuple[int, Disk]]:
    """(calls done, the disk then): before the first call, and behind each that has changed something."""
    yield 0, before
    for number, call in enumerate(journal, 1):
        if before.apply(call):
            yield number, before


def tree_digest(tree: Tree) -> bytes:
    """The same for the same trees."""
    found = hashlib.sha256()
    for path, content in sorted(tree.items()):
        found.update(f"{path}\0{-1 if content is None else len(content)}\0".encode())
        found.update(content or b"")
    return found.digest()


def write_tree(tree: Tree, directory: Path) -> None:
    """Make `directory` hold exactly this."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    for path, content in sorted(tree.items()):  # a directory comes before what is in it
        if content is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(content)


def read_tree(directory: Path) -> Tree:
    """The opposite of `write_tree`."""
    found: Tree = {}
    for folder, directories, files in os.walk(directory):
        for name in directories:
            found[str((Path(folder) / name).relative_to(directory))] = None
        for name in files:
            found[str((Path(folder) / name).relative_to(directory))] = (Path(folder) / name).read_bytes()
    return found
