"""Bad adapter and subject files, and names from a graph that lead elsewhere: refused by name, nothing run or lost."""

import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfyui_moma.moma_modules.adapter.file import convert_adapter, read_adapter
from comfyui_moma.moma_modules.adapter.loading import adapter_names, load_adapter
from comfyui_moma.moma_modules.host.folders import MODELS, SUBJECTS
from comfyui_moma.moma_modules.subject.file import (
    FORMAT,
    check_prefix,
    load_subject,
    save_numbered,
    save_subject,
    subject_names,
)
from comfyui_moma.nodes.loaders import LoadAdapter, LoadMllm
from comfyui_moma.nodes.patches import ApplyAdapter
from comfyui_moma.nodes.subject import LoadSubject, SaveSubject
from safetensors.torch import save_file

from workbench import ROOT
from workbench.scene import moma, negative, positive, sample, tiny_adapter, tiny_subject
from workbench.tiny_models import adapter_groups, tiny_model

Tensors = dict[str, torch.Tensor]
SD_KEYS = ("lora_unet_down_blocks_0_attentions_0_to_k.lora_up.weight", "model.diffusion_model.out.2.bias")


def flat_adapter() -> Tensors:
    """A small adapter as one flat dict."""
    groups = adapter_groups(embedding=8, hidden=16, prefix="")
    return {f"{group}.{key}": value for group, part in groups.items() for key, value in part.items()}


def grouped(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The form of the `.th` file."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = value
    return groups


def header_only(path: Path, header: Any, body: bytes = b"") -> None:
    """A `.safetensors` file with this header, true or not."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + body)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


NORM, BIAS = "projectors.norm.weight", "projectors.proj.bias"
SCALE, LAYER = "self_cross_attentions.0.scale_learnable", "self_cross_attentions.2.to_k_ip.weight"
CHANGED: dict[str, tuple[str, Any, str]] = {
    "int8": (BIAS, torch.zeros(256, dtype=torch.int8), r"floating-point tensor, found torch\.int8 \(256,\)"),
    "complex": (BIAS, torch.zeros(256, dtype=torch.complex64), r"floating-point tensor, found torch\.complex64"),
    "fp8 scales": (BIAS, torch.zeros(256).to(torch.float8_e8m0fnu), r"tensor, found torch\.float8_e8m0fnu"),
    "0-d scale": (SCALE, torch.tensor(0.5), r"has shape \(\), expected \(1,\)"),
    "0-d norm": (NORM, torch.tensor(0.5), r"has shape \(\), expected 1 dimension"),
    "0-d layer": (LAYER, torch.tensor(0.5), r"has shape \(\), expected 2 dimension"),
    "no values": (NORM, torch.zeros(0), r"has shape \(0,\), expected 1 dimension\(s\), none of size 0"),
    "NaN": (LAYER, torch.full((32, 32), torch.nan), "holds NaN or infinite values"),
    "infinite scale": (SCALE, torch.tensor([torch.inf]), "holds NaN or infinite values"),
}
PICKLED: dict[str, tuple[str, Any, str]] = {
    "repeated": (NORM, torch.zeros(1).expand(10**12), r"claims torch\.float32 \(1000000000000,\), but the file holds"),
    "sparse": (BIAS, torch.zeros(256).to_sparse(), "is a tensor of a kind without plain values"),
    "meta": (BIAS, torch.zeros(256, device="meta"), "is a tensor of a kind without plain values"),
    "a list": (BIAS, [0.0] * 256, "floating-point tensor, found list"),
}


@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
@pytest.mark.parametrize("case", CHANGED)
def test_a_wrong_tensor_is_refused_by_name(tmp_path: Path, case: str, suffix: str) -> None:
    key, value, message = CHANGED[case]
    path = tmp_path / f"adapter{suffix}"
    flat = flat_adapter() | {key: value}
    save_file(flat, path) if suffix == ".safetensors" else torch.save(grouped(flat), path)
    with pytest.raises(ValueError, match=rf"adapter\{suffix}: key '{key}' .*{message}"):
        read_adapter(path)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("case", PICKLED)
def test_a_wrong_value_of_a_pickle_is_refused_by_name(tmp_path: Path, case: str) -> None:
    key, value, message = PICKLED[case]
    torch.save(grouped(flat_adapter() | {key: value}), tmp_path / "adapter.th")
    with pytest.raises(ValueError, match=rf"adapter\.th: key '{key}' .*{message}"):
        read_adapter(tmp_path / "adapter.th")


def test_an_fp8_adapter_works(tmp_path: Path) -> None:
    """Plain fp8 weights are real numbers, and are computed with in the model's dtype."""
    path = tmp_path / "adapter.safetensors"
    groups = adapter_groups(embedding=48, prefix="")
    flat = {f"{g}.{key}": value.to(torch.float8_e4m3fn) for g, part in groups.items() for key, value in part.items()}
    save_file(flat, path)
    adapter = load_adapter(path)
    subject = tiny_subject(adapter)
    assert sample(moma(tiny_model(), adapter, subject), positive(subject), negative(), steps=1).isfinite().all()


def test_extra_groups_and_keys_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "adapter.th"
    torch.save(grouped(flat_adapter()), path)
    identity = read_adapter(path).identity
    more = {**grouped(flat_adapter()), "optimizer": {"step": torch.tensor(3)}, 7: "seven"}
    more["projectors"] |= {("odd", "key"): torch.zeros(1), "notes": ["text"]}
    torch.save(more, path)
    assert read_adapter(path).identity == identity


@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
@pytest.mark.parametrize("key", SD_KEYS)
def test_a_lora_or_checkpoint_is_no_adapter(tmp_path: Path, key: str, suffix: str) -> None:
    path = tmp_path / f"other{suffix}"
    tensors = {key: torch.zeros(4, 4)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(ValueError, match=rf"other\{suffix} is not a MoMA adapter: group 'projectors'.*found: {key}"):
        read_adapter(path)


@contextmanager
def little_is_read() -> Iterator[None]:
    """Less than 100 MB are read, and held: counted, as how long they take is the machine's affair."""
    counts = Path("/proc/self/io")  # Linux alone has it

    def used() -> tuple[int, int]:
        read = int(counts.read_text(encoding="utf-8").split()[1]) if counts.exists() else 0
        return read, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = used()
    yield
    assert all(after - earlier < 100 * 2**20 for after, earlier in zip(used(), before, strict=True))


def test_a_checkpoint_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """16 GiB that lie nowhere (a sparse file): only the header is looked at."""
    path, size = tmp_path / "big.safetensors", 2**34
    header_only(path, {"model.weight": entry("U8", [size], 0, size)})
    os.truncate(path, path.stat().st_size + size)
    with little_is_read():
        with pytest.raises(ValueError, match=r"big\.safetensors is not a MoMA adapter"):
            read_adapter(path)
        with pytest.raises(ValueError, match=r"big\.safetensors is not a saved MoMA subject \(format None\)"):
            load_subject(path)


class Harm:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("where", ["value", "key", "deep", "legacy", "plain pickle", "beside good weights"])
def test_code_is_not_run_and_no_way_around_is_advised(tmp_path: Path, where: str) -> None:
    harm, path = Harm(tmp_path / "harm"), tmp_path / "adapter.th"
    deep: Any = harm
    for _ in range(100):
        deep = {"projectors": [deep]}
    contents = {
        "value": {"projectors": harm},
        "key": {(1, 2): {harm: 1}},
        "deep": deep,
        "legacy": {"projectors": harm},
        "plain pickle": {"projectors": harm},
        "beside good weights": {**grouped(flat_adapter()), "note": harm},
    }
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(contents[where]))
    else:
        torch.save(contents[where], path, _use_new_zipfile_serialization=where != "legacy")
    with pytest.raises(
        ValueError, match=r"adapter\.th was refused: .*holds code instead of weights\. Nothing"
    ) as error:
        read_adapter(path)
    assert "weights_only" not in str(error.value) and not (tmp_path / "harm").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_pickle_is_a_clear_error_whatever_the_damage(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "adapter.th"
    small = {"projectors": {"norm.weight": torch.ones(5)}, "llm_mapping": {"x": torch.zeros(3, 3)}}
    torch.save(small, path, _use_new_zipfile_serialization=not legacy)
    whole, choose = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(choose.choice([1, 2, 5])):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        path.write_bytes(damaged[: choose.choice([len(damaged), choose.randrange(len(damaged))])])
        with pytest.raises(ValueError, match=r"adapter\.th") as error:
            read_adapter(path)
        assert len(str(error.value)) < 1000


HEADERS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "header of 4 EiB": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "header longer than the file": lambda path: path.write_bytes(struct.pack("<Q", 500) + b"{}"),
    "overlap": lambda path: header_only(path, {n: entry("F32", [1], 0, 4) for n in ("a", "b")}, bytes(4)),
    "same name twice": lambda path: header_only(
        path, b'{"a":%b,"a":%b}' % tuple(json.dumps(entry("F32", [1], s, s + 4)).encode() for s in (0, 4)), bytes(8)
    ),
    "absurd shape": lambda path: header_only(path, {"a": entry("F32", [2**40, 2**40], 0, 4)}, bytes(4)),
    "negative shape": lambda path: header_only(path, {"a": entry("F32", [-1], 0, 4)}, bytes(4)),
    "unknown dtype": lambda path: header_only(path, {"a": entry("Q9", [1], 0, 4)}, bytes(4)),
    "numbers as metadata": lambda path: header_only(path, {"__metadata__": {"format": 1}}),
    "nested": lambda path: header_only(path, b'{"a":' + b"[" * 100_000),
    "not UTF-8": lambda path: header_only(path, b'{"\xff":1}'),
    "a web page": lambda path: path.write_text("<html>404</html>", encoding="utf-8"),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_broken_safetensors_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.safetensors"
    HEADERS[kind](path)
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a readable \.safetensors file"):
        read_adapter(path)
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a readable \.safetensors file"):
        load_subject(path)


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's folders for adapters and subjects in an empty place; with a secret beside them."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for key, folder in ((MODELS, "models/moma"), (SUBJECTS, "output/moma_subjects")):
        (tmp_path / folder).mkdir(parents=True)
        known = folder_paths.folder_names_and_paths[key]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / folder)], known[1]))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_one_bad_file_does_not_hide_the_others(roots: Path) -> None:
    models = roots / "models" / "moma"
    for number, make in enumerate(HEADERS.values()):
        make(models / f"{number}.safetensors")
    (models / "cut.th").write_bytes(b"PK")
    save_file(flat_adapter(), models / "good.safetensors")
    size = 2**34
    header_only(models / "big.safetensors", {"projectors.proj.weight": entry("U8", [size], 0, size)})
    os.truncate(models / "big.safetensors", (models / "big.safetensors").stat().st_size + size)
    with little_is_read():
        assert adapter_names() == ["big.safetensors", "cut.th", "good.safetensors"]
    offered = LoadAdapter.GET_SCHEMA().inputs[0].options
    assert set(offered) == {*adapter_names(), "MoMA_llava_7b/attn_adapters_projectors.th"}
    with pytest.raises(ValueError, match=r"cut\.th"):
        LoadAdapter.execute("cut.th")


OUTSIDE = [
    "../secret.th",
    "..\\secret.th",
    "sub/../../secret.th",
    "{root}/secret.th",
    "~/secret.th",
    "",
    ".",
    "a\0b.th",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_never_lead_out_of_the_model_folders(roots: Path, name: str) -> None:
    torch.save(grouped(flat_adapter()), roots / "models" / "secret.th")
    torch.save(grouped(flat_adapter()), roots / "secret.th")
    name = name.replace("{root}", str(roots))
    for node, argument in ((LoadAdapter, "adapter_name"), (LoadSubject, "subject_name")):
        message = node.validate_inputs(**{argument: name})
        assert isinstance(message, str) and message.startswith(f"{argument}: there is no ")
        assert repr(name) in message and "Searched: " in message and str(roots) in message
        with pytest.raises(FileNotFoundError):
            node.execute(**{argument: name})
        with pytest.raises(FileNotFoundError):
            node.fingerprint_inputs(**{argument: name})


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        (LoadAdapter, {"adapter_name": None, "download": False}),
        (LoadMllm, {"model_name": None, "precision": "auto", "download": False}),
        (LoadSubject, {"subject_name": None}),
    ],
)
def test_a_name_from_another_node_is_seen_when_the_node_runs(node: Any, inputs: dict[str, Any]) -> None:
    """Before, ComfyUI asks with None in its place."""
    asked = {key: value for key, value in inputs.items() if key != "precision"}
    assert node.validate_inputs(**asked) is True and node.fingerprint_inputs(**inputs) == ""


@pytest.fixture(scope="module")
def subject() -> Any:
    return tiny_subject(tiny_adapter(), size=512)


REFUSED = {
    "../x": "leads out of its folder",
    "..\\x": "leads out of its folder",
    "a/../../x": "leads out of its folder",
    "..": "leads out of its folder",
    "/tmp/x": "is an absolute path",
    "\\\\server\\x": "is an absolute path",
    "C:\\x": "holds ':'",
    "x:stream": "holds ':'",
    "%date:yyyy%": "holds ':'",
    "": "ends without a name",
    "cars/": "ends without a name",
    "a\0b": r"holds '\\x00'",
    "a\nb": r"holds '\\n'",
    "what?": r"holds '\?'",
    "\ud800": "holds",
    "aux.safetensors": "'aux.safetensors', which is a device on Windows",
    "CON/x": "'CON', which is a device on Windows",
    "nul.old/x": "'nul.old', which is a device on Windows",
    "a./x": "'a.', which ends in a dot or space",
    "a /x": "'a ', which ends in a dot or space",
    "./x": r"has the folder name '\.'",
    "x" * 300: "has a name of 31. bytes; at most 200",
    "\N{CAT FACE}" * 60: "has a name of 25. bytes; at most 200",
}


@pytest.mark.parametrize("prefix", REFUSED)
def test_a_prefix_that_leads_elsewhere_is_refused(roots: Path, subject: Any, prefix: str) -> None:
    message = rf"^filename_prefix .* {REFUSED[prefix]}.* Give a name such as 'cup' or 'cars/red'\.$"
    with pytest.raises(ValueError, match=message) as error:
        SaveSubject.execute(subject, prefix)
    if prefix:  # ComfyUI itself refuses to leave it out
        assert SaveSubject.validate_inputs(prefix) == str(error.value)
    assert [path.name for path in roots.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("prefix", "file"),
    [
        ("cup", "cup_00001_.safetensors"),
        (" cars\\red ", "cars/red_00001_.safetensors"),
        ("%width%x%height%/a.b", "0x0/a.b_00001_.safetensors"),
        ("tasse \N{HOT BEVERAGE} (1)", "tasse \N{HOT BEVERAGE} (1)_00001_.safetensors"),
    ],
)
def test_any_other_prefix_is_a_file_that_can_be_loaded(roots: Path, subject: Any, prefix: str, file: str) -> None:
    (saved,) = SaveSubject.execute(subject, prefix).ui["moma_subjects"]
    path = roots / "output" / saved["subfolder"] / saved["filename"]
    assert path == roots / "output" / "moma_subjects" / file
    assert subject_names() == [file]
    assert LoadSubject.execute(file).args[0].key == subject.key


def test_a_link_out_of_the_folder_is_not_followed(roots: Path, subject: Any) -> None:
    (roots / "elsewhere").mkdir()
    (roots / "output" / "moma_subjects" / "link").symlink_to(roots / "elsewhere")
    for prefix in ("link/x", "link/new/x"):
        with pytest.raises(ValueError, match=r"^filename_prefix leads to .*elsewhere.*, which is outside"):
            SaveSubject.execute(subject, prefix)
    assert not list((roots / "elsewhere").iterdir())


def test_the_whole_folder_may_be_a_link(roots: Path, subject: Any) -> None:
    (roots / "disk").mkdir()
    (roots / "output" / "moma_subjects").rmdir()
    (roots / "output" / "moma_subjects").symlink_to(roots / "disk")
    SaveSubject.execute(subject, "a/cup")
    assert (roots / "disk" / "a" / "cup_00001_.safetensors").is_file()


SAVE_MANY = """
import sys
from workbench.bootstrap import bootstrap
bootstrap()
import folder_paths
from comfyui_moma.moma_modules.subject.file import save_numbered
from comfyui_moma.moma_modules.subject.file import load_subject
from pathlib import Path
folder_paths.set_output_directory(sys.argv[1])
subject = load_subject(Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(15):
    print(save_numbered(subject, "same/name"), flush=True)
"""


def test_two_processes_saving_at_once_lose_nothing(roots: Path, subject: Any) -> None:
    """This one and another."""
    save_subject(subject, roots / "subject.safetensors")
    command = [sys.executable, "-c", SAVE_MANY, str(roots / "output"), str(roots / "subject.safetensors")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8", "env": variables}
    with subprocess.Popen(command, **pipes) as process:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        process.stdin.write("go\n")
        process.stdin.flush()
        saved = [str(save_numbered(subject, "same/name")) for _ in range(15)]
        saved += process.stdout.read().split()
    _check_saved(saved, 30, subject)


def test_threads_saving_at_once_lose_nothing(roots: Path, subject: Any) -> None:
    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(lambda _: save_numbered(subject, "same/name"), range(24)))
    _check_saved([str(path) for path in saved], 24, subject)


def _check_saved(saved: list[str], count: int, subject: Any) -> None:
    assert len(set(saved)) == count
    (folder,) = {Path(path).parent for path in saved}
    assert sorted(str(path) for path in folder.iterdir()) == sorted(saved)
    assert {load_subject(Path(path)).key for path in saved} == {subject.key}


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path, subject: Any) -> None:
    path = tmp_path / "cup.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"cup\.safetensors is there already"):
        save_subject(subject, path)
    assert path.read_bytes() == b"precious" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, subject: Any) -> None:
    """A real write that runs out of room: the system's limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_subject(subject, tmp_path / "cup.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    save_subject(subject, tmp_path / "cup.safetensors")


def test_a_number_left_by_a_killed_process_is_passed_over(roots: Path, subject: Any) -> None:
    (roots / "output" / "moma_subjects" / "cup_00001_.safetensors.part").touch()
    assert save_numbered(subject, "cup").name == "cup_00002_.safetensors"
    assert subject_names() == ["cup_00002_.safetensors"]


def subject_file(path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    """A subject file as the pack writes it, but for these changes."""
    content = {
        "embedding": torch.zeros(1, 48),
        "images": torch.zeros(1, 512, 512, 3, dtype=torch.uint8),
        "masks": torch.ones(1, 512, 512, dtype=torch.uint8),
    }
    entries = {"format": FORMAT, "version": "1", "subject": "car", "prompt": "A car.", "adapter": "abc"}
    save_file(content | tensors, path, entries | (metadata or {}))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"version": "99"}, {}, "has format version '99'; this version of the pack reads 1 and 2. Update ComfyUI-MoMA"),
        ({"subject": " "}, {}, "has no subject word"),
        (
            {},
            {"images": torch.zeros(1, 8, 9000, 3, dtype=torch.uint8)},
            r"U8 \(1, 8, 9000, 3\), expected U8 \[pictures",
        ),
        ({}, {"images": torch.zeros((), dtype=torch.uint8)}, r"images is U8 \(\), expected"),
        ({}, {"images": torch.zeros(0, 512, 512, 3, dtype=torch.uint8)}, r"images is U8 \(0, 512, 512, 3\), expected"),
        ({}, {"masks": torch.ones(2, 512, 512, dtype=torch.uint8)}, r"masks is U8 \(2, .*one for each of 1 images"),
        ({}, {"masks": torch.ones(1, 512, 512, dtype=torch.bool)}, r"masks is BOOL"),
        ({}, {"embedding": torch.zeros(1, 48, dtype=torch.float16)}, r"embedding is F16 \(1, 48\), expected F32"),
        ({}, {"embedding": torch.zeros(1, 48, dtype=torch.complex64)}, r"embedding is C64"),
        ({}, {"embedding": torch.zeros(1, 0)}, r"embedding is F32 \(1, 0\)"),
        ({}, {"embedding": torch.tensor(1.0)}, r"embedding is F32 \(\)"),
        ({}, {"embedding": torch.full((1, 48), torch.inf)}, "the embedding holds NaN or infinite"),
        ({}, {"extra": torch.zeros(1)}, "should hold embedding, images and masks, found embedding, extra, images"),
    ],
)
def test_a_wrong_subject_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, str], tensors: Tensors, message: str
) -> None:
    path = tmp_path / "cup.safetensors"
    subject_file(path, metadata, **tensors)
    with pytest.raises(ValueError, match=rf"cup\.safetensors.*{message}"):
        load_subject(path)


def test_a_subject_of_another_adapter_is_refused_at_apply(tmp_path: Path) -> None:
    subject_file(tmp_path / "cup.safetensors")
    loaded = load_subject(tmp_path / "cup.safetensors")
    with pytest.raises(ValueError, match=r"^subject was extracted with another adapter \(abc\)"):
        ApplyAdapter.execute(tiny_model(), tiny_adapter(), loaded, 1.0, 0.0, 1.0)


def test_a_bad_source_is_not_converted(tmp_path: Path) -> None:
    torch.save({"projectors": Harm(tmp_path / "harm")}, tmp_path / "adapter.th")
    with pytest.raises(ValueError, match=r"adapter\.th was refused"):
        convert_adapter(tmp_path / "adapter.th", tmp_path / "adapter.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.th"]


def test_prefixes_of_older_graphs_stay_possible() -> None:
    for prefix in ("subject", "cars/red", "a-b_c.d", "2026/11", "cup%year%"):
        check_prefix(prefix)
