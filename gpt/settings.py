"""Settings: dataclasses whose fields know their help text and the values they may take. Each is an option of a script,
and is checked in one place however it is given."""

import math
import types
from dataclasses import field, fields

from gpt.errors import UserError, shown


def option(default, text: str, *, least=None, above=None, most=None, choices=None, flag: bool = True):
    """A field with its help text and the values it may take; `flag`: whether it is a command-line option."""
    limits = {"least": least, "above": above, "most": most, "choices": choices}
    return field(default=default, metadata={"help": text, "flag": flag, **limits})


def check_fields(config, spell=str) -> None:
    """Check every field's type, range and choices. An int may stand where a float is expected.

    spell: how the name of a field is written in errors.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        kinds = f.type.__args__ if isinstance(f.type, types.UnionType) else (f.type,)
        if float in kinds and type(value) is int and abs(value) < 2**63:
            value = float(value)
            object.__setattr__(config, f.name, value)
        listed = isinstance(value, list) and list in kinds
        if type(value) not in kinds or (listed and (not value or {*map(type, value)} != {kinds[0]})):
            raise UserError(f"{spell(f.name)} must be of type {kinds[0].__name__}, got {shown(value)}")
        for single in value if isinstance(value, list) else [value]:
            _check_range(spell(f.name), f.metadata, single)


def _check_range(name: str, limits, value) -> None:
    least, above, most, choices = (limits[key] for key in ("least", "above", "most", "choices"))
    if value is None:
        return
    if choices and value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):  # how a file name's odd bytes come
        raise UserError(f"{name} must be UTF-8, so that it can be saved, got {shown(value)}: rename the file")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} must be without NUL, which no file's name has, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value}")
    if least is not None and value < least:
        raise UserError(f"{name} must be at least {_plain(least)}, got {shown(value)}")
    if above is not None and value <= above:
        raise UserError(f"{name} must be above {_plain(above)}, got {shown(value)}")
    if most is not None and value > most:
        raise UserError(f"{name} must be at most {_plain(most)}, got {shown(value)}")
    if isinstance(value, int) and value >= 2**63:
        raise UserError(f"{name} must be less than 2**63, got a larger number")


def _plain(limit: float) -> str:
    """0.0 -> 0."""
    return str(limit).removesuffix(".0")
