"""The hooks that a plugin can implement.

A plugin is a module (or any object) named by an entry point of the group ``isobit.plugins``. Its
functions that carry ``@isobit.plugins.hookimpl`` are its hooks. The prefix ``isobit_`` belongs to
hooks: a function so named that is no hook, or carries no mark, makes its plugin fail.

Every hook is asked of one plugin at a time, in the order of the entry points' names, and all
answers count; so the ordering and wrapping options of ``hookimpl`` mean nothing here and are
refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from ..backends.capabilities import BackendSpec, Refusal, Requirements

PROJECT = "isobit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def isobit_attention_backends() -> Iterable[BackendSpec]:
    """Declare the attention backends that this plugin brings.

    Called once, when the plugin is loaded; ``isobit backends`` calls it too, on machines that will
    never run the backend. So answer with data: import the kernel library in the module that
    ``BackendSpec.factory`` names, not here.

    :returns: one spec a backend. A name that another plugin offers too is usable by neither.
    """
    return ()


@hookspec
def isobit_check(config: Requirements, spec: BackendSpec) -> Iterable[Refusal]:
    """Object to a backend for what a start-up asks, whoever brings that backend.

    Called at start-up for every backend that is considered, after the declared capabilities were
    compared; for a pair of backends it is called with the pair's spec and with those of the two.
    The start-up goes on only if nobody objects.

    :param config: what is asked. No feature is left open: each is ``True`` or ``False`` as it
        would be with this backend.
    :param spec: the backend that is considered.
    :returns: one ``Refusal`` a reason, or ``[]`` for no objection. ``None`` counts as a mistake,
        and so does an exception: both refuse the backend in the plugin's name.
    """
    return ()
