"""A model hub on 127.0.0.1: as much of one as huggingface_hub and transformers ask for models, uploads and branches.

hub = FakeHub()
hub.url                                          # for HF_ENDPOINT
hub.commit("user/name", "main", {"a.txt": b"a"})   # -> id of the commit
hub.refs["user/name"]["v1"] = ...                  # a branch or a tag
"""

import base64
import json
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

ERRORS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "Unauthorized": 401, "Conflict": 409}


class FakeHub(ThreadingHTTPServer):
    """Repositories as dicts. Who writes needs a token, any; who reads needs none."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch, tag or commit -> commit
        self.files: dict[str, dict[str, bytes]] = {}  # commit -> path -> content
        self.visibility: dict[str, str] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repo: str, branch: str, added: dict[str, bytes]) -> str:
        refs = self.refs.setdefault(repo, {})
        files = {**self.files.get(refs.get(branch), {}), **added}
        commit = sha1(f"{repo} {len(self.files)}".encode()).hexdigest()
        self.files[commit], refs[branch], refs[commit] = files, commit, commit
        return commit

    def create(self, repo: str, visibility: str) -> None:
        self.visibility[repo] = visibility
        self.commit(repo, "main", {".gitattributes": b""})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

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
        self.answer({"error": code}, ERRORS[code], X_Error_Code=code)

    def do_GET(self) -> None:
        hub, parts = self.server, urlsplit(self.path).path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        user, name, what, revision, *path = [*map(unquote, parts[2 * is_api :]), *[""] * (4 if is_api else 2)][:9]
        repo, path = f"{user}/{name}", "/".join(path).strip("/")
        commit = hub.refs.get(repo, {}).get(revision or "main")
        if repo not in hub.refs or commit is None:
            return self.refuse("RevisionNotFound" if repo in hub.refs else "RepoNotFound")
        files = hub.files[commit]
        if what == "resolve" and path in files:
            return self.answer(files[path], ETag=f'"{sha1(files[path]).hexdigest()}"', X_Repo_Commit=commit)
        if what == "tree" and (not path or any(name.startswith(f"{path}/") for name in files)):
            rows = [(name, content) for name, content in files.items() if name.startswith(path)]
            return self.answer([{"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
                                for name, content in rows])  # fmt: skip
        if what in ("", "revision"):
            return self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        self.refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, parts = self.server, [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines() if line] or [{}]
        if parts[1] == "validate-yaml":
            error = card_error(lines[0]["content"])
            return self.answer({"errors": [{"message": error}] if error else []}, 400 if error else 200)
        if not self.headers.get("Authorization", "").startswith("Bearer hf_"):
            return self.refuse("Unauthorized")
        if parts[1:] == ["repos", "create"]:
            repo = f"{lines[0]['organization'] or 'user'}/{lines[0]['name']}"
            is_new = repo not in hub.refs
            if is_new:
                hub.create(repo, lines[0].get("visibility", "public"))
            return self.answer({"url": f"{hub.url}/{repo}"}, 200 if is_new else 409)
        _, _, user, name, what, revision = parts
        repo = f"{user}/{name}"
        if what == "branch":
            is_new = revision not in hub.refs[repo]
            hub.refs[repo].setdefault(revision, hub.refs[repo]["main"])
            return self.answer({}, 200 if is_new else 409)
        if revision not in hub.refs.get(repo, {}):
            return self.refuse("RevisionNotFound" if repo in hub.refs else "RepoNotFound")
        if what == "preupload":  # nothing goes to a large file storage
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": file["path"], **modes} for file in lines[0]["files"]]})
        added = [line["value"] for line in lines if line["key"] == "file"]
        commit = hub.commit(repo, revision, {file["path"]: base64.b64decode(file["content"]) for file in added})
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}"})


def card_error(text: str) -> str | None:
    """What the Hub would say against the front matter of a README.md."""
    try:
        facts = yaml.safe_load(text.split("---\n")[1])
    except (IndexError, yaml.YAMLError) as error:
        return f"no valid YAML: {error}"
    bases = facts.get("base_model", ["a/b"])
    is_valid = isinstance(bases, list) and bases and all(base.count("/") < 2 and base[0] not in "./" for base in bases)
    return None if is_valid else f"base_model {bases}: wanted names on the Hub"
