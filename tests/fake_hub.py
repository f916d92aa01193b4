"""A Hub on this machine: as much of its API as huggingface_hub asks for a model, with a log of what was served."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
PARAMETERS = 4_170_048
COMMIT = "a" * 40
_API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<kind>tree|paths-info)/(?P<revision>[^/]+)")
_WRITE = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<kind>preupload|commit)/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Served:
    """One answer: what was asked, and how many bytes of its body went out."""

    method: str
    path: str
    status: int
    n_bytes: int = 0


@dataclass
class Fault:
    """What the Hub answers to a path that holds ``on``; status 0 never answers."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    on: str = ""


class FakeHub:
    """The server, its repositories (id → name → content), its faults, and the log of what it served."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.faults: list[Fault] = []
        self.log: list[Served] = []
        self.token = "hf_good"
        self.commit = COMMIT
        self.reads_ranges = True
        self.private: dict[str, bool] = {}  # of the repositories that were made here
        self.messages: list[str] = []  # of commits
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def add(self, repository: str, files: Mapping[str, Any]) -> None:
        """Nothing; ``repository`` holds ``files``, each as bytes or as what becomes JSON."""
        self.repositories[repository] = {
            name: content if isinstance(content, bytes) else json.dumps(content).encode()
            for name, content in files.items()
        }

    def fail(self, status: int, on: str = "", **headers: str) -> None:
        """Nothing; paths that hold ``on`` answer ``status`` (0: never answer) with ``headers``."""
        self.faults.append(Fault(status, {name.replace("_", "-"): value for name, value in headers.items()}, on))

    def count_bytes(self, suffix: str) -> int:
        """The bytes that went out of files whose name ends in ``suffix``."""
        return sum(served.n_bytes for served in self.log if served.path.endswith(suffix))

    def close(self) -> None:
        """Nothing; no port is held any more."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str = "") -> None:
    """Nothing; in this process huggingface_hub asks ``url``, keeps its files in ``home`` and has that token alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for fault in self.hub.faults:
            if fault.on in path:
                if not fault.status:
                    self.hub.closing.wait()
                    self.close_connection = True
                    return
                self._send(fault.status, b"", fault.headers)
                return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != self.hub.token:
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        if path == "/api/validate-yaml":
            self._send(200, b'{"errors": [], "warnings": []}')
            return
        if path == "/api/repos/create" or _WRITE.fullmatch(path):
            self._write(path, body, has_token=bool(token))
            return
        found = _TREE.fullmatch(path) or _FILE.fullmatch(path) or _API.fullmatch(path)
        files = self.hub.repositories.get(found["id"]) if found else None
        if not found or files is None:
            # as the real Hub: without a token nobody learns whether a private repository exists
            code, message = ("RepoNotFound", "Repository not found") if token else ("", "Invalid username or password.")
            self._send(404 if token else 401, b"", {"X-Error-Code": code, "X-Error-Message": message})
        elif (found["revision"] or "main") not in ("main", self.hub.commit):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif found.re is _FILE:
            self._send_file(files.get(found["name"]))
        elif found.re is _TREE:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._send(200, json.dumps(entries).encode())
        else:
            document = {"id": found["id"], "sha": self.hub.commit, "siblings": [{"rfilename": name} for name in files]}
            document["private"] = self.hub.private.get(found["id"], False)
            self._send(200, json.dumps(document).encode())

    def _write(self, path: str, body: bytes, *, has_token: bool) -> None:
        """A repository is made, or told which files are to come as LFS (none), or has a commit."""
        if not has_token:
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
            return
        found = _WRITE.fullmatch(path)
        if found is None:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name in self.hub.repositories:
                self._send(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
                return
            self.hub.repositories[name] = {}
            self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self._send(200, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
        elif found["kind"] == "preupload":
            entries = [
                {"path": entry["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for entry in json.loads(body)["files"]
            ]
            self._send(200, json.dumps({"files": entries}).encode())
        else:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.hub.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.hub.repositories[found["id"]][entry["value"]["path"]] = content
            oid = self.hub.commit
            answer = {"commitUrl": f"{self.hub.url}/{found['id']}/commit/{oid}", "commitOid": oid, "success": True}
            self._send(200, json.dumps(answer).encode())

    def _send_file(self, data: bytes | None) -> None:
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.hub.commit})
            return
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.hub.reads_ranges:
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            self._send(206, data[begin:end], headers)
        else:
            self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        served = Served(self.command, self.path.split("?")[0], status)
        self.hub.log.append(served)  # before a byte goes out, so that who has the answer finds it in the log
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for begin in range(0, len(body), 1 << 16):
                chunk = body[begin : begin + (1 << 16)]
                served.n_bytes += len(chunk)
                self.wfile.write(chunk)
        except OSError:  # the other side has read enough
            self.close_connection = True


def list_shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the model that `CONFIG` describes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, 64)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", 64, 64),
            ("self_attn.k_proj", 32, 64),
            ("self_attn.v_proj", 32, 64),
            ("self_attn.o_proj", 64, 64),
            ("mlp.gate_proj", 128, 64),
            ("mlp.up_proj", 128, 64),
            ("mlp.down_proj", 64, 128),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
        shapes[f"{prefix}input_layernorm.weight"] = (64,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (64,)
    return shapes | {"model.norm.weight": (64,), "lm_head.weight": (32_000, 64)}


def make_safetensors(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """A safetensors file of bfloat16 zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, n_elements = end, 1
        for length in shape:
            n_elements *= length
        end += 2 * n_elements
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def make_adapter(base: str, rank: int = 4) -> dict[str, Any]:
    """The files of a LoRA adapter on the query projections of ``base``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj."
        shapes |= {f"{prefix}lora_A.weight": (rank, 64), f"{prefix}lora_B.weight": (64, rank)}
    config = {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    return {"adapter_config.json": config, "adapter_model.safetensors": make_safetensors(shapes)}
