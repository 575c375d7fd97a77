"""A small Cloud Storage server on loopback, for real clients: gcsfs, google-cloud-storage and tensorstore.

It serves the JSON API: objects are written whole (in one request, or in a resumable session that ends), have a generation, and are read by
ranges, listed by prefix and delimiter, copied, composed and deleted, each under preconditions. There is no rename, no append and no folder.
"""

import base64
import hashlib
import json
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Object(NamedTuple):
    content: bytes
    generation: int


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Store:
    """The buckets of a server.

    `closed` holds the buckets that nobody may touch, `undescribed` those whose description nobody may read. `log` holds method and
    object of every request, and `before` is called with both before the request is served.
    """

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.closed: set[str] = set()
        self.undescribed: set[str] = set()
        self.before: Callable[[str, str], None] = lambda method, name: None
        self.sessions: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.log: list[tuple[str, str]] = []
        self.lock, self.count, self.url = threading.RLock(), 1000, ""

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def read(self, bucket: str, name: str) -> bytes:
        with self.lock:
            return self.buckets[bucket][name].content

    def bucket(self, name: str) -> dict[str, Object]:
        if name in self.closed:
            raise Refused(403, f"the caller does not have storage.objects.create access to bucket {name}")
        if name not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def found(self, bucket: str, name: str, given: dict[str, str]) -> Object:
        there = self.bucket(bucket).get(name)
        if there is None or given.get("generation", str(there.generation)) != str(there.generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        self.check(there, given)
        return there

    def check(self, there: Object | None, given: dict[str, str]) -> None:
        now = 0 if there is None else there.generation
        if "ifGenerationMatch" in given and int(given["ifGenerationMatch"]) != now:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in given and int(given["ifGenerationNotMatch"]) == now:
            raise Refused(304, "Not modified")

    def write(self, bucket: str, name: str, content: bytes, given: dict[str, str]) -> dict[str, Any]:
        with self.lock:
            objects = self.bucket(bucket)
            self.check(objects.get(name), given)
            self.count += 1
            objects[name] = Object(bytes(content), self.count)
            return described(bucket, name, objects[name])


def crc32c(content: bytes) -> str:
    import google_crc32c

    return base64.b64encode(struct.pack(">I", google_crc32c.value(content))).decode()


def described(bucket: str, name: str, there: Object) -> dict[str, Any]:
    stamp = "2026-01-01T00:00:00.000Z"
    return {
        "kind": "storage#object", "id": f"{bucket}/{name}/{there.generation}", "name": name, "bucket": bucket,
        "generation": str(there.generation), "metageneration": "1", "size": str(len(there.content)), "storageClass": "STANDARD",
        "contentType": "application/octet-stream", "timeCreated": stamp, "updated": stamp, "etag": f"e{there.generation}",
        "md5Hash": base64.b64encode(hashlib.md5(there.content).digest()).decode(), "crc32c": crc32c(there.content),
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: Store

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def do_DELETE(self) -> None:
        self.answer("DELETE")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, method: str) -> None:
        content = self.body()
        try:
            status, answer, headers = route(self.store, method, self.path, {k.lower(): v for k, v in self.headers.items()}, content)
        except Refused as e:
            error = {"code": e.status, "message": str(e), "errors": [{"message": str(e), "reason": "refused", "domain": "global"}]}
            status, answer, headers = e.status, b"" if e.status == 304 else json.dumps({"error": error}).encode(), {}
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(answer))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)


Answer = tuple[int, bytes, dict[str, str]]


def route(store: Store, method: str, target: str, headers: dict[str, str], content: bytes) -> Answer:
    url = urlsplit(target)
    given = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
    if url.path == "/batch/storage/v1":
        return batch(store, headers, content)
    found = re.fullmatch(r"/(?:upload/|download/)?(?:storage/v1/)?b/([^/]+)(?:(/o)/?(.*))?", url.path)
    if not found:
        raise Refused(400, f"no such call: {url.path}")
    bucket, objects, rest = unquote(found[1]), found[2], found[3] or ""
    name = unquote(rest)
    with store.lock:
        if url.path.startswith("/upload/"):
            name = uploaded(store, given, headers, content)
        store.log.append((method, f"{bucket}/{name}"))
        store.before(method, f"{bucket}/{name}")
        if url.path.startswith("/upload/"):
            return upload(store, method, bucket, given, headers, content)
        if not objects:
            store.bucket(bucket)
            if bucket in store.undescribed:
                raise Refused(403, f"the caller does not have storage.buckets.get access to bucket {bucket}")
            about = {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US", "locationType": "region"}
            return ok(about | {"storageClass": "STANDARD", "metageneration": "1"})
        if not name:
            return listing(store, bucket, given)
        if method == "DELETE":
            store.found(bucket, name, given)
            del store.buckets[bucket][name]
            return 204, b"", {}
        if method == "POST":
            return made(store, bucket, rest, given, content)
        there = store.found(bucket, name, given)
        return media(there, headers) if given.get("alt") == "media" else ok(described(bucket, name, there))


def ok(value: Any) -> Answer:
    return 200, json.dumps(value).encode(), {}


def listing(store: Store, bucket: str, given: dict[str, str]) -> Answer:
    objects, prefix, delimiter = store.bucket(bucket), given.get("prefix", ""), given.get("delimiter", "")
    items: list[tuple[str, bool]] = []
    for name in sorted(objects):
        if not name.startswith(prefix) or name < given.get("startOffset", "") or ("endOffset" in given and name >= given["endOffset"]):
            continue
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        entry = (name, False) if cut < 0 else (name[: cut + 1], True)
        if entry not in items[-1:]:
            items.append(entry)
    start, most = int(given.get("pageToken") or 0), int(given.get("maxResults") or 1000)
    page = items[start : start + most]
    found: dict[str, Any] = {"kind": "storage#objects", "prefixes": [name for name, folder in page if folder]}
    found["items"] = [described(bucket, name, objects[name]) for name, folder in page if not folder]
    return ok(found | ({"nextPageToken": str(start + most)} if start + most < len(items) else {}))


def media(there: Object, headers: dict[str, str]) -> Answer:
    content, size = there.content, len(there.content)
    sent = {"Content-Type": "application/octet-stream", "ETag": f'"e{there.generation}"', "x-goog-generation": str(there.generation)}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
    if not asked:
        return 200, content, sent | {"x-goog-hash": f"crc32c={crc32c(content)}"}
    first, last = asked.groups()
    begin = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= size and not (size == 0 and not begin):
        raise Refused(416, "Requested range not satisfiable")
    return 206, content[begin:end], sent | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}


def uploaded(store: Store, given: dict[str, str], headers: dict[str, str], content: bytes) -> str:
    """The name of the object that a request writes."""
    if "upload_id" in given:
        return store.sessions[given["upload_id"]][1]
    about = parts(headers, content)[0] if given["uploadType"] == "multipart" else content
    return given.get("name") or json.loads(about)["name"]


def upload(store: Store, method: str, bucket: str, given: dict[str, str], headers: dict[str, str], content: bytes) -> Answer:
    if method == "PUT" or "upload_id" in given:
        bucket, name, conditions, held = store.sessions[given["upload_id"]]
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("content-range", "bytes *"))
        if content:
            begin = int(found[1]) if found and found[1] else len(held)
            held[begin:] = content
        if found and (found[3] == "*" or len(held) < int(found[3])):  # the session goes on; nothing of the object is seen
            return 308, b"", {"Range": f"bytes=0-{len(held) - 1}"} if held else {}
        del store.sessions[given["upload_id"]]
        return ok(store.write(bucket, name, held, conditions))
    name = uploaded(store, given, headers, content)
    if given["uploadType"] == "multipart":
        return ok(store.write(bucket, name, parts(headers, content)[1], given))
    if given["uploadType"] == "resumable":
        store.bucket(bucket)
        store.check(store.buckets[bucket].get(name), given)
        store.count += 1
        session = f"session{store.count}"
        store.sessions[session] = (bucket, name, given, bytearray())
        return 200, b"{}", {"Location": f"{store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"}
    return ok(store.write(bucket, name, content, given))


def parts(headers: dict[str, str], content: bytes) -> list[bytes]:
    """The bodies of a multipart message, to the byte."""
    boundary = re.search(r'boundary="?([^";]+)"?', headers["content-type"])
    assert boundary
    between = b"--" + boundary[1].encode()
    return [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r") for part in content.split(between)[1:-1]]


def made(store: Store, bucket: str, rest: str, given: dict[str, str], content: bytes) -> Answer:
    """Copies an object, or composes one of others."""
    if copied := re.fullmatch(r"(.+)/(rewriteTo|copyTo)/b/([^/]+)/o/(.+)", rest):
        there = store.found(bucket, unquote(copied[1]), {})
        about = store.write(unquote(copied[3]), unquote(copied[4]), there.content, given)
        done = {"kind": "storage#rewriteResponse", "done": True, "resource": about, "objectSize": about["size"]}
        return ok(about if copied[2] == "copyTo" else done | {"totalBytesRewritten": about["size"]})
    composed = re.fullmatch(r"(.+)/compose", rest)
    if not composed:
        raise Refused(400, f"no such call: {rest}")
    sources = [store.found(bucket, one["name"], {}).content for one in json.loads(content)["sourceObjects"]]
    return ok(store.write(bucket, unquote(composed[1]), b"".join(sources), given))


def batch(store: Store, headers: dict[str, str], content: bytes) -> Answer:
    answers, mark = [], "batch_answer"
    for i, part in enumerate(parts(headers, content)):
        method, target = part.split(b" ")[:2]
        try:
            status, body, _ = route(store, method.decode(), target.decode(), {}, b"")
        except Refused as e:
            status, body = e.status, json.dumps({"error": {"code": e.status, "message": str(e)}}).encode()
        head = f"--{mark}\r\nContent-Type: application/http\r\nContent-ID: <response-{i + 1}>\r\n\r\nHTTP/1.1 {status} X\r\n"
        answers.append(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body.decode()}\r\n")
    return 200, f"{''.join(answers)}--{mark}--\r\n".encode(), {"Content-Type": f"multipart/mixed; boundary={mark}"}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed, or that closes its connection in the middle of an answer


@contextmanager
def serving(*buckets: str) -> Iterator[Store]:
    """A server with these buckets, at `store.url`, until the end of the context."""
    store = Store(*buckets)
    server = Server(("127.0.0.1", 0), type("Own", (Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
