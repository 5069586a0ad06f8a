"""The plugin host: which plugins are loaded, what they offer, and why some were not.

pluggy is used at start-up only. A broken plugin is recorded, not raised: it must not break an
engine that did not ask for it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from ..backends.capabilities import BackendSpec, Refusal, Requirements, did_you_mean
from ..backends.pair import join, parse_pair
from ..errors import ConfigError
from .admission import PluginError, ask, check_specs, load, new_manager, register
from .discovery import Candidate, discover

DISABLE_VARIABLE = "ISOBIT_DISABLE_PLUGINS"
"""Environment variable: entry-point names, separated by commas, that are not loaded."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """What became of one installed plugin.

    name:   its entry point's name
    hooks:  the hooks it implements; empty unless loaded
    reason: why it was not loaded, in words; empty if it was
    """

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    status: Literal["loaded", "failed", "disabled"]
    reason: str = ""

    def __str__(self) -> str:
        text = f"plugin {self.name!r} of {self.distribution} {self.version}"
        return f"{text}: {self.status}{': ' if self.reason else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class RegisteredBackend:
    """A backend and where it comes from."""

    spec: BackendSpec
    plugin: str
    distribution: str
    version: str


class PluginHost:
    """All installed plugins, loaded one at a time, sorted by entry-point name.

    :param disabled: entry-point names that are not loaded, besides those that the environment
        variable ``ISOBIT_DISABLE_PLUGINS`` lists.
    :param strict_plugins: raise if anything is wrong with any plugin.
    :param candidates: what to load instead of the installed plugins.
    :raises ConfigError: with ``strict_plugins``, all ``problems()`` in one message.
    """

    def __init__(
        self,
        *,
        disabled: Collection[str] = (),
        strict_plugins: bool = False,
        candidates: Sequence[Candidate] | None = None,
    ) -> None:
        if isinstance(disabled, str):
            raise ConfigError(
                f"disabled was the string {disabled!r}; wanted a collection of names. "
                f"Pass {{{disabled!r}}}."
            )
        by_environment = dict.fromkeys(_disabled_by_environment(), f"by {DISABLE_VARIABLE}")
        self._disabled = dict.fromkeys(disabled, "by configuration") | by_environment
        self._manager = new_manager()
        self._offers: dict[str, list[RegisteredBackend]] = {}
        found = discover() if candidates is None else list(candidates)
        names = Counter(candidate.name for candidate in found)
        self._records = [
            self._reject_rivals(candidate, found)
            if names[candidate.name] > 1
            else self._admit(candidate)
            for candidate in found
        ]
        if strict_plugins and self.problems():
            raise ConfigError(
                "strict_plugins was asked for, and there are problems with plugins. Mend, "
                "uninstall or disable them:\n- " + "\n- ".join(self.problems())
            )

    def backends(self) -> dict[str, RegisteredBackend]:
        """The usable backends by name, sorted. A name that two plugins offer is not among them."""
        return {
            name: offers[0] for name, offers in sorted(self._offers.items()) if len(offers) == 1
        }

    def contested(self) -> dict[str, str]:
        """The backend names that several plugins offer, each with a sentence that names them."""
        return {
            name: _contest(name, offers)
            for name, offers in sorted(self._offers.items())
            if len(offers) > 1
        }

    def require(self, name: str) -> RegisteredBackend:
        """The backend ``name``, or the pair ``prefill=NAME,decode=NAME``, that somebody asked for.

        :raises ConfigError: it does not exist, is contested, or its plugin was not loaded, or the
            two cannot be a pair; with the reason.
        """
        usable = self.backends()
        if name in usable:
            return usable[name]
        pair = parse_pair(name)
        if pair is not None:
            return _paired(*map(self.require, pair))
        reason = self.unavailable(name)
        if reason is not None:
            raise ConfigError(f"attention backend {name!r} cannot be used: {reason}.")
        known = [*usable, *self.contested()]
        idle = [f"\n- {record}" for record in self._records if record.status != "loaded"]
        raise ConfigError(
            f"there is no attention backend {name!r}; there are {', '.join(known) or 'none'}."
            + did_you_mean(name, known)
            + ("\nPlugins that were not loaded may have brought it:" if idle else "")
            + "".join(idle)
        )

    def unavailable(self, name: str) -> str | None:
        """Why no backend ``name`` can be had, where a contest or a plugin's record tells."""
        if name in self.backends():
            return None
        idle = [str(r) for r in self._records if r.name == name and r.status != "loaded"]
        return self.contested().get(name) or "; ".join(idle) or None

    def check(self, requirements: Requirements, spec: BackendSpec) -> list[Refusal]:
        """What all plugins object to ``spec``; a plugin that cannot answer refuses.

        :param requirements: with every feature resolved, as ``isobit_check`` promises.
        """
        refusals: list[Refusal] = []
        hook = self._manager.hook.isobit_check
        for record in self._records:
            if record.status != "loaded":
                continue
            try:
                refusals += ask(hook, record.name, Refusal, config=requirements, spec=spec)
            except PluginError as error:
                _log.debug("%s", error, exc_info=True)
                refusals.append(_no_answer(record, error))
        return refusals

    def records(self) -> list[PluginRecord]:
        """What became of every installed plugin, in load order."""
        return list(self._records)

    def problems(self) -> list[str]:
        """Everything that is wrong with the plugins, in sentences; empty if nothing is."""
        names = {record.name for record in self._records}
        return [
            *(str(record) for record in self._records if record.status == "failed"),
            *self.contested().values(),
            *(
                f"plugin {name!r} is disabled but not installed.{did_you_mean(name, names)}"
                for name in sorted(self._disabled.keys() - names)
            ),
        ]

    def _admit(self, candidate: Candidate) -> PluginRecord:
        if candidate.name in self._disabled:
            return _record(candidate, "disabled", self._disabled[candidate.name])
        try:
            plugin = load(candidate)
            hooks = register(self._manager, plugin, candidate.name)
            hook = self._manager.hook.isobit_attention_backends
            specs = ask(hook, candidate.name, BackendSpec)
            check_specs(specs, candidate)
        except PluginError as error:
            self._manager.unregister(name=candidate.name)
            _log.debug("plugin %s failed", candidate.name, exc_info=True)
            return _record(candidate, "failed", str(error))
        for spec in specs:
            offer = RegisteredBackend(
                spec, candidate.name, candidate.distribution, candidate.version
            )
            self._offers.setdefault(spec.name, []).append(offer)
        return _record(candidate, "loaded", "", hooks)

    def _reject_rivals(self, candidate: Candidate, found: list[Candidate]) -> PluginRecord:
        """pluggy would keep the first of two plugins of one name and silently drop the other."""
        if candidate.name in self._disabled:
            return self._admit(candidate)
        rivals = " and ".join(
            f"{c.distribution} {c.version}" for c in found if c.name == candidate.name
        )
        return _record(
            candidate,
            "failed",
            f"the entry-point name {candidate.name!r} is used by {rivals}, and none of them is "
            "loaded. Uninstall all but one",
        )


def _paired(prefill: RegisteredBackend, decode: RegisteredBackend) -> RegisteredBackend:
    """The pair, from where both come."""
    sources = zip(
        (prefill.plugin, prefill.distribution, prefill.version),
        (decode.plugin, decode.distribution, decode.version),
        strict=True,
    )
    origin = (a if a == b else f"{a} and {b}" for a, b in sources)
    return RegisteredBackend(join(prefill.spec, decode.spec), *origin)


def _record(
    candidate: Candidate,
    status: Literal["loaded", "failed", "disabled"],
    reason: str,
    hooks: tuple[str, ...] = (),
) -> PluginRecord:
    return PluginRecord(
        candidate.name, candidate.distribution, candidate.version, hooks, status, reason
    )


def _disabled_by_environment() -> list[str]:
    listed = os.environ.get(DISABLE_VARIABLE, "").split(",")
    return [name.strip() for name in listed if name.strip()]


def _contest(name: str, offers: list[RegisteredBackend]) -> str:
    sources = " and ".join(f"plugin {o.plugin!r} of {o.distribution} {o.version}" for o in offers)
    return (
        f"backend {name!r} is offered by {sources}, and none of them is used. Uninstall or "
        "disable all but one"
    )


def _no_answer(record: PluginRecord, error: PluginError) -> Refusal:
    return Refusal(
        f"plugin {record.name}",
        f"an answer from plugin {record.name!r} of {record.distribution} {record.version}",
        str(error),
        f"Mend the plugin, or disable it ({DISABLE_VARIABLE}={record.name}).",
    )
