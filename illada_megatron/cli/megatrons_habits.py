"""Command lines as they are typed from memory of Megatron-LM: several words behind an option, and its options."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from illada_megatron.system.terminal import say

# of `illada`, what is one of tools/ too
_TOOLS = {"preprocess": "preprocess_data"}
# whose arguments are overrides of a configuration
_OF_A_RUN = ("train", "evaluate")


class MegatronsHabits(TyperCommand):
    """A command that takes `--json-keys text title`, and knows what options of Megatron's are here."""

    tool: str | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        name = self.name or ""
        words = understood(args, self.params, self.tool or _TOOLS.get(name), of_a_run=name in _OF_A_RUN)
        return super().parse_args(ctx, words)


def tool_app(function: Callable[..., None], tool: str) -> typer.Typer:
    """The program of tools/TOOL.py, whose one command `function` is."""

    class Habits(MegatronsHabits):
        pass

    Habits.tool = tool
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command(cls=Habits)(function)
    return app


def converter_words(words: Sequence[str]) -> list[str]:
    """What `illada convert` takes of `--loader llama_mistral --saver mcore --load-dir A --save-dir B`: from-hf A B.

    Raises ConfigError: neither side is Hugging Face's."""
    kinds = {name: value for name, value in pairwise(words) if name.startswith("--")}
    if words[:1] not in (["to-hf"], ["from-hf"]) and {"--load-dir", "--loader", "--saver"} & {*words}:
        if "hf" in kinds.get("--saver", ""):
            direction = "to-hf"
        elif kinds.get("--checkpoint-type") == "hf" or kinds.get("--loader", "").startswith(("llama", "hf")):
            direction = "from-hf"
        else:
            _refuse(
                f"--loader {kinds.get('--loader')} --saver {kinds.get('--saver')}: neither is Hugging Face's; between "
                "Megatron's layouts and this program's: tools/reshard_checkpoint.py"
            )
        words = [direction, *words]
    if words[:1] not in (["to-hf"], ["from-hf"]):
        return list(words)
    from illada_megatron.cli.convert_command import app

    command: Any = typer.main.get_command(app)
    return [words[0], *understood(words[1:], command.commands[words[0]].params, "convert_checkpoint")]


def understood(words: Sequence[str], params: Sequence[Any], tool: str | None, of_a_run: bool = False) -> list[str]:
    """`words` as typer takes them. What has no meaning here is said on stderr and left out.

    params: typer's parameters of the command. of_a_run: an unknown option may be a field of the configuration.
    Raises ConfigError: an option without which the command would do something else, with what to do."""
    own = {name: param for param in params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}
    out: list[str] = []
    arguments: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            out += [word, *rest]
            break
        if name in own:
            out.append(word)
            if not equals and not own[name].is_flag:
                behind = _taken(rest, None if own[name].multiple else 1)
                out += behind[:1]
                for more in behind[1:]:
                    out += [word, more]
        elif (option := _of_megatron(tool, name)) is not None:
            values = [value] if equals else _taken(rest, option.takes)
            if option.becomes is None:
                _say(name, option, values)
            elif option.becomes.isdigit():
                arguments.setdefault(option.becomes, []).extend(values)
            else:
                out += [option.becomes, *values]
        elif of_a_run and name.startswith("--"):
            _require_known(name, [value] if equals else _taken(rest, None))
            out.append(word)
        else:
            out.append(word)
    return [*(word for number in sorted(arguments) for word in arguments[number]), *out]


def _of_megatron(tool: str | None, name: str) -> Any:
    """What is known of an option of Megatron's `tool`; None: nothing."""
    if tool is None or not name.startswith("-"):
        return None
    # only where it is asked for: the configuration's modules take as long to import as starting Python
    from illada_megatron.config.megatron_tools import tool_options

    return tool_options(tool).get(name.replace("_", "-"))


def _refuse(why: str) -> NoReturn:
    from illada_megatron.config import ConfigError

    raise ConfigError(why)


def _taken(rest: list[str], most: int | None) -> list[str]:
    """The words up to the next option, removed from `rest`."""
    taken: list[str] = []
    while rest and not rest[0].startswith("--") and (most is None or len(taken) < most):
        taken.append(rest.pop(0))
    return taken


def _say(name: str, option: Any, values: list[str]) -> None:
    if values and all(value in option.harmless for value in values):
        return
    typed = " ".join([name, *values])
    if option.stops:
        _refuse(f"{typed}: {option.says}")
    say(f"{typed} has no meaning here: {option.says}", error=True)


def _require_known(name: str, values: list[str]) -> None:
    """Raises ConfigError for what is a field here, with the words to type; nothing where nothing is known of it."""
    from illada_megatron.config.field_names import hint_for_option

    hint = hint_for_option(name, values)
    if hint is not None:
        _refuse(f"{name}: fields are given as section.field=value; {hint}")
