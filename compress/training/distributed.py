"""Work that one of several processes does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric import Fabric

from deploy.core.errors import UserError


def on_first_process(fabric: Fabric, work: Callable[[], Any]) -> None:
    """Run `work` on process 0 while the others wait. What goes wrong is raised on all of them, so that none hangs."""
    message = None
    if fabric.is_global_zero:
        try:
            work()
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'file'}: {error.strerror or error}"
    message = fabric.broadcast(message)
    if message is not None:
        raise UserError(message)
