"""jinja's sandbox with an end: a chat template comes with a tokenizer, from whoever made it.

Loops, calls and what products make are counted, and a rendering that takes more than any conversation needs is refused.
Time itself would not do: a busy machine has less of it, and the documents that are left out must not depend on that.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

MOST_STEPS = 1_000_000
_COUNTED = "_counted"


class CountingSandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers.utils.chat_template_utils, but for its strftime_now, whose text would depend on
    the day (templates ask whether it is there and have a fixed date otherwise)."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        self.filters[_COUNTED] = self._count
        self.globals["range"] = self._range
        del self.globals["lipsum"]
        self.steps = 0
        """Of the rendering at hand; whoever renders sets it to 0 before."""

    def compiled(self, source: str, marked: Callable[[str], str]) -> jinja2.Template:
        """A template whose steps are counted; `marked` is done to every text that it writes itself. Raises
        jinja2.TemplateSyntaxError, and what Python makes of templates that are too deep or too large for it."""
        tree = self.parse(source)
        for data in tree.find_all(nodes.TemplateData):
            data.data = marked(data.data)
        for constant in tree.find_all(nodes.Const):
            if isinstance(constant.value, str):
                constant.value = marked(constant.value)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None)
        return self.from_string(tree)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._take(1)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            power = operator == "**"
            self._take(left.bit_length() * max(0, right) if power else left.bit_length() + right.bit_length())
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                self._take(len(repeated) * max(0, times))
        return super().call_binop(context, operator, left, right)

    def _count(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._take(1)
            yield item

    def _range(self, *args: int) -> range:
        numbers = safe_range(*args)
        self._take(len(numbers))
        return numbers

    def _take(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise jinja2.TemplateRuntimeError(f"it takes more than {MOST_STEPS:,} steps for one conversation")
