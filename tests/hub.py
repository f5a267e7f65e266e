# Copyright 2026 The gated-llama Authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A Hub on this machine, small but real enough for the `huggingface_hub` client: repositories are folders, files are read
and committed over HTTP.
"""

import base64
import hashlib
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


@contextmanager
def local_hub(root: Path):
    """Serve the repositories `root/ORG/NAME`; yields the environment that sends a fresh process's Hub client here."""

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

        def do_GET(self):
            parts = self.parts()
            if parts[:1] == ["api"] and len(parts) > 3 and (root / parts[2] / parts[3]).is_dir():
                files = files_of(root / parts[2] / parts[3])
                if len(parts) > 4 and parts[4] == "tree":
                    self.answer(200, described(files))
                else:
                    siblings = [{"rfilename": name} for name in files]
                    self.answer(200, {"id": "/".join(parts[2:4]), "sha": commit(files), "siblings": siblings})
            elif len(parts) > 4 and parts[2] == "resolve" and (root / parts[0] / parts[1]).is_dir():
                files = files_of(root / parts[0] / parts[1])
                name = "/".join(parts[4:])
                if name in files:
                    self.answer(200, files[name], ETag=f'"{sha(files[name])}"', X_Repo_Commit=commit(files))
                else:
                    self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit(files))
            else:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = self.parts()
            if parts == ["api", "repos", "create"]:
                name = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
                (root / name).mkdir(parents=True, exist_ok=True)
                self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
            elif parts[4:5] == ["paths-info"]:
                wanted = json.loads(body)["paths"]
                files = files_of(root / parts[2] / parts[3])
                self.answer(200, described({name: files[name] for name in wanted if name in files}))
            elif parts[4:5] == ["preupload"]:
                files = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                self.answer(200, {"files": files})
            elif parts[4:5] == ["commit"]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        path = root / parts[2] / parts[3] / line["value"]["path"]
                        path.write_bytes(base64.b64decode(line["value"]["content"]))
                url = f"http://{self.headers['Host']}/{parts[2]}/{parts[3]}/commit/1"
                self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
            else:  # validate-yaml, and whatever else the client tells us
                self.answer(200, {})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(root.parent / "hf_home"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONWARNINGS": "ignore",
        }
    finally:
        server.shutdown()
        server.server_close()


def files_of(repository: Path) -> dict[str, bytes]:
    paths = sorted(path for path in repository.rglob("*") if path.is_file())
    return {str(path.relative_to(repository)): path.read_bytes() for path in paths}


def described(files: dict[str, bytes]) -> list[dict]:
    return [{"type": "file", "path": name, "size": len(b), "oid": sha(b)} for name, b in files.items()]


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    return sha(b"".join(name.encode() + content for name, content in files.items()))
