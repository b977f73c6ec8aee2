"""As much of a W&B server, on this machine, as `wandb sync` talks to: what wandb's own reader makes of an offline run."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """What was sent. An artifact is known by its collection and digest, as W&B does it: the same files are one version."""

    def __init__(self) -> None:
        self.url = ""
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Log lines by run id."""
        self.runs: dict[str, dict[str, Any]] = {}
        """Group, job type, config and so on, by run id."""
        self.artifacts: dict[str, dict[str, Any]] = {}
        """Versions by id: type, name, digest, the run that made it first."""
        self.edges: list[tuple[str, str]] = []
        """(artifact id, run id): the run starts from the artifact."""
        self.unknown: list[str] = []

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL request."""
        if operation == "UpsertBucket":
            return self._run(variables)
        if operation == "CreateArtifact":
            return self._artifact(variables["input"])
        if operation == "UseArtifact":
            self.edges.append((variables["input"]["artifactID"], variables["input"]["runName"]))
            return {"useArtifact": {"artifact": {"id": variables["input"]["artifactID"]}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            teams: dict[str, Any] = {"edges": []}
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": teams}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            return {"model": None}
        if operation == "ClientIDMapping":
            return {"clientIDMapping": None}
        self.unknown.append(operation)
        return {}

    def _run(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        known = self.runs.setdefault(name, {})
        known.update({key: value for key, value in variables.items() if value is not None})
        project = {"id": "p", "name": "rlhf", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": f"id-{name}", "name": name, "project": project, "config": "{}", "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**bucket, "displayName": known.get("displayName")}, "inserted": True}}

    def _artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        collections = given.get("artifactCollectionNames") or [given.get("artifactCollectionName")]
        key = f"{given['artifactTypeName']}/{collections[0]}/{given['digest']}"
        maker = {"type": given["artifactTypeName"], "name": collections[0], "digest": given["digest"]}
        self.artifacts.setdefault(key, {**maker, "run": given["runName"], "metadata": given.get("metadata")})
        sequence = {"id": "s", "name": collections[0], "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": key, "state": "COMMITTED", "artifactSequence": sequence}}}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """Lines of a run's files."""
        lines = (body.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(json.loads(line) for line in lines)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a free port of this machine, for as long as the block runs."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                raw = gzip.decompress(raw)
            body = json.loads(raw or b"{}")
            answer: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                operation = body.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", body["query"])[0]
                answer = {"data": server.answer(operation, body.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], body)
            self._reply(json.dumps(answer).encode())

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._reply(b"{}")

        def do_GET(self) -> None:
            self._reply(b"{}")

        def do_HEAD(self) -> None:
            self._reply(b"")

        def _reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Not on the test's stderr."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
