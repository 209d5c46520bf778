"""Let vLLM import models with a vision tower where torchvision is not installed, as beside a CPU build of torch.

vLLM's modules of such models (Qwen3.5 among them, text or not) import transformers' fast image processors, which import
``torchvision.transforms.v2.functional``. Serving text never calls it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

_STAND_INS = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)
_IMPORTERS = (
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.gemma3.image_processing_gemma3",
)


def import_image_processors() -> None:
    """Import transformers' image processors that vLLM imports by name; with an empty torchvision if there is none.

    The stand-in is gone afterwards, so that nothing else takes torchvision for installed. Images are still refused: the
    processors fail as soon as they are called.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return

    with _stand_in():
        for name in _IMPORTERS:
            importlib.import_module(name)


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    modules = {name: ModuleType(name) for name in _STAND_INS}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
