"""NBD clients that we did not write, against a real node whose pages are mostly on another one."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from ramster.cli import main
from ramster.cluster import identity
from ramster.constants import PAGE_BYTES
from ramster.testing.cluster import Cluster, Node
from ramster.testing.nbd_handshake import Dialled
from ramster.testing.proxy import wait_until

MIB: Final = 1 << 20
TIMEOUT_S: Final = 120.0
# libnbd's Python module belongs to the system's interpreter, not to ours.
SYSTEM_PYTHON: Final = "/usr/bin/python3"


def have_libnbd() -> bool:
    if not Path(SYSTEM_PYTHON).exists():
        return False
    return subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False).returncode == 0


def needs(*commands: str) -> pytest.MarkDecorator:
    # Debian keeps nbd-client where only root looks.
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [command for command in commands if shutil.which(command, path=path) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


libnbd = pytest.mark.skipif(not have_libnbd(), reason="not installed: python3-libnbd")


def run(*command: str, code: int = 0) -> str:
    """What it wrote to standard output; AssertionError with both outputs for another exit code."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    environment.pop("LD_PRELOAD", None)  # a sanitizer's library is for the server alone
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def script(text: str, *arguments: str) -> str:
    """Runs Python with libnbd; `h` is a handle, not connected, `arguments` are in sys.argv[1:]."""
    head = "import errno, nbd, os, sys\nh = nbd.NBD()\n"
    return run(SYSTEM_PYTHON, "-c", head + textwrap.dedent(text), *arguments)


class Export:
    """An export of its own for one test."""

    def __init__(self, node: Node, name: str, size: int) -> None:
        self.node = node
        self.name = name
        made = node.control.create_export(name, size)
        self.size: int = made["size_bytes"]
        self.uri: str = made["uris"][0]
        self.tcp: str = made["uris"][1]

    def shown(self) -> dict[str, Any]:
        return next(each for each in self.node.control.exports() if each["name"] == self.name)

    def left(self) -> None:
        """Until nobody uses it."""
        wait_until(lambda: self.shown()["connections"] == 0, "every client has left")


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Alpha has 8 MiB for pages and serves, beta lends."""
    alpha = {"arena": {"full_wait": "20s"}, "nbd": {"listen": "127.0.0.1:0"}}
    with Cluster({"alpha": alpha, "beta": {"lend": {"size": "96MiB"}}}) as cluster:
        yield cluster.start()


@pytest.fixture
def export(pair: Cluster, request: pytest.FixtureRequest) -> Iterator[Export]:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[-60:].strip("-")
    made = Export(pair["alpha"], name, 48 * MIB)
    yield made
    made.left()
    made.node.control.remove_export(name)
    # What it had on the lender is freed too.
    pair["beta"].wait(lambda status: status["lend"]["frames_used"] == 0, "the lender holds nothing any more")


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """32 MiB that do not compress, four times the arena."""
    path = tmp_path / "noise"
    path.write_bytes(random.Random(7).randbytes(32 * MIB))
    return path


# --- nbdinfo ------------------------------------------------------------------------------------------------------


@needs("nbdinfo")
def test_nbdinfo_shows_what_is_served(export: Export) -> None:
    for uri in (export.uri, export.tcp):
        told = json.loads(run("nbdinfo", "--json", uri))
        assert (told["protocol"], told["structured"], told["TLS"]) == ("newstyle-fixed", True, False)
        (shown,) = told["exports"]
        assert shown["export-name"] == export.name and shown["export-size"] == export.size
        assert shown["contexts"] == ["base:allocation"] and shown["description"] == "48MiB"
        can = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
        assert [shown[f"can_{each}"] for each in can] == [True] * len(can)
        assert not shown["is_read_only"] and not shown["is_rotational"]
        sizes = [shown[f"block_size_{each}"] for each in ("minimum", "preferred", "maximum")]
        assert sizes == [1, 4096, 32 * MIB]


@needs("nbdinfo")
def test_nbdinfo_lists_every_export(pair: Cluster, export: Export) -> None:
    node = pair["alpha"]
    node.control.create_export("second", 4096, read_only=True)
    told = json.loads(run("nbdinfo", "--list", "--json", export.uri))
    assert {each["export-name"]: each["is_read_only"] for each in told["exports"]} == {
        export.name: False,
        "second": True,
    }
    node.control.remove_export("second")


@needs("nbdinfo")
def test_nbdinfo_of_an_unknown_export_fails(export: Export) -> None:
    run("nbdinfo", export.uri.replace(export.name, "nothing"), code=1)


@needs("nbd-client")
def test_nbd_client_lists_every_export(export: Export) -> None:
    host, _, port = export.tcp.removeprefix("nbd://").partition("/")[0].rpartition(":")
    assert export.name in run("nbd-client", "-l", host, port)


@needs("nbd-client")
def test_nbd_client_over_tls(tmp_path: Path) -> None:
    """Debian 12 has 3.24, which knows TLS 1.2 alone."""
    with Cluster(["alpha"]) as cluster:
        alpha = cluster["alpha"]
        with alpha.config.open("a") as config:
            config.write('\n[nbd]\nlisten = ["127.0.0.1:0"]\ntls = "require"\ntls_min = "1.2"\n')
        cluster.start()
        client = identity.add_node(alpha.config.parent, "client")
        uri = alpha.control.create_export("vault", 8 * MIB)["uris"][1]
        host, _, port = uri.removeprefix("nbds://").partition("/")[0].rpartition(":")
        files = {"cacertfile": client.ca, "certfile": client.cert, "keyfile": client.key, "tlshostname": "alpha"}
        tls = [word for key, value in files.items() for word in (f"-{key}", str(value))]
        assert "vault" in run("nbd-client", "-l", host, port, *tls)


@needs("nbdinfo", "qemu-io")
def test_the_map_tells_data_from_holes_before_and_after_a_discard(export: Export) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "write -P 9 2097153 1", export.uri)

    def runs() -> list[tuple[int, int, str]]:
        told = json.loads(run("nbdinfo", "--map", "--json", export.uri))
        return [(each["offset"], each["length"], each["description"]) for each in told]

    assert runs() == [
        (0, MIB, "hole,zero"),
        (MIB, 65536, "data"),
        (MIB + 65536, MIB - 65536, "hole,zero"),
        (2 * MIB, PAGE_BYTES, "data"),
        (2 * MIB + PAGE_BYTES, export.size - 2 * MIB - PAGE_BYTES, "hole,zero"),
    ]
    assert export.shown()["pages_stored"] == 17
    run("qemu-io", "-f", "raw", "-c", "discard 0 48M", export.uri)
    assert runs() == [(0, export.size, "hole,zero")]
    assert export.shown()["pages_stored"] == 0


# --- nbdcopy ------------------------------------------------------------------------------------------------------


@needs("nbdcopy")
@pytest.mark.parametrize("way", ["uri", "tcp"])
def test_nbdcopy_of_noise_in_and_out(export: Export, noise: Path, tmp_path: Path, way: str) -> None:
    uri = export.uri if way == "uri" else export.tcp
    run("nbdcopy", "--connections=4", "--requests=64", "--flush", str(noise), uri)
    shown = export.shown()
    assert shown["pages_stored"] == 8192 and shown["pages_away"] > 8192 - 8 * MIB // PAGE_BYTES
    back = tmp_path / "back"
    run("nbdcopy", "--connections=4", "--requests=64", uri, str(back))
    assert back.read_bytes()[: 32 * MIB] == noise.read_bytes()
    assert back.stat().st_size == export.size and not any(back.read_bytes()[32 * MIB :])
    after = export.shown()
    assert after["pages_remote"] > 0 and after["errors"] == 0 and after["pages_gone"] == 0


@needs("nbdcopy")
def test_a_synchronous_copy_of_a_sparse_file_stores_its_data_alone(export: Export, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    data = random.Random(3).randbytes(256 * 1024)
    with sparse.open("wb") as file:
        file.truncate(export.size)
        for place in (0, 16 * MIB, export.size - len(data)):
            file.seek(place)
            file.write(data)
    run("nbdcopy", "--synchronous", str(sparse), export.uri)
    assert export.shown()["pages_stored"] == 3 * 64
    back = tmp_path / "back"
    run("nbdcopy", "--synchronous", export.uri, str(back))
    assert back.read_bytes() == sparse.read_bytes()
    assert back.stat().st_blocks * 512 < 2 * MIB


# --- libnbd -------------------------------------------------------------------------------------------------------


@libnbd
def test_libnbd_reads_and_writes_whatever_is_aligned_or_not(export: Export) -> None:
    script(
        """
        import random
        h.connect_uri(sys.argv[1])
        size = h.get_size()
        rng, model = random.Random(5), bytearray(1 << 20)
        base = size - len(model)                # up to the last byte
        for _ in range(400):
            offset = rng.randrange(len(model))
            length = min(rng.choice([1, 7, 512, 4095, 4096, 4097, 20000, 100000]), len(model) - offset)
            what = rng.choice(["write", "write", "zero", "trim", "read"])
            if what == "write":
                data = rng.randbytes(length)
                h.pwrite(data, base + offset, rng.choice([0, nbd.CMD_FLAG_FUA]))
                model[offset : offset + length] = data
            elif what == "zero":
                h.zero(length, base + offset, rng.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA]))
                model[offset : offset + length] = bytes(length)
            elif what == "trim":
                h.trim(length, base + offset)   # what it leaves is not defined: define it
                h.zero(length, base + offset)
                model[offset : offset + length] = bytes(length)
            else:
                assert h.pread(length, base + offset) == model[offset : offset + length]
        h.flush()
        assert h.pread(len(model), base) == model
        pieces = []
        take = lambda data, offset, status, error: pieces.append((data, offset)) or 0
        assert h.pread_structured(len(model), base, take, nbd.CMD_FLAG_DF) == model
        assert pieces == [(model, base)]        # in one piece, as asked
        h.cache(len(model), base)
        h.shutdown()
        """,
        export.uri,
    )


@libnbd
def test_libnbd_has_many_requests_in_flight_and_gets_each_answer(export: Export) -> None:
    script(
        """
        h.connect_uri(sys.argv[1])
        pages = 4096
        def wait(room):
            while h.aio_in_flight() > room:
                h.poll(10000)
        def done(error):
            assert error.value == 0, error.value
            return 1
        for i in range(pages):
            buffer = nbd.Buffer.from_bytearray(bytearray(os.urandom(4088) + i.to_bytes(8, "big")))
            h.aio_pwrite(buffer, i * 4096, done)
            wait(64)
        wait(0)
        buffers = {}
        for i in reversed(range(pages)):
            buffers[i] = nbd.Buffer(4096)
            h.aio_pread(buffers[i], i * 4096, done)
            wait(64)
        wait(0)
        for i, buffer in buffers.items():
            assert bytes(buffer.to_bytearray()[4088:]) == i.to_bytes(8, "big"), i
        """,
        export.uri,
    )
    assert export.shown()["errors"] == 0


@libnbd
def test_what_one_connection_flushed_every_other_one_sees(export: Export) -> None:
    script(
        """
        handles = [h] + [nbd.NBD() for _ in range(3)]
        for each in handles:
            each.connect_uri(sys.argv[1])
            assert each.can_multi_conn()
        for i in range(200):
            data = os.urandom(4096)
            handles[i % 4].pwrite(data, i * 512)
            handles[i % 4].flush()
            for each in handles:
                assert each.pread(4096, i * 512) == data
        """,
        export.uri,
    )


@libnbd
def test_requests_that_are_not_valid_get_their_error_and_the_connection_goes_on(export: Export) -> None:
    script(
        """
        h.set_strict_mode(0)
        h.connect_uri(sys.argv[1])
        size = h.get_size()
        def refused(code, call, *arguments):
            try:
                call(*arguments)
            except nbd.Error as error:
                assert error.errnum == code, (error.errnum, code, arguments)
            else:
                raise AssertionError(arguments)
            assert h.pread(1, size - 1) == b"\\0"
        refused(errno.EINVAL, h.pread, 4096, size)
        refused(errno.EINVAL, h.pread, 4097, size - 4096)
        refused(errno.EINVAL, h.pread, 1, 2**63 - 1)
        refused(errno.ENOSPC, h.pwrite, bytes(4097), size - 4096)
        refused(errno.ENOSPC, h.zero, 4096, size)
        refused(errno.EINVAL, h.trim, 4096, size)
        refused(errno.EINVAL, h.pread, 4096, 0, 1 << 5)
        refused(errno.EINVAL, h.pwrite, bytes(512), 0, 1 << 9)
        refused(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
        h.shutdown()
        """,
        export.uri,
    )
    assert export.shown()["pages_stored"] == 0


@libnbd
@needs("nbdcopy", "nbdinfo")
def test_an_export_is_filled_and_then_read_only(export: Export, noise: Path, tmp_path: Path) -> None:
    def turn(option: str) -> None:
        export.left()
        assert main(["export", "set", export.name, option, "--config", str(export.node.config)]) == 0

    def shown() -> Any:
        return json.loads(run("nbdinfo", "--json", export.uri))["exports"][0]

    run("nbdcopy", str(noise), export.uri)
    turn("--read-only")
    assert shown()["is_read_only"] and not shown()["can_trim"] and not shown()["can_zero"]
    run("nbdcopy", str(noise), export.uri, code=1)
    script(
        """
        h.connect_uri(sys.argv[1])
        h.set_strict_mode(0)        # libnbd would not even send it
        for order in (lambda: h.pwrite(bytes(4096), 0), lambda: h.trim(4096, 0), lambda: h.zero(4096, 0)):
            try:
                order()
            except nbd.Error as error:
                assert error.errnum == errno.EPERM, error
            else:
                raise AssertionError("it was written to")
        h.shutdown()
        """,
        export.uri,
    )
    back = tmp_path / "back"
    run("nbdcopy", export.uri, str(back))
    with back.open("rb") as file:
        assert file.read(32 * MIB) == noise.read_bytes()
    turn("--read-write")
    assert not shown()["is_read_only"]
    script("h.connect_uri(sys.argv[1]); h.pwrite(b'new', 4095); assert h.pread(3, 4095) == b'new'", export.uri)


@libnbd
def test_options_one_by_one(export: Export) -> None:
    told = script(
        """
        h.set_opt_mode(True)
        h.connect_uri(sys.argv[1])
        name = sys.argv[2]
        seen = []
        assert h.opt_list(lambda n, text: seen.append((n, text)) or 0) == 1 and seen == [(name, "48MiB")]
        h.set_export_name("nothing")
        try:
            h.opt_info()
        except nbd.Error as error:
            print(error.string)
        h.set_export_name(name)
        h.add_meta_context("base:")
        contexts = []
        assert h.opt_list_meta_context(lambda n: contexts.append(n) or 0) == 1 and contexts == ["base:allocation"]
        h.clear_meta_contexts()
        h.add_meta_context("base:allocation")
        h.opt_info()
        assert h.get_size() == 48 << 20 and h.can_df()
        h.opt_go()
        assert h.can_meta_context("base:allocation")
        runs = []
        h.block_status(1 << 20, 0, lambda c, o, entries, e: runs.extend(entries))
        assert runs[1] == 3, runs
        h.shutdown()
        """,
        export.uri,
        export.name,
    )
    assert "No such file or directory" in told


# --- QEMU ---------------------------------------------------------------------------------------------------------


@needs("qemu-img", "qemu-io")
def test_qemu_converts_an_image_onto_it_and_compares(export: Export, noise: Path) -> None:
    run("qemu-img", "resize", "-f", "raw", str(noise), str(export.size))
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", str(noise), export.uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(noise), export.uri)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 4096 4096", export.uri)
    assert "mismatch at offset 4096" in run(
        "qemu-img", "compare", "-f", "raw", "-F", "raw", str(noise), export.uri, code=1
    )


@needs("qemu-io")
def test_qemu_io_patterns(export: Export) -> None:
    told = run(
        "qemu-io", "-f", "raw",
        "-c", "aio_write -P 1 0 1M", "-c", "aio_write -P 2 1M 1M", "-c", "aio_flush",
        "-c", "write -f -P 3 1M 512", "-c", "write -z 4k 12k", "-c", "write -z -u 32k 1", "-c", "discard 64k 64k",
        "-c", "read -P 1 0 4k", "-c", "read -P 0 4k 12k", "-c", "read -P 1 16k 16k", "-c", "read -P 0 32k 1",
        "-c", "read -P 1 32769 32767", "-c", "read -P 3 1M 512", "-c", "read -P 2 1049088 1048064", "-c", "flush",
        export.uri,
    )  # fmt: skip
    assert "Pattern verification failed" not in told and "error" not in told.lower()


# --- fio ----------------------------------------------------------------------------------------------------------


@needs("fio")
def test_fio_verifies_what_it_wrote(export: Export, tmp_path: Path) -> None:
    if "nbd" not in run("fio", "--enghelp").split():
        pytest.skip("this fio was built without its nbd engine")
    result = tmp_path / "result"
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={export.uri}", "--rw=randwrite", "--bsrange=512-64k",
        "--blockalign=512", "--iodepth=16", "--size=16M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        "--randseed=11", "--buffer_compress_percentage=50", "--output-format=json", f"--output={result}",
        f"--aux-path={tmp_path}",
    )  # fmt: skip
    text = result.read_text()
    told = json.loads(text[text.index("{") :])  # it may say something before
    (job,) = told["jobs"]
    assert job["error"] == 0 and job["write"]["io_bytes"] == 16 * MIB and job["read"]["io_bytes"] == 16 * MIB


# --- TLS ----------------------------------------------------------------------------------------------------------


class Farm:
    """A node that requires TLS, on two addresses of which its certificate has the first, and a client's certificate in
    the folder that libnbd and QEMU read.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.node = cluster["alpha"]
        self.folder = folder
        client = identity.add_client(self.node.config.parent, "client")
        shutil.copytree(client.cert.parent, self.folder)
        self.serve()

    def serve(self) -> None:
        uris = self.node.control.create_export("vault", 8 * MIB)["uris"]
        self.uri, self.other = (f"{uri}?tls-certificates={self.folder}" for uri in uris[1:])
        self.port, self.other_port = (uri.rpartition(":")[2].partition("/")[0] for uri in uris[1:])
        assert self.uri.startswith("nbds://127.0.0.1:") and self.other.startswith("nbds://127.0.0.2:")


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    with Cluster(["alpha"]) as cluster:
        with cluster["alpha"].config.open("a") as config:
            config.write('\n[nbd]\nlisten = ["127.0.0.1:0", "127.0.0.2:0"]\ntls = "require"\n')
        yield Farm(cluster.start(), tmp_path / "client")


@needs("nbdcopy", "nbdinfo")
def test_nbdcopy_over_tls(farm: Farm, tmp_path: Path) -> None:
    assert json.loads(run("nbdinfo", "--json", farm.uri))["TLS"] is True
    data = tmp_path / "data"
    data.write_bytes(random.Random(2).randbytes(6 * MIB))
    run("nbdcopy", "--connections=2", str(data), farm.uri)
    back = tmp_path / "back"
    run("nbdcopy", "--connections=2", farm.uri, str(back))
    assert back.read_bytes()[: 6 * MIB] == data.read_bytes()


@libnbd
def test_libnbd_over_tls_and_not_without(farm: Farm) -> None:
    script(
        """
        h.set_tls(nbd.TLS_REQUIRE)
        h.set_tls_certificates(sys.argv[1])
        h.set_export_name("vault")
        h.connect_tcp("127.0.0.1", sys.argv[2])
        assert h.get_tls_negotiated()
        h.pwrite(b"secret" * 1000, 4000)
        assert h.pread(6000, 4000) == b"secret" * 1000
        h.shutdown()
        for tls in (nbd.TLS_DISABLE, nbd.TLS_REQUIRE):      # in the clear, and without a certificate of its own
            stranger = nbd.NBD()
            stranger.set_tls(tls)
            stranger.set_tls_verify_peer(False)
            stranger.set_export_name("vault")
            try:
                stranger.connect_tcp("127.0.0.1", sys.argv[2])
                stranger.pread(512, 0)
            except nbd.Error as error:
                pass
            else:
                raise AssertionError("it was let in")
        """,
        str(farm.folder),
        farm.port,
    )


@needs("qemu-io")
def test_qemu_over_tls(farm: Farm) -> None:
    told = run(*qemu_io(farm, "127.0.0.1", farm.port), "-c", "write -P 5 0 1M", "-c", "read -P 5 0 1M")
    assert "Pattern verification failed" not in told


def qemu_io(farm: Farm, host: str, port: str) -> list[str]:
    credentials = f"tls-creds-x509,id=tls0,endpoint=client,dir={farm.folder}"
    image = f"driver=nbd,server.type=inet,server.host={host},server.port={port},export=vault,tls-creds=tls0"
    return ["qemu-io", "--object", credentials, "--image-opts", image]


def refused_by(*command: str) -> None:
    """The client ends because of what the certificate says, and not for another reason."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1 and "certificate" in done.stderr.lower(), done.stderr


@needs("nbdinfo", "qemu-io")
def test_clients_refuse_an_address_until_the_certificate_is_renewed_with_it(
    farm: Farm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is for alpha, 127.0.0.1 and not for 127.0.0.2: clients refuse nbds://127.0.0.2:" in farm.node.log
    run("nbdinfo", farm.uri)
    refused_by("nbdinfo", farm.other)
    refused_by(*qemu_io(farm, "127.0.0.2", farm.other_port), "-c", "read 0 4k")
    renew = ["cluster", "renew", "alpha", "--directory", str(farm.node.config.parent)]
    assert main([*renew, "--address", "127.0.0.2", "--address", "localhost"]) == 0
    assert "for alpha, localhost, 127.0.0.2; valid until" in capsys.readouterr().out
    run("nbdinfo", farm.other)  # the same node, which has not been started again
    run("nbdinfo", farm.uri.replace("127.0.0.1", "localhost"))
    run(*qemu_io(farm, "127.0.0.2", farm.other_port), "-c", "read -P 0 0 4k")
    refused_by("nbdinfo", farm.uri)


# --- losses, and the node itself ----------------------------------------------------------------------------------


@libnbd
def test_pages_of_a_lender_that_died_are_errors_and_never_zeros() -> None:
    with Cluster({"alpha": {"arena": {"full_wait": "20s"}}, "beta": {"lend": {"size": "32MiB"}}}) as cluster:
        alpha = cluster.start()["alpha"]
        made = alpha.control.create_export("swap", 24 * MIB)
        uri = made["uris"][0]
        fill = """
            import random
            h.connect_uri(sys.argv[1])
            for i in range(5000):
                h.pwrite(random.Random(i).randbytes(4096), i * 4096)
            """
        script(fill, uri)
        alpha.wait(lambda status: status["exports"][0]["pages_away"] > 2000, "most of it is away")
        cluster["beta"].kill()
        told = script(
            """
            import random
            h.connect_uri(sys.argv[1])
            lost = 0
            for i in range(5000):
                try:
                    data = h.pread(4096, i * 4096)
                except nbd.Error as error:
                    assert error.errnum == errno.EIO, error
                    lost += 1
                else:
                    assert data == random.Random(i).randbytes(4096), i
            data = os.urandom(4096 * 5000)
            h.pwrite(data[:4096], 4999 * 4096)
            assert h.pread(4096, 4999 * 4096) == data[:4096]
            print(lost)
            """,
            uri,
        )
        lost = int(told)
        assert lost > 2000
        alpha.wait(
            lambda status: status["counters"]["nbd_pages_lost"] > 0 and status["exports"][0]["pages_lost"] >= lost,
            "the losses are counted",
        )
        assert re.search(
            r"export swap: page \d+ \(byte \d+\) (is lost|cannot be had), [^;]*; reads of it fail with EIO", alpha.log
        )
        assert alpha.log.count("reads of it fail with EIO") < 50


def test_a_node_with_pages_in_an_export_does_not_stop_unless_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(["alpha"]) as cluster:
        alpha = cluster["alpha"]
        with alpha.config.open("a") as config:
            config.write('\n[[exports]]\nname = "configured"\nsize = "1MiB"\nmax_size = "2MiB"\n')
        cluster.start()
        assert [each["max_bytes"] for each in alpha.control.exports()] == [2 * MIB]
        with Dialled(alpha.run_dir / "nbd.sock") as dialled:
            client = dialled.go("configured")
            client.write(0, b"x" * PAGE_BYTES)
            assert main(["stop", "--config", str(alpha.config)]) == 5
            assert "4 KiB stored in export configured, which 1 connection uses" in capsys.readouterr().err
            assert client.read(0, 4) == b"xxxx"
            assert main(["stop", "--force", "--config", str(alpha.config)]) == 0
            assert "lost: 4 KiB stored in export configured" in capsys.readouterr().err
            assert dialled.closed() == b""
        assert alpha.wait_exit() == 0
        assert "Traceback" not in alpha.log
