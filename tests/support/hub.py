"""A Hub on loopback: one model repository with branches, as huggingface_hub asks for it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath

MODEL = "owner/student"


@dataclass
class Hub:
    """`branches` is each branch's commit, `files` what every commit holds; `asked` the files that were fetched."""

    branches: dict[str, str]
    files: dict[str, bytes]
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.branches.values() else self.branches.get(revision)


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = PurePosixPath(self.path.partition("?")[0]).parts
            if parts[1] == "api":
                self.tell(hub.commit_of(parts[6] if len(parts) > 6 else "main"), "tree" in parts)
            else:
                self.give(hub.commit_of(parts[4]), "/".join(parts[5:]))

        def tell(self, commit: str | None, tree: bool) -> None:
            names = [{"rfilename": name} for name in hub.files]
            model = {"id": MODEL, "modelId": MODEL, "sha": commit, "siblings": names}
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{commit}-{name}"}
                for name, data in hub.files.items()
            ]
            self.answer(commit, json.dumps(entries if tree else model).encode())

        def give(self, commit: str | None, name: str) -> None:
            if self.command == "GET" and commit:
                hub.asked.append((commit, name))
            self.answer(commit if name in hub.files else None, hub.files.get(name, b""), f'"{commit}-{name}"')

        def answer(self, commit: str | None, body: bytes, tag: str = '"none"') -> None:
            self.send_response(200 if commit else 404)
            headers = {"X-Repo-Commit": commit or "", "ETag": tag, "Content-Length": str(len(body))}
            if not commit:
                headers |= {"X-Error-Code": "RevisionNotFound"}
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
