# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A Hub on this machine, small but real enough for the `huggingface_hub` client: repositories are folders, files are read
and committed over HTTP, weights as LFS objects that are known by their hash; private ones are shown to whoever has the
token. It refuses a card with `license: none-such`, and can be told to fail.
"""

import atexit
import base64
import functools
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


TOKEN = "hf_test"


@dataclass
class Fault:
    """Answer `status` to requests with `part` in method and path, `times` times; a status of 0 cuts the line."""

    part: str
    status: int
    times: int = 1


@functools.cache
def _server() -> tuple[ThreadingHTTPServer, Path]:
    """One for all hubs of this process, and a cache: their environment is then the same (see `run_fresh`)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return server, home


@contextmanager
def local_hub(root: Path, faults: Sequence[Fault] = (), sent: dict[str, int] | None = None):
    """
    Serve the repositories `root/ORG/NAME`; yields the environment that sends a fresh process's Hub client here, with an
    empty cache.

    Args:
        sent: gets the bytes of every LFS object that was received, by hash.
    """
    sent = {} if sent is None else sent
    objects, private = root.parent / "lfs", set()

    def place(name: str, revision: str = "main") -> Path:
        """Where a branch, or the newest commit of one, has its files."""
        branches = {path.parts[-3]: path for path in root.parent.glob(f"branches/*/{name}")}
        heads = {commit(files_of(path)): path for path in branches.values()}
        return (branches | heads).get(revision, root / name)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status: int, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def parts(self) -> list[str]:
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            return parts[1:] if parts[0] == "datasets" else parts  # their files are found as a model's

        def may_see(self, name: str) -> bool:
            return (root / name).is_dir() and (
                name not in private or self.headers["Authorization"] == f"Bearer {TOKEN}"
            )

        def failed(self) -> bool:
            for fault in faults:
                if fault.times and fault.part in f"{self.command} {self.path}":
                    fault.times -= 1
                    if fault.status:
                        self.rfile.read(int(self.headers.get("Content-Length") or 0))
                        more = {"Retry_After": "1"} if fault.status == 429 else {}
                        self.answer(fault.status, {"error": f"injected {fault.status}"}, **more)
                    else:
                        self.rfile.read(100)
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return True
            return False

        def do_GET(self):
            parts = self.parts()
            if self.failed():
                return
            if parts == ["api", "whoami-v2"]:
                self.answer(200, {"type": "user", "name": "tester", "orgs": [], "auth": {}})
            elif parts[:1] == ["api"] and len(parts) > 3 and self.may_see("/".join(parts[2:4])):
                revision = parts[5] if parts[4:5] in (["tree"], ["revision"]) else "main"
                files = files_of(place("/".join(parts[2:4]), revision))
                if len(parts) > 4 and parts[4] == "tree":
                    self.answer(200, described(files))
                else:
                    siblings = [{"rfilename": name} for name in files]
                    self.answer(200, {"id": "/".join(parts[2:4]), "sha": commit(files), "siblings": siblings})
            elif len(parts) > 4 and parts[2] == "resolve" and self.may_see("/".join(parts[:2])):
                files = files_of(place("/".join(parts[:2]), parts[3]))
                name = "/".join(parts[4:])
                if name in files:
                    self.answer(200, files[name], ETag=f'"{sha(files[name])}"', X_Repo_Commit=commit(files))
                else:
                    self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit(files))
            else:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def do_PUT(self):
            if self.failed():
                return
            content = self.rfile.read(int(self.headers["Content-Length"]))
            oid = self.parts()[-1]
            if lfs_oid(content) != oid:
                return self.answer(422, {"error": "another hash"})
            objects.mkdir(parents=True, exist_ok=True)
            (objects / oid).write_bytes(content)
            sent[oid] = len(content)
            self.answer(200)

        def do_POST(self):
            if self.failed():
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = self.parts()
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                (root / name).mkdir(parents=True, exist_ok=True)
                if asked.get("private") or asked.get("visibility") == "private":
                    private.add(name)
                self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
            elif parts[4:5] == ["paths-info"]:
                wanted = json.loads(body)["paths"]
                files = files_of(place("/".join(parts[2:4]), parts[5]))
                self.answer(200, described({name: files[name] for name in wanted if name in files}))
            elif parts[4:5] == ["preupload"]:
                files = json.loads(body)["files"]
                for file in files:
                    file["uploadMode"] = "lfs" if file["path"].endswith(".safetensors") else "regular"
                    file["shouldIgnore"] = False
                self.answer(200, {"files": files})
            elif parts[-2:] == ["objects", "batch"]:
                answers = []
                for wanted in json.loads(body)["objects"]:
                    upload = {"href": f"http://{self.headers['Host']}/lfs/{wanted['oid']}", "header": {}}
                    there = (objects / wanted["oid"]).exists()
                    answers.append({**wanted, **({} if there else {"actions": {"upload": upload}})})
                self.answer(200, {"transfer": "basic", "objects": answers})
            elif parts[4:5] == ["branch"]:
                (root.parent / "branches" / parts[5] / parts[2] / parts[3]).mkdir(parents=True)
                self.answer(200, {})
            elif parts == ["api", "validate-yaml"]:
                wrong = "license: none-such" in json.loads(body)["content"]
                errors = [{"message": '"license" must be one of those there are'}] if wrong else []
                self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})
            elif parts[4:5] == ["commit"]:
                as_pr = "create_pr=1" in self.path
                target = root.parent / "pull-request" if as_pr else place("/".join(parts[2:4]), parts[5])
                target.mkdir(parents=True, exist_ok=True)
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        (target / value["path"]).write_bytes(base64.b64decode(value["content"]))
                    elif line["key"] == "lfsFile":
                        (target / value["path"]).write_bytes((objects / value["oid"]).read_bytes())
                url, oid = f"http://{self.headers['Host']}/{parts[2]}/{parts[3]}", commit(files_of(target))
                answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""}
                self.answer(200, {**answer, **({"pullRequestUrl": f"{url}/discussions/1"} if as_pr else {})})
            else:  # whatever else the client tells us
                self.answer(200, {})

    server, home = _server()
    server.RequestHandlerClass = Handler
    shutil.rmtree(home, ignore_errors=True)
    try:
        yield {
            **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONWARNINGS": "ignore",
        }
    finally:
        server.RequestHandlerClass = BaseHTTPRequestHandler  # which knows no path


def files_of(repository: Path) -> dict[str, bytes]:
    paths = sorted(path for path in repository.rglob("*") if path.is_file())
    return {str(path.relative_to(repository)): path.read_bytes() for path in paths}


def described(files: dict[str, bytes]) -> list[dict]:
    return [{"type": "file", "path": name, "size": len(b), "oid": sha(b)} for name, b in files.items()]


def lfs_oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    return sha(b"".join(name.encode() + content for name, content in files.items()))
