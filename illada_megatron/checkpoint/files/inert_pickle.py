"""Pickles read without any of the classes and functions that they name: each becomes an inert stand-in."""

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar


class Inert:
    """What a pickle makes of something it names: keeps what it is made with and its fields, and does nothing.

    Its class is made anew for each pickle, and `__setstate__` is all that pickle's BUILD finds, on an object as on the
    class itself, where it takes one argument too many: nothing that outlives the pickle can be given an attribute.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Of a dictionary's kind; none is looked at."""

    def __iter__(self) -> Iterator[Any]:
        """The values of a tuple's kind, which is made of one."""
        (values,) = self.arguments
        return iter(values)


def load_inert(content: bytes, is_named: Callable[[str, str], bool]) -> Any:
    """What `content` holds: plain values, and an `Inert` of the right name for all else.

    is_named: (module, name) -> whether the pickle may name it. Raises pickle.UnpicklingError for other names, and
    whatever the bytes lead to.
    """
    return _Unpickler(content, is_named).load()


# The one in C takes as much memory for its memo as the largest number in the pickle says: gigabytes for ten bytes.
# So would a bytearray, before it is read; no checkpoint has one.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar = {one: load for one, load in pickle._Unpickler.dispatch.items() if one != pickle.BYTEARRAY8[0]}

    def __init__(self, content: bytes, is_named: Callable[[str, str], bool]) -> None:
        super().__init__(io.BytesIO(content))
        self._is_named = is_named
        self._classes: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        with suppress(KeyError):
            return self._classes[module, name]
        if not self._is_named(module, name):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        self._classes[module, name] = type(name, (Inert,), {})
        return self._classes[module, name]
