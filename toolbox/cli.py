"""Command lines: flags made from a Config, errors of one line, results as a table or JSON."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import typing
from dataclasses import fields

from common import TrainConfig, UserError, write_json

NAMES = "backbone", "variant", "tune"  # fields that the commands have flags of their own for


class Parser(argparse.ArgumentParser):
    """Raises UserError, one line, in the place of printing the whole usage."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def one_of(*names: str) -> dict:
    """Arguments of add_argument for a flag with these values."""
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}; not {text}")
        return text

    return dict(type=check, metavar="{" + ",".join(names) + "}")


def field_help(config_class: type) -> dict[str, str]:
    """The comments beside the fields of a Config, by field."""
    found = {}
    for cls in TrainConfig, config_class:
        for name, comment in re.findall(r"^    (\w+): [^#\n]*# (.+)$", inspect.getsource(cls), re.MULTILINE):
            found[name] = f"{found[name]}; {comment}" if name in found else comment
    return found


def add_config_flags(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    """A flag for each field: --bridger-dim 32, --visual-layers 1,3, --mask-padding / --no-mask-padding. `defaults` are
    shown by --help; a flag that is not given is absent from the parsed arguments."""
    group = parser.add_argument_group(f"settings of {type(defaults).__module__}.py for {defaults.backbone}")
    hints, comments = typing.get_type_hints(type(defaults)), field_help(type(defaults))
    for name in hints.keys() - set(NAMES):
        kind, value = hints[name], getattr(defaults, name)
        if typing.get_origin(kind) is typing.Literal:
            flag = one_of(*typing.get_args(kind))
        elif kind is bool:
            flag = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is tuple:
            flag, value = dict(type=integers, metavar="N,N,..."), ",".join(map(str, value)) or "none"
        else:
            flag = dict(type=kind, metavar=kind.__name__.upper())
        text = f"{comments.get(name, '')} (default: {value})".strip().replace("%", "%%")
        group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **flag)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(t) for t in text.split(",") if t.strip())


def config_flags(args: argparse.Namespace, config_class: type) -> dict:
    """The fields of a Config that the user set by such a flag."""
    return {f.name: getattr(args, f.name) for f in fields(config_class) if f.name not in NAMES and f.name in args}


def config_from_json(config_class: type, values: dict, where: str) -> TrainConfig:
    """Config from its fields as JSON has them. Raises UserError for unknown fields and values of another type."""
    unknown = values.keys() - {f.name for f in fields(config_class)}
    if unknown:
        raise UserError(f"{where} has settings that this version lacks: {', '.join(sorted(unknown))}.")
    hints, out = typing.get_type_hints(config_class), {}
    for name, value in values.items():
        kind = typing.get_origin(hints[name]) or hints[name]
        value = tuple(value) if isinstance(value, list) else value
        fine = value in typing.get_args(hints[name]) if kind is typing.Literal else (
            isinstance(value, (int, float)) if kind is float else type(value) is kind
            and (kind is not tuple or all(type(v) is int for v in value)))
        if not fine:
            raise UserError(f"{where} has an impossible setting: {name} = {str(value)[:80]!r}.")
        out[name] = value
    return config_class(**out)


# Results


def write_result(file: str | None, value) -> None:
    if file == "-":
        print(json.dumps(value, indent=1))
    elif file:
        write_json(file, value)


def print_table(rows: list[dict], left: tuple[str, ...] = ()) -> None:
    """Dicts of one kind as a table on standard output; columns `left` begin at one height."""
    names = list(rows[0])
    cells = [["-".join(f"{x:.2f}" for x in v) if isinstance(v, list) else f"{v:.2f}" if isinstance(v, float) else
              f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(c.ljust(w) if n in left else c.rjust(w) for n, c, w in zip(names, line, widths)).rstrip())
