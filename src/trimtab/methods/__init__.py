"""The methods, one file each, in the survey's three families. The registry imports every file below this folder.

Importing this package puts it where ``trimtab.methods()``, the table, is looked up; so the package itself answers that call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Methods(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``tt.methods()``: the table of all methods and what each can do."""
        from trimtab.core.probe import methods

        return methods(*args, **kwargs)


sys.modules[__name__].__class__ = _Methods
