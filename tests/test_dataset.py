"""Shards read and split as the stages need them, and a download that takes nothing half-written for data."""

import functools
import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUIET, ROOT

from nanochat_lib.common import NanochatError
from nanochat_lib.dataset import LAST_SHARD, REPOSITORY, deal, read_texts, row_groups, shard_paths, text_batches


def write_shard(path, texts, group=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path):
    """Three shards of seven, five and three documents."""
    for name, texts in (("shard_00000", "abcdefg"), ("shard_00001", "hijkl"), ("shard_06542", "xyz")):
        write_shard(tmp_path / "data" / f"{name}.parquet", list(texts))
    return tmp_path / "data"


def read(folder, split="train", **where):
    return [text for texts, _ in text_batches(folder, split, **where) for text in texts]


def test_last_shard_is_validation(folder):
    assert [path.stem for path in shard_paths(folder, "train")] == ["shard_00000", "shard_00001"]
    assert "".join(read(folder)) == "abcdefghijkl"
    assert "".join(read(folder, "val")) == "xyz"
    positions = [position for _, position in text_batches(folder, "train")]
    assert positions == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]


def test_start_goes_on_where_a_run_stopped(folder):
    assert "".join(read(folder, start=(0, 2))) == "efghijkl"
    assert "".join(read(folder, start=(1, 0))) == "hijkl"
    assert read(folder, start=(9, 0)) == []


@pytest.mark.parametrize("split, world_size", [("train", n) for n in (1, 2, 3, 5, 7, 8, 12)]
                         + [("val", n) for n in (1, 2, 3)])
def test_ranks_read_every_document_once(folder, split, world_size):
    parts = [read(folder, split, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(sum(parts, [])) == sorted("abcdefghijkl" if split == "train" else "xyz")
    assert all(parts), "a rank without a document waits for ever"


def test_fewer_documents_than_ranks_is_an_error(folder):
    with pytest.raises(NanochatError, match="3 documents in .* for 4 processes"):
        deal(row_groups(folder, "val"), 0, 4)


def test_lone_shard_is_split_and_said_so(tmp_path, capsys):
    write_shard(tmp_path / "one.parquet", [str(i) for i in range(40)])
    train, val = read(tmp_path, "train"), read(tmp_path, "val")
    assert (len(train), val) == (36, ["36", "37", "38", "39"]) and not set(train) & set(val)
    assert "one shard only: the last 2 of 20 row groups" in capsys.readouterr().out


def test_lone_row_group_is_split_by_rows(tmp_path, capsys):
    write_shard(tmp_path / "one.parquet", list("abcde"), group=100)
    assert ("".join(read(tmp_path, "train")), "".join(read(tmp_path, "val"))) == ("abcd", "e")
    assert "the last 1 of 5 documents" in capsys.readouterr().out
    parts = [read(tmp_path, "train", rank=rank, world_size=3) for rank in range(3)]
    assert sorted(sum(parts, [])) == list("abcd")


def test_lone_document_is_an_error(tmp_path):
    write_shard(tmp_path / "one.parquet", ["a"])
    with pytest.raises(NanochatError, match="too few"):
        read(tmp_path)


def test_missing_and_empty_folders_name_the_commands(base_dir, tmp_path):
    for data_dir in ("", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NanochatError, match="nanochat_lib.dataset -n 8.*world/shards.*nanochat_lib.world"):
            shard_paths(data_dir)
    write_shard(base_dir / "world" / "shards" / "shard_0.parquet", list("ab"))
    with pytest.raises(NanochatError, match=f"give --data-dir {base_dir}/world/shards"):
        shard_paths("")


def test_torn_shard_is_named(folder, base_dir):
    torn = folder / "shard_00001.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(NanochatError, match="shard_00001.parquet is not a whole parquet file.*nanochat_lib.dataset"):
        read(folder)
    torn.write_bytes(b"")
    with pytest.raises(NanochatError, match="shard_00001.parquet is not a whole"):
        read(folder)
    world = base_dir / "world" / "shards" / "shard_00000.parquet"
    world.parent.mkdir(parents=True)
    world.write_bytes(b"PAR1")
    with pytest.raises(NanochatError, match="delete it and run python -m nanochat_lib.world"):
        read(world.parent)


def test_damage_inside_a_shard_is_named(tmp_path):
    path = tmp_path / "shard_00000.parquet"
    write_shard(path, ["some text " * 50] * 4)
    write_shard(tmp_path / "shard_00001.parquet", ["validation"])
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(NanochatError, match="shard_00000.parquet, row group 0, is damaged"):
        read(tmp_path)


def test_shard_without_text_is_named(folder):
    pq.write_table(pa.table({"content": ["a"]}), folder / "shard_00001.parquet")
    with pytest.raises(NanochatError, match="no column `text` of strings, only content"):
        read(folder)
    pq.write_table(pa.table({"text": [1]}), folder / "shard_00001.parquet")
    with pytest.raises(NanochatError, match="no column `text` of strings"):
        read(folder)


def test_unknown_split(folder):
    with pytest.raises(NanochatError, match="it is train or val"):
        shard_paths(folder, "test")


def test_reads_the_real_format(shared_data):
    folder = shared_data / "public_domain_text"
    assert [path.stem for path in shard_paths(folder, "val")] == ["shard_06542"]
    assert sum(len(read_texts(unit)) for unit in row_groups(folder, "train")) == 775 + 776


# --- the download, against a hub on 127.0.0.1 that misbehaves on request ---


class Hub(ThreadingHTTPServer):
    """Serves shards as the hub does. `faults[name]` is used up one a request: 503, "break", "torn", "stall" "reset" or 404.

    "head" is a 503 to the question for a file's size. A stalled answer stops half-way and sets `stalled`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.faults, self.ranges, self.asked, self.stalled = {}, [], [], threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


@functools.cache
def shard_bytes(name):
    """A shard of 0.1 MB; shard_00001 has 24 MB, more than the two chunks of 10 MB that a resumed download needs."""
    text = "x" * (800_000 if name == "shard_00001" else 3_000)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{name} {i} {text}" for i in range(30)]}), buffer, compression="none",
                   use_dictionary=False)
    return buffer.getvalue()


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        match = re.fullmatch(f"/datasets/{REPOSITORY}/resolve/main/(shard_[0-9]+).parquet", self.path)
        name = match and match[1]
        if not name:
            return self.reply(200 if self.path == "/" else 404, b"")
        faults = self.server.faults.get(name, [])
        if faults and (faults[0] == "head") != body:
            fault = faults.pop(0)
        else:
            fault = 404 if faults and faults[0] == 404 else None
        data = shard_bytes(name)
        if body:
            self.server.asked.append(name)
        if fault in (503, 404, "head"):
            return self.reply(404 if fault == 404 else 503, b"")
        if fault == "reset":  # closed so, a socket answers with RST instead of an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault == "torn":  # the length and the tag fit what is served: only the footer tells
            data = data[:-100] + b"\0" * 100
        first = 0
        if given := self.headers.get("Range"):
            first = int(re.match(r"bytes=(\d+)-", given)[1])
            self.server.ranges.append(first)
        self.reply(206 if first else 200, data[first:], body, broken=fault in ("break", "stall", "reset"), total=len(data), first=first)
        if fault == "stall":
            self.server.stalled.set()
            time.sleep(60)

    def reply(self, status, data, body=True, broken=False, total=0, first=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data[: len(data) * 2 // 3] if broken else data)
        if broken:
            self.close_connection = True
            self.wfile.flush()


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(run_module, base_dir, hub):
    """fetch("-n", 2) runs the command against the local hub."""
    def run(*args, **env):
        return run_module("nanochat_lib.dataset", *args, timeout=100,
                          env={"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **env})
    return run


def finished(base_dir):
    return sorted(path.stem for path in (base_dir / "base_data_climbmix").glob("*.parquet"))


def test_download_survives_a_bad_hub(fetch, hub, base_dir):
    hub.faults = {"shard_00000": ["head", 503], "shard_00001": ["break"], "shard_00002": ["torn"]}
    result = fetch("-n", 3, "-w", 4)
    assert result.returncode == 0, result.stderr
    assert finished(base_dir) == ["shard_00000", "shard_00001", "shard_00002", f"shard_{LAST_SHARD:05d}"]
    for path in (base_dir / "base_data_climbmix").glob("*.parquet"):
        assert path.read_bytes() == shard_bytes(path.stem)
    assert hub.ranges and min(hub.ranges) > 0, "a broken download goes on where it broke off"
    hub.asked.clear()
    again = fetch("-n", 3)
    assert again.returncode == 0 and "all 4 shards are in" in again.stdout and not hub.asked


def test_download_survives_a_connection_that_is_reset(fetch, hub, base_dir):
    hub.faults = {"shard_00001": ["reset"]}
    result = fetch("-n", 2)
    assert result.returncode == 0, result.stderr
    assert (base_dir / "base_data_climbmix" / "shard_00001.parquet").read_bytes() == shard_bytes("shard_00001")


def test_killed_in_the_middle_it_leaves_no_half_file_and_goes_on(hub, base_dir):
    hub.faults = {"shard_00001": ["stall"]}
    env = {**os.environ, **QUIET, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "nanochat_lib.dataset", "-n", "2", "-w", "4"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as process:
        assert hub.stalled.wait(90)
        time.sleep(0.3)
        process.kill()
    assert "shard_00001" not in finished(base_dir)
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    for name in ("shard_00000", "shard_00001", f"shard_{LAST_SHARD:05d}"):
        assert (base_dir / "base_data_climbmix" / f"{name}.parquet").read_bytes() == shard_bytes(name)


def test_torn_file_never_takes_its_name(fetch, hub, base_dir):
    hub.faults = {"shard_00000": ["torn"] * 50}
    result = fetch("-n", 1)
    assert result.returncode == 1
    assert "1 of 2 shards arrived (shard_00000.parquet: arrives torn): run the same command again" in result.stderr
    assert finished(base_dir) == [f"shard_{LAST_SHARD:05d}"]
    hub.faults = {}
    (base_dir / "base_data_climbmix" / f"shard_{LAST_SHARD:05d}.parquet").write_bytes(b"PAR1 torn later")
    assert fetch("-n", 1).returncode == 0, "the next call fetches what is missing or torn"
    assert len(finished(base_dir)) == 2


def test_missing_file_ends_in_one_line(fetch, hub):
    hub.faults = {"shard_00001": [404] * 50}
    result = fetch("-n", 2)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "shard_00001.parquet" in result.stderr.splitlines()[-1]


def test_offline_is_said_in_seconds(fetch, hub):
    begin = time.monotonic()
    refused = fetch("-n", 2, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - begin < 15
    assert refused.returncode == 1 and "error: cannot reach http://127.0.0.1:9" in refused.stderr
    switched_off = fetch("-n", 2, HF_HUB_OFFLINE="1")
    assert switched_off.returncode == 1 and "error: HF_HUB_OFFLINE is set" in switched_off.stderr
    nothing = fetch("-n", 0)
    assert nothing.returncode == 1 and "ask for at least one shard" in nothing.stderr
