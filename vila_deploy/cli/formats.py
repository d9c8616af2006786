"""The option type of on-disk formats: one, or several with commas between them."""

from __future__ import annotations

import click

from vila_deploy.formats.registry import FORMATS


class FormatNames(click.ParamType):
    """Parse NAME[,NAME…] into a tuple of keys of FORMATS without repetitions."""

    name = "formats"

    def __init__(self, *others: str, hidden: tuple[str, ...] = ()):
        """`others` and `hidden` are names that are accepted too; messages list no hidden ones."""
        self._others, self._hidden = others, hidden

    def convert(
        self,
        value: str | tuple[str, ...],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(value.split(",")))
        for name in names:
            if name not in (*FORMATS, *self._others, *self._hidden):
                known = ", ".join((*FORMATS, *self._others))
                self.fail(f"{name!r} is not one of {known}", param, ctx)
        return names

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NAME[,NAME…]"
