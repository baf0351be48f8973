"""A model hub on 127.0.0.1: as much of one as huggingface_hub and transformers ask for models, uploads and branches.

hub = FakeHub()
hub.url                                           # for HF_ENDPOINT
hub.commit("user/name", "main", {"a.txt": b"a"})  # -> the commit's id
hub.refs["user/name"]["v1"] = ...                 # a tag: the id of a commit
"""

import base64
import json
import re
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


class FakeHub(ThreadingHTTPServer):
    """Repositories as dicts. Who writes needs a token, any; who reads needs none."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch, tag or commit -> commit
        self.files: dict[str, dict[str, bytes]] = {}  # commit -> path -> content
        self.visibility: dict[str, str] = {}  # repository -> public or private
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repo: str, branch: str, added: dict[str, bytes]) -> str:
        refs = self.refs.setdefault(repo, {})
        files = {**self.files.get(refs.get(branch), {}), **added}
        commit = sha1(f"{repo} {len(self.files)}".encode()).hexdigest()
        self.files[commit], refs[branch], refs[commit] = files, commit, commit
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a header is sent at once, and the body after it

    def log_message(self, *_) -> None:
        pass

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, 401 if code == "Unauthorized" else 404, X_Error_Code=code)

    def parts(self) -> list[str]:
        """/api/models/user/name/... or /user/name/... -> user, name, ..."""
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
        return parts[2:] if parts[:2] == ["api", "models"] else parts

    def do_GET(self) -> None:
        hub, parts = self.server, self.parts()
        user, name, what, revision, *path = parts if len(parts) > 2 else [*parts, "revision", "main"]
        repo, path = f"{user}/{name}", "/".join(path)
        commit = hub.refs.get(repo, {}).get(revision)
        if commit is None:
            return self.refuse("RevisionNotFound" if repo in hub.refs else "RepoNotFound")
        files = hub.files[commit]
        if what == "revision":
            return self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if what == "resolve" and path in files:
            return self.answer(files[path], ETag=f'"{sha1(files[path]).hexdigest()}"', X_Repo_Commit=commit)
        if what == "tree" and (inside := [name for name in files if name.startswith(path)]):
            sizes = [{"size": len(files[name]), "oid": sha1(files[name]).hexdigest()} for name in inside]
            return self.answer([{"type": "file", "path": n, **size} for n, size in zip(inside, sizes, strict=True)])
        self.refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, parts = self.server, self.parts()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines() if line] or [{}]
        if parts == ["api", "validate-yaml"]:
            error = card_error(lines[0]["content"])
            return self.answer({"errors": [{"message": error}] if error else []}, 400 if error else 200)
        if not self.headers.get("Authorization", "").startswith("Bearer hf_"):
            return self.refuse("Unauthorized")
        if parts == ["api", "repos", "create"]:
            repo = f"{lines[0]['organization']}/{lines[0]['name']}"
            if repo in hub.refs:
                return self.answer({"url": f"{hub.url}/{repo}"}, 409)
            hub.visibility[repo] = lines[0].get("visibility", "public")
            hub.commit(repo, "main", {".gitattributes": b""})
            return self.answer({"url": f"{hub.url}/{repo}"})
        user, name, what, revision = parts
        refs = hub.refs[f"{user}/{name}"]
        if what == "branch":
            status = 409 if revision in refs else 200
            refs.setdefault(revision, refs["main"])
            return self.answer({}, status)
        if revision not in refs:
            return self.refuse("RevisionNotFound")
        if what == "preupload":  # nothing goes to a store of large files
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": file["path"], **mode} for file in lines[0]["files"]]})
        added = [line["value"] for line in lines if line["key"] == "file"]
        commit = hub.commit(f"{user}/{name}", revision, {f["path"]: base64.b64decode(f["content"]) for f in added})
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{user}/{name}/commit/{commit}"})


def card_error(text: str) -> str | None:
    """What the Hub has against the front matter of a README.md."""
    try:
        bases = yaml.safe_load(text.split("---\n")[1]).get("base_model", [])
    except (IndexError, AttributeError, yaml.YAMLError) as error:
        return f"no valid YAML: {error}"
    wrong = [base for base in bases if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base)]
    return f"base_model: {wrong} are no names" if wrong else None
