"""Frozen dataclasses ↔ command-line flags and YAML files, through jsonargparse.

Only the leaves become arguments, each with its plain type: jsonargparse then has no class to look up, so that a
`class_path` in a file someone sent can import nothing.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

Config = TypeVar("Config")


def add_fields(parser: ArgumentParser, cls: type) -> None:
    """One argument for each leaf of the dataclass: `--pre.head-lr`, and `pre: {head_lr: …}` in YAML."""
    for leaf in leaves(cls):
        parser.add_argument(leaf.flag, type=leaf.hint, default=leaf.default, help=leaf.text)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A field that holds a value: its dotted name, type, default and description."""

    name: str
    hint: Any
    default: Any
    text: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def leaves(cls: type, prefix: str = "", defaults: Any = None) -> Iterator[Leaf]:
    """The fields of a dataclass, those of nested ones in their place; `defaults` is an instance to take them from."""
    hints, texts = get_type_hints(cls), field_texts(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from leaves(hint, f"{name}.", default)
        else:
            yield Leaf(name, hint, default, texts.get(field.name, ""))


def build(cls: type[Config], values: Namespace | dict[str, Any]) -> Config:
    """The dataclass from parsed values, nested ones included."""
    chosen = {}
    for name, hint in get_type_hints(cls).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        chosen[name] = build(hint, values[name]) if nested else values[name]
    return cls(**chosen)


def read_yaml(cls: type[Config], file: Path) -> Config:
    """The dataclass from a YAML file, such as a run's config.yaml."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    add_fields(parser, cls)
    return build(cls, parser.parse_args([f"--config={file}"]))


def read_command(
    cls: type[Config],
    arguments: Sequence[str],
    *,
    command: str,
    usage: str,
    description: str,
    first: str,
    lists: str = "",
) -> Config:
    """The settings of `keepsight COMMAND`, from its arguments.

    Args:
        first: the field that arguments before the first flag are of.
        lists: the field that takes several values in a row, `--tasks a b`.
    """
    parser = ArgumentParser(prog=f"keepsight {command}", usage=f"keepsight {command} {usage}", description=description)
    parser.add_argument("--config", action="config", help="A YAML file with these fields.")
    add_fields(parser, cls)
    given = list(arguments) or ["--help"]
    if not given[0].startswith("-"):
        given.insert(0, f"--{first}")
    return build(cls, parser.parse_args(normalise(_listed(given, f"--{lists}"), cls)))


def _listed(given: Sequence[str], flag: str) -> list[str]:
    """`--tasks a b` → `--tasks ["a", "b"]`, which the parser knows."""
    result: list[str] = []
    position = 0
    while position < len(given):
        result.append(given[position])
        position += 1
        if result[-1] == flag:
            values = []
            while position < len(given) and not given[position].startswith("--"):
                values.append(given[position])
                position += 1
            result += values if values and values[0].startswith("[") else [json.dumps(values)] * bool(values)
    return result


def field_texts(cls: type) -> dict[str, str]:
    """What the docstring's "Attributes:" section says of each field, in one line."""
    found: dict[str, str] = {}
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    name = None
    for line in section.splitlines():
        if match := re.fullmatch(r"    (\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name and line.startswith("        "):
            found[name] += " " + line.strip()
        else:
            name = None
    return {name: text.replace("%", "%%") for name, text in found.items()}


def normalise(arguments: Sequence[str], cls: type) -> list[str]:
    """Forms that users type → those that the parser knows.

    Leading recipe files are each `--config FILE`, later ones overriding earlier ones; `--skip-broken` alone is
    `--skip-broken=true`; a field's name may be written with underscores as in YAML; `--print-config` has
    jsonargparse's underscore.
    """
    known = {f"--{leaf.name}": leaf for leaf in leaves(cls)} | {leaf.flag: leaf for leaf in leaves(cls)}
    files = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    given = [part for file in files for part in ("--config", file)] + list(arguments[len(files) :])
    for flag, file in pairwise(given):
        if flag == "--config" and Path(file).is_file():
            _check_mapping(Path(file))
    result = []
    for position, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        leaf = known.get(name)
        last = position + 1 == len(given) or given[position + 1].startswith("--")
        if name == "--print-config":
            argument = f"--print_config{equals}{value}"
        elif leaf is not None:
            argument = f"{leaf.flag}{equals}{value}"
            if leaf.hint is bool and not equals and last:
                argument += "=true"
        result.append(argument)
    return result


def _check_mapping(file: Path) -> None:
    """Raises ValueError where a file holds no settings; the parser's own error would not name it."""
    try:
        holds = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ValueError(f"'{file}' is not YAML: {cause}. Correct it, or give another file") from cause
    if not isinstance(holds, dict):
        what = "nothing" if holds is None else f"a {type(holds).__name__}"
        raise ValueError(f"'{file}' holds {what}; it must hold settings by name, a line each such as 'seed: 0'")


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None
