"""Checks that somebody chose not to run, each with the reason that every report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...backends.capabilities import did_you_mean
from ...errors import ConfigError
from .check import Check
from .registry import CHECKS


def known_check(name: str) -> Check:
    """The check of that name.

    :raises ConfigError: there is none.
    """
    names = [check.name for check in CHECKS]
    if name not in names:
        raise ConfigError(
            f"there is no check {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}"
        )
    return CHECKS[names.index(name)]


def parse_waivers(texts: Iterable[str]) -> dict[str, str]:
    """Waivers from ``CHECK=REASON`` texts.

    :raises ConfigError: a text of another form, a check that does not exist, no reason.
    """
    pairs = (text.partition("=") for text in texts)
    return check_waivers({name.strip(): reason.strip() for name, _, reason in pairs})


def check_waivers(waivers: Mapping[str, str]) -> dict[str, str]:
    """The waivers, each of a check that exists and with a reason.

    :raises ConfigError: otherwise.
    """
    for name, reason in waivers.items():
        known_check(name)
        if not reason.strip():
            raise ConfigError(
                f"check {name!r} was waived without a reason. Write {name}=REASON; the report "
                "shows the reason."
            )
    return dict(waivers)
