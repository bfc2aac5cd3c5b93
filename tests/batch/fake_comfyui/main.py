"""A stand-in for ComfyUI's server, fast enough for hundreds of rows, that can fail as no real one does on demand.

It answers as ComfyUI does to what `moma_batch` asks; `test_client.py` runs the same tests against both. A picture is
painted from the row's key, which is thus in the pixels. Words in a row's prompt make it fail:

- `crash`: the process ends while the prompt runs; `answer cut`: while it answers that the prompt is queued;
  `picture cut`: while it gives the picture; `hang`: the prompt never ends; `tear`: the picture's file is cut off
- `grow`: it holds 64 MB more; `raise`: a node raises an exception; `full`: a node finds no room on the disk
- `memory`: a node runs out of memory; `slow`: it takes a second; `refuse`: the prompt is invalid
- `WORD once`: only for the first server of the folder that meets this prompt
"""

import argparse
import email.parser
import email.policy
import hashlib
import json
import os
import random
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PICTURE_NODES = {"SaveImage"}
CLASSES = {
    "CheckpointLoaderSimple", "LoadImage", "LoadImageMask", "MoMALoadMLLM", "MoMALoadAdapter", "MoMAExtractSubject",
    "MoMATextEncode", "CLIPTextEncode", "MoMAApplyAdapter", "MoMASelfAttnShortcut", "EmptyLatentImage", "EmptyImage",
    "KSampler", "VAEDecode", "SaveImage", "MoMASaveSubject", "MoMALoadSubject", "MoMALoadMini", "CreateList",
}  # fmt: skip
held: list[bytes] = []


class InterruptedPromptError(Exception):
    """Somebody stopped the prompt."""


class NodeError(Exception):
    """A node raised: its class and the exception's type come first."""


def png(pixels: bytes, side: int, texts: dict[str, str]) -> bytes:
    """A square RGB picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))

    lines = b"".join(b"\0" + pixels[i * 3 * side : (i + 1) * 3 * side] for i in range(side))
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))]
    parts += [chunk(b"tEXt", name.encode() + b"\0" + text.encode()) for name, text in texts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


class Fake:
    """The queue, the history and the folders."""

    def __init__(self, options: argparse.Namespace, number: int) -> None:
        self.input, self.output = Path(options.input_directory), Path(options.output_directory)
        self.log = os.environ.get("FAKE_LOG")
        self.marks = Path(os.environ.get("FAKE_MARKS", options.output_directory))
        self.median = float(os.environ.get("FAKE_SECONDS", "0"))
        self.random = random.Random((options.port or os.getpid()) + number)
        self.pending: list[tuple[str, dict, dict]] = []
        self.running: list[tuple[str, dict, dict]] = []
        self.history: dict[str, dict] = {}
        self.cut: set[str] = set()
        self.lock, self.wake, self.stop = threading.Lock(), threading.Semaphore(0), threading.Event()

    def loop(self) -> None:
        """Run what is queued, one after another."""
        while True:
            self.wake.acquire()
            with self.lock:
                if not self.pending:
                    continue
                item = self.pending.pop(0)
                self.running.append(item)
                self.stop.clear()
            outputs, messages, status = {}, [["execution_start", {}]], "success"
            try:
                outputs = self.execute(*item)
                messages.append(["execution_success", {}])
            except InterruptedPromptError:
                messages.append(["execution_interrupted", {}])
                status = "error"
            except NodeError as error:
                node, kind, text = error.args
                said = {"node_type": node, "exception_type": kind, "exception_message": text}
                messages.append(["execution_error", said])
                status = "error"
            except OSError as error:  # as a node of ComfyUI that does not find its file
                said = {"node_type": "", "exception_type": type(error).__name__, "exception_message": str(error)}
                messages.append(["execution_error", said])
                status = "error"
            with self.lock:
                self.running.clear()
                said = {"status_str": status, "completed": status == "success", "messages": messages}
                self.history[item[0]] = {"outputs": outputs, "status": said}

    def asks_for(self, word: str, texts: list[str]) -> bool:
        text = next((text for text in texts if word in text), "")
        if f"{word} once" not in text:
            return bool(text)
        try:
            (self.marks / f"{word}-{hashlib.sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def execute(self, prompt_id: str, graph: dict, extra: dict) -> dict:
        values = [item for node in graph.values() for item in node["inputs"].items() if item[0] != "filename_prefix"]
        texts = [value for _, value in values if isinstance(value, str)]
        mark = extra.get("extra_pnginfo", {}).get("moma_batch", {})
        seconds = self.random.lognormvariate(0, 0.5) * self.median + self.asks_for("slow", texts)
        if self.log:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(
                    json.dumps(
                        {
                            "id": mark.get("id"),
                            "prompt_id": prompt_id,
                            "pid": os.getpid(),
                            "threads": os.environ.get("OMP_NUM_THREADS"),
                            "niceness": os.nice(0) if os.name != "nt" else 0,
                            "seconds": seconds,
                            "at": time.time(),
                        }
                    )
                    + "\n"
                )
        for node in graph.values():
            if node["class_type"] in ("LoadImage", "LoadImageMask") and "image" in node["inputs"]:
                (self.input / node["inputs"]["image"]).read_bytes()
            if node["class_type"] == "MoMALoadSubject":
                name = node["inputs"]["subject_name"].removesuffix(" [input]")
                (self.input / name).read_bytes()
        if self.asks_for("hang", texts):
            seconds = 3600
        if self.asks_for("crash", texts):
            os._exit(9)
        if self.stop.wait(seconds):
            raise InterruptedPromptError
        if self.asks_for("grow", texts):
            held.append(os.urandom(1 << 10) * (1 << 16))
        for word, node, kind, said in (
            ("raise", "KSampler", "ValueError", "the mask is empty"),
            ("memory", "KSampler", "torch.OutOfMemoryError", "CUDA out of memory"),
            ("full", "SaveImage", "OSError", "[Errno 28] No space left on device"),
        ):
            if self.asks_for(word, texts):
                raise NodeError(node, kind, said)
        return self.save(graph, mark, texts)

    def save(self, graph: dict, mark: dict, texts: list[str]) -> dict:
        outputs = {}
        key = str(mark.get("key") or hashlib.sha256(json.dumps(graph).encode()).hexdigest())
        for name, node in graph.items():
            if node["class_type"] not in (*PICTURE_NODES, "MoMASaveSubject"):
                continue
            if node["class_type"] == "MoMASaveSubject":
                outputs[name] = self.save_subjects(graph, node["inputs"]["filename_prefix"])
                continue
            subfolder, _, stem = node["inputs"]["filename_prefix"].rpartition("/")
            painted = bytes.fromhex(key) * 6 if len(key) == 64 else bytes(192)
            content = png(painted, 8, {"moma_batch": json.dumps(mark)})
            if self.asks_for("tear", texts):
                content = content[: len(content) // 2]
            outputs[name] = {"images": [self.put(subfolder, f"{stem}_00001_.png", content)]}
            if self.asks_for("picture cut", texts):
                self.cut.add(f"{stem}_00001_.png")
        return outputs

    def save_subjects(self, graph: dict, prefix: str | list) -> dict:
        """One file for each prefix, which may come as a list, and as often the name of the one with their picture."""
        prefixes = [prefix] if isinstance(prefix, str) else list(graph[prefix[0]]["inputs"].values())
        pictures = [v["inputs"]["image"] for v in graph.values() if v["class_type"] == "LoadImage"]
        digest = hashlib.sha256("".join(pictures).encode()).hexdigest()
        subjects, beside = [], []
        for one in prefixes:
            subfolder, _, stem = f"moma_subjects/{one}".rpartition("/")
            subjects.append(self.put(subfolder, f"{stem}_00001_.safetensors", stem.partition("-")[0].encode()))
            beside.append(self.put(subfolder, f"{digest}.pictures", digest.encode() * 100))
        return {"moma_subjects": subjects, "moma_pictures": beside}

    def put(self, subfolder: str, name: str, content: bytes) -> dict[str, str]:
        (self.output / subfolder).mkdir(parents=True, exist_ok=True)
        (self.output / subfolder / name).write_bytes(content)
        return {"filename": name, "subfolder": subfolder, "type": "output"}


class Handler(BaseHTTPRequestHandler):
    """The addresses that `moma_batch` uses."""

    fake: Fake
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as ComfyUI's server: otherwise each answer on a kept connection waits for 40 ms

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        fake = self.fake
        if address.path == "/system_stats":
            self.answer({"system": {"comfyui_version": "fake", "python_version": "3"}})
        elif address.path == "/object_info":
            self.answer({name: {} for name in CLASSES})
        elif address.path == "/queue":
            with fake.lock:
                kinds = {"queue_running": fake.running, "queue_pending": fake.pending}
                self.answer({kind: [[0, item[0], item[1]] for item in items] for kind, items in kinds.items()})
        elif address.path.startswith("/history/"):
            prompt_id = address.path.rpartition("/")[2]
            found = fake.history.get(prompt_id)
            self.answer({prompt_id: found} if found else {})
        elif address.path == "/view":
            wanted = {key: values[0] for key, values in parse_qs(address.query).items()}
            path = fake.output / wanted.get("subfolder", "") / wanted["filename"]
            content = path.read_bytes() if path.is_file() else b""
            if path.name in fake.cut:
                self.end_within(content)
            self.answer(content, 200 if path.is_file() else 404)
        else:
            self.answer({}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fake = self.fake
        if self.path == "/upload/image":
            self.upload(body)
            return
        content = json.loads(body)
        if self.path == "/prompt":
            self.prompt(content)
            return
        if self.path == "/queue":
            with fake.lock:
                fake.pending[:] = [item for item in fake.pending if item[0] not in content["delete"]]
        elif self.path == "/interrupt":
            with fake.lock:
                if [item for item in fake.running if item[0] == content["prompt_id"]]:
                    fake.stop.set()
        elif self.path == "/history":
            for prompt_id in content["delete"]:
                fake.history.pop(prompt_id, None)
        self.answer(b"")

    def prompt(self, content: dict) -> None:
        graph = content["prompt"]
        for name, node in graph.items():
            problem = None
            if node["class_type"] not in CLASSES:
                error = {
                    "type": "missing_node_type",
                    "message": f"Node '{node['class_type']}' not found.",
                    "details": "",
                }
                self.answer({"error": error, "node_errors": {}}, 400)
                return
            if any(isinstance(value, str) and "refuse" in value for value in node["inputs"].values()):
                problem = "Value not in list"
            if node["class_type"] == "KSampler" and not 1 <= node["inputs"].get("steps", 1) <= 10000:
                problem = "Value bigger than max"
            if node["class_type"] == "LoadImage" and not (self.fake.input / node["inputs"]["image"]).is_file():
                problem = "Invalid image file"
            if problem:
                errors = [{"message": problem, "details": "here"}]
                error = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"}
                nodes = {name: {"errors": errors, "class_type": node["class_type"]}}
                self.answer({"error": error, "node_errors": nodes}, 400)
                return
        item = (content["prompt_id"], graph, content.get("extra_data", {}))
        if any("answer cut" in str(value) for node in graph.values() for value in node["inputs"].values()):
            self.end_within(b"{}" * 100)
        with self.fake.lock:
            self.fake.pending.append(item)
        self.fake.wake.release()
        self.answer({"prompt_id": item[0], "number": 0, "node_errors": {}})

    def upload(self, body: bytes) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        parts = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
        subfolder, name = parts["subfolder"].get_content().strip(), parts["image"].get_filename()
        folder = self.fake.input / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(parts["image"].get_payload(decode=True))
        self.answer({"name": name, "subfolder": subfolder, "type": "input"})

    def end_within(self, body: bytes) -> None:
        """The process ends in the middle of an answer."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        os._exit(9)

    def answer(self, content: object, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Threads(ThreadingHTTPServer):
    """Many clients at once."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--input-directory", required=True)
    parser.add_argument("--output-directory", required=True)
    parser.add_argument("--servers", type=int, default=1, help="so many in this process, each on a port of its own")
    options, _ = parser.parse_known_args()
    time.sleep(float(os.environ.get("FAKE_START_SECONDS", "0")))
    for number in range(options.servers):
        fake = Fake(options, number)
        server = Threads(("127.0.0.1", options.port), type("OneHandler", (Handler,), {"fake": fake}))
        print(server.server_address[1], flush=True)
        threading.Thread(target=fake.loop, daemon=True).start()
        threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
