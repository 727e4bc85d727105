"""Conditions on the columns of a sample, as text: ``psnr>30``, ``caption~dog``. Jobs and the HTTP service share them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError

_FORM = re.compile(r"\s*([^=!<>~]*?)\s*(==|!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition. Numbers compare as numbers, text as text; ``~`` is: contains, whatever the case."""

    column: str
    operator: str
    """``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=`` or ``~``."""
    value: str

    def __str__(self) -> str:
        return f"{self.column}{self.operator}{self.value}"

    def match(self, columns: Mapping[str, Any]) -> bool:
        """Whether a sample passes; one that has no value there does not.

        Raises:
            ConfigError: the column holds numbers and the condition's value is none.
        """
        found = columns.get(self.column)
        if found is None or (isinstance(found, float) and math.isnan(found)):
            return False
        if self.operator == "~":
            return self.value.casefold() in str(found).casefold()
        if isinstance(found, bool):
            return _COMPARE[self.operator](found, self.truth())
        if isinstance(found, int | float):
            return _COMPARE[self.operator](found, self.number())
        return _COMPARE[self.operator](str(found), self.value)

    def truth(self) -> bool:
        """The value for a column of truth values. Raises: ConfigError: it is none."""
        if self.value.lower() not in ("true", "false"):
            raise ConfigError(f"filter {self}: {self.column!r} is true or false, and {self.value!r} is neither")
        return self.value.lower() == "true"

    def number(self) -> int | float:
        """The value for a column of numbers. Raises: ConfigError: it is none."""
        try:
            return int(self.value)
        except ValueError:
            pass
        try:
            number = float(self.value)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise ConfigError(f"filter {self}: {self.column!r} holds numbers, and {self.value!r} is none")
        return number


def parse_filter(text: str) -> Filter:
    """Read ``column operator value``. Raises: ConfigError: another form."""
    form = _FORM.fullmatch(text)
    if form is None or not form[1]:
        raise ConfigError(
            f"filter {text!r} is not of the form COLUMN OPERATOR VALUE, such as psnr>30 or caption~dog; "
            f"operators are {', '.join(_COMPARE)} and ~"
        )
    column, sign, value = form.groups()
    if not value and sign != "=" and sign != "!=" and sign != "==":
        raise ConfigError(f"filter {text!r} compares with nothing; write a value after {sign}")
    return Filter(column=column, operator="=" if sign == "==" else sign, value=value)
