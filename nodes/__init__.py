"""The nodes: thin V3 classes over `moma_modules`."""

from comfy_api.latest import ComfyExtension, io

from ..moma_modules.host.folders import register_folders
from .conditioning import MarkSubject, TextEncode
from .convert import ConvertMllm
from .extract import ExtractSubject
from .loaders import LoadAdapter, LoadBoth, LoadMllm
from .mask import SubjectMask
from .mini import LoadMini
from .patches import ApplyAdapter, ApplySubject, SelfAttnShortcut
from .study import ContactSheet, ListItem, StrengthStudy
from .subject import CombineSubjects, LoadSubject, SaveSubject

NODES: list[type[io.ComfyNode]] = [
    LoadBoth,
    LoadMllm,
    LoadAdapter,
    LoadMini,
    ConvertMllm,
    ExtractSubject,
    CombineSubjects,
    TextEncode,
    MarkSubject,
    ApplySubject,
    ApplyAdapter,
    SelfAttnShortcut,
    SubjectMask,
    SaveSubject,
    LoadSubject,
    StrengthStudy,
    ContactSheet,
    ListItem,
]


class MomaExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def on_load(self) -> None:
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> MomaExtension:
    """ComfyUI's entry into the pack."""
    return MomaExtension()
