"""What a plugin must pass to be admitted: it imports, its hooks are ours, its answers are typed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar

import pluggy

from ..backends.capabilities import API_VERSION, BackendSpec, did_you_mean
from . import hookspecs
from .discovery import Candidate

_PREFIX = f"{hookspecs.PROJECT}_"
_MEANINGLESS = ("wrapper", "hookwrapper", "tryfirst", "trylast")

Answer = TypeVar("Answer")


class PluginError(Exception):
    """Why a plugin is not admitted, or why its answer does not count; a sentence for people."""


def new_manager() -> pluggy.PluginManager:
    """A pluggy manager that knows Isobit's hooks and no plugin yet."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def known_hooks() -> list[str]:
    """The names of all hooks."""
    return sorted(name for name in vars(hookspecs) if name.startswith(_PREFIX))


def load(candidate: Candidate) -> object:
    """Import the plugin.

    :raises PluginError: it raised, or asked the process to exit.
    """
    try:
        return candidate.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"importing {candidate.target} raised {describe(error)}") from error


def register(manager: pluggy.PluginManager, plugin: object, name: str) -> tuple[str, ...]:
    """Check the plugin's hooks, then register it; on an error nothing of it stays registered.

    :returns: the names of its hooks, sorted.
    :raises PluginError: no hook, an unknown one, a bad signature, or the same object twice.
    """
    try:
        hooks = _hooks_of(manager, plugin)
        manager.register(plugin, name)
    except PluginError:
        raise
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook has the wrong arguments: {_one_line(error)}") from error
    except Exception as error:
        raise PluginError(f"pluggy refused it: {describe(error)}") from error
    return hooks


def _hooks_of(manager: pluggy.PluginManager, plugin: object) -> tuple[str, ...]:
    known = known_hooks()
    hooks = set()
    for attribute in dir(plugin):
        marked = manager.parse_hookimpl_opts(plugin, attribute)
        if marked is None:
            if attribute.startswith(_PREFIX) and _is_function(plugin, attribute):
                raise PluginError(_unmarked(attribute, known))
            continue
        hook = marked.get("specname") or attribute
        if hook not in known and not marked.get("optionalhook"):
            raise PluginError(
                f"{hook!r} is no hook; there are {', '.join(known)}.{did_you_mean(hook, known)}"
            )
        for option in _MEANINGLESS:
            if marked.get(option):
                raise PluginError(f"{attribute} is marked {option}=True, which has no meaning here")
        hooks.add(hook)
    if not hooks:
        raise PluginError(f"it implements no hook; there are {', '.join(known)}")
    return tuple(sorted(hooks))


def _unmarked(attribute: str, known: list[str]) -> str:
    if attribute in known:
        return f"{attribute} is not marked with @isobit.plugins.hookimpl"
    return (
        f"{attribute!r} is no hook, and names that begin with {_PREFIX!r} belong to hooks; there "
        f"are {', '.join(known)}.{did_you_mean(attribute, known)}"
    )


def _is_function(plugin: object, attribute: str) -> bool:
    found = inspect.getattr_static(plugin, attribute, None)
    return inspect.isroutine(found) or isinstance(found, staticmethod | classmethod)


def ask(
    hook: pluggy.HookCaller, plugin: str, wanted: type[Answer], **arguments: object
) -> list[Answer]:
    """One plugin's answers to one hook; empty where it does not implement the hook.

    pluggy's own call would ask all plugins at once: the first exception would lose the others'
    answers, and ``None`` would pass for an empty one.

    :raises PluginError: the hook raised, or answered something other than ``Iterable[wanted]``.
    """
    answers: list[Answer] = []
    for implementation in hook.get_hookimpls():
        if implementation.plugin_name == plugin:
            function = implementation.function
            given = {name: arguments[name] for name in implementation.argnames}
            answers += _collect(hook.name, function, given, wanted)
    return answers


def _collect(
    hook: str,
    function: Callable[..., object],
    arguments: dict[str, object],
    wanted: type[Answer],
) -> list[Answer]:
    expected = f"wanted an iterable of {wanted.__name__}"
    try:
        answer = function(**arguments)
        if not isinstance(answer, Iterable):
            raise PluginError(f"{hook} returned {answer!r}; {expected}")
        items = list(answer)
    except (Exception, SystemExit) as error:
        if isinstance(error, PluginError):
            raise
        raise PluginError(f"{hook} raised {describe(error)}") from error
    for item in items:
        if not isinstance(item, wanted):
            raise PluginError(f"{hook} answered with {item!r}; {expected}")
    return items


def check_specs(specs: list[BackendSpec], candidate: Candidate) -> None:
    """Refuse specs of another API version, and one name declared twice by the same plugin.

    :raises PluginError: with both version numbers, or the name.
    """
    seen = set()
    for spec in specs:
        if spec.api != API_VERSION:
            raise PluginError(
                f"backend {spec.name!r} was written for plugin API {spec.api}, and this Isobit has "
                f"plugin API {API_VERSION}. Install a matching release of "
                f"{candidate.distribution} or of Isobit"
            )
        if spec.name in seen:
            raise PluginError(f"it declares the backend {spec.name!r} twice")
        seen.add(spec.name)


def describe(error: BaseException) -> str:
    """An exception in one line: its type and its message."""
    text = _one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
