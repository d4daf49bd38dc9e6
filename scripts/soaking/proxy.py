#!/usr/bin/env python3
"""proxy.py PORT UPSTREAM_PORT: an HTTP proxy for one registry on loopback that damages answers for blobs.

Each line of standard input chooses the fault: its name, or an empty line for none. The proxy ends with its input.
"""

import http.client
import random
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ["corrupt", "cut", "reset", "refuse", "silence", "stall", "slow", "limit", "whole"]
PIECE = 64 << 10
LONGEST_PAUSE = 20

fault = ""


class Handler(BaseHTTPRequestHandler):
    """Forwards requests and damages some of the answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:
            # The client or this server has closed the connection.
            pass

    def do_GET(self):
        now = fault if "/blobs/" in self.path and random.random() < 0.7 else ""
        if now == "silence":
            self.wait()
            return self.hang_up()
        if now == "refuse":
            return self.answer(503)
        if now == "limit":
            return self.answer(429, {"Retry-After": "1"})
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        if now == "whole":
            headers.pop("Range", None)
        upstream = http.client.HTTPConnection("127.0.0.1", UPSTREAM, timeout=60)
        try:
            upstream.request(self.command, self.path, headers=headers)
            self.pass_on(upstream.getresponse(), now)
        finally:
            upstream.close()

    do_HEAD = do_GET

    def pass_on(self, reply, now):
        self.send_response_only(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        length = int(reply.getheader("Content-Length") or 0)
        # Offset in the answer at which the fault happens.
        place = random.randrange(length) if length and now else None
        sent = 0
        while piece := reply.read(PIECE):
            if now == "slow":
                time.sleep(0.2)
            if place is not None and sent <= place < sent + len(piece):
                at = place - sent
                if now == "corrupt":
                    piece = piece[:at] + bytes([piece[at] ^ 0x20]) + piece[at + 1 :]
                elif now in ("cut", "reset", "stall"):
                    self.wfile.write(piece[:at])
                    if now == "stall":
                        self.wait()
                    return self.hang_up(reset=now == "reset")
            self.wfile.write(piece)
            sent += len(piece)

    def answer(self, status, headers=None):
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def wait(self):
        """Waits until the fault is over, or until no client waits any longer."""
        deadline = time.monotonic() + LONGEST_PAUSE
        while fault and time.monotonic() < deadline:
            time.sleep(0.05)

    def hang_up(self, reset=False):
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True


if __name__ == "__main__":
    UPSTREAM = int(sys.argv[2])
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for line in sys.stdin:
        fault = line.strip()
