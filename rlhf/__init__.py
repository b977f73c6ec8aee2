"""RLHF in three stages: supervised fine-tuning, reward model, PPO with a KL penalty against the SFT reference."""

import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

__version__ = "0.1.0"

#: Modules that users import or run by a name of an earlier layout: old name -> where the module is now.
MOVED = {
    "rlhf.comparison": "rlhf.report.compare_page",
    "rlhf.dashboard": "rlhf.report.workspace",
    "rlhf.tracking": "rlhf.report.workspace",
    "rlhf.evaluation.reward": "rlhf.evaluation.card.report_card",
    "rlhf.doctor.preflight.__main__": "rlhf.doctor.preflight.command",
    "rlhf.registry.__main__": "rlhf.sharing.__main__",
}


class _MovedModule(MetaPathFinder, Loader):
    """Finds a module of `MOVED` where it is now, for `import` and for `python -m`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        spec = importlib.util.find_spec(MOVED[fullname])
        assert spec is not None, f"MOVED names {MOVED[fullname]}, which is not there"
        return ModuleSpec(fullname, self, origin=spec.origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has put the old name's there; the module has run already

    def get_code(self, fullname: str) -> CodeType:
        spec = importlib.util.find_spec(MOVED[fullname])
        assert spec is not None and spec.loader is not None
        return spec.loader.get_code(spec.name)  # type: ignore[attr-defined, no-any-return]


sys.meta_path.append(_MovedModule())

# On a CPU it warns of a kernel that is not installed, at import, before a command has said a word; and with 8-bit weights of
# its own rounding, once for each layer of each forward pass.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)

if sys.argv[:1] == ["-m"]:
    # `python -m rlhf...` is importing for some seconds; `run_command` takes Ctrl-C over as soon as it can.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
