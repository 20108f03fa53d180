"""A configuration is read whole, or refused with file, line, key, what was given and what is allowed."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts.docs import DOCS, EXAMPLE, configuration

from ramster.config import Address, Config, load
from ramster.config.knobs import SECTIONS, Arena, knobs
from ramster.config.load import parse
from ramster.errors import ConfigError

NODE = '[node]\nname = "alpha"\nnumber = 0\n'
CLUSTER = '[cluster]\nid = "lab"\nca = "ca.crt"\ncert = "a.crt"\nkey = "a.key"\n'


def read(text: str) -> Config:
    return parse(text, Path("/etc/ramster/node.toml"))


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value)


def test_a_name_and_a_number_are_enough() -> None:
    config = read(NODE)
    assert (config.node.name, config.node.number, config.cluster, config.peers) == ("alpha", 0, None, ())
    assert config.arena == Arena()
    assert config.links.listen == Address("0.0.0.0", 7777)


def test_sizes_and_times_are_in_base_units() -> None:
    config = read(NODE + '[arena]\nsize = "64MiB"\nfull_wait = 250\n[links]\ngive_up = "3s"\nbulk_in_flight = 4\n')
    assert (config.arena.size_bytes, config.arena.full_wait_ms) == (64 << 20, 250)
    assert (config.links.give_up_ms, config.links.bulk_in_flight_segments) == (3000, 4)


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(NODE + 'run_dir = "run"\n' + CLUSTER)
    config = load(file)
    assert config.node.run_dir == tmp_path / "run"
    assert config.cluster is not None
    assert config.cluster.ca == tmp_path / "ca.crt"


def test_peers_are_read_in_order_with_ipv4_and_ipv6() -> None:
    peers = '[[peers]]\nname = "b"\nnumber = 1\naddress = "10.0.0.2:7777"\n'
    peers += '[[peers]]\nname = "c"\nnumber = 2\naddress = "[fd00::2]:7778"\n'
    config = read(NODE + CLUSTER + peers)
    assert [str(peer.address) for peer in config.peers] == ["10.0.0.2:7777", "[fd00::2]:7778"]


def test_exports_are_read_in_order_and_one_address_is_a_list_of_one() -> None:
    exports = '[[exports]]\nname = "b"\nsize = "1GiB"\n[[exports]]\nname = "a"\nsize = 1\nmax_size = "1MiB"\n'
    config = read(NODE + '[nbd]\nlisten = "127.0.0.1:10809"\n' + exports)
    assert [(each.name, each.size_bytes, each.max_size_bytes) for each in config.exports] == [
        ("b", 1 << 30, None),
        ("a", 1, 1 << 20),
    ]
    assert config.nbd.listen == (Address("127.0.0.1", 10809),)
    assert read(NODE + '[nbd]\nlisten = ["127.0.0.1:1", "[::1]:2"]\n').nbd.listen[1].loopback
    assert read(NODE + CLUSTER + '[nbd]\nlisten = "[::]:10809"\n').nbd.listen == (Address("::", 10809),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NODE + '[arena]\nsise = "1GiB"\n', 'node.toml:5: arena.sise = "1GiB": no such key; did you mean size?'),
        (NODE + "[arenas]\n", "node.toml:4: arenas: no such section; did you mean arena?"),
        (NODE + '\n[arena]\nsize = "64MB"\n', 'node.toml:6: arena.size = "64MB": allowed is a size such as "64MiB"'),
        (NODE + '[arena]\nsize = "1MiB"\n', 'node.toml:5: arena.size = "1MiB": allowed is 4MiB or more'),
        (NODE + '[arena]\nlock = "yes"\n', 'node.toml:5: arena.lock = "yes": allowed are true and false'),
        (NODE + "[arena]\nfull_wait = true\n", "node.toml:5: arena.full_wait = true: allowed is a time"),
        (NODE + "[remotify]\nhigh = 75\n", "node.toml:5: remotify.high = 75: allowed is 0.0 to 0.98"),
        (NODE + '[region]\npoison = "no"\n', 'node.toml:5: region.poison = "no": allowed is "auto" or "guard"'),
        (NODE + '[links]\nlisten = "host:1"\n', 'node.toml:5: links.listen = "host:1": allowed is "IPv4:port"'),
        (NODE + '[links]\nlisten = "1.2.3.4:70000"\n', 'listen = "1.2.3.4:70000": allowed is "IPv4:port"'),
        ('[node]\nname = "a b"\nnumber = 1\n', 'node.toml:2: node.name = "a b": allowed are 1 to 63 of a-z'),
        ('[node]\nname = "a"\nnumber = 255\n', "node.toml:3: node.number = 255: allowed is 0 to 254"),
        ('[node]\nname = "a"\n', "node.toml:1: node.number: missing; allowed is integer: 0 to 254"),
        ("", "node.toml:1: node.name: missing"),
        ('node = "a"\n', 'node.toml:1: node = "a": allowed is a section that begins with [node]'),
        (NODE + "[peers]\n", "node.toml:4: peers: allowed are tables that begin with [[peers]]"),
        (NODE + "[exports]\n", "node.toml:4: exports: allowed are tables that begin with [[exports]]"),
        (NODE + '[[exports]]\nname = "a b"\nsize = 1\n', 'node.toml:5: exports[0].name = "a b": allowed are 1 to 63'),
        (NODE + '[[exports]]\nname = "a"\n', "node.toml:4: exports[0].size: missing; allowed is size: 1B to 16TiB"),
        (NODE + '[nbd]\nlisten = ["127.0.0.1:1", 5]\n', 'node.toml:5: nbd.listen = ["127.0.0.1:1", 5]: allowed is'),
        (NODE + '[nbd]\ntls = "off"\n', 'node.toml:5: nbd.tls = "off": allowed is "auto" or "require"'),
        (NODE + "[arena\n", "node.toml:4: not TOML:"),
        (NODE + "arena = { size = 5 }\n", "node.toml:4: node.arena = "),
    ],
)
def test_a_mistake_is_named_with_line_key_value_and_what_is_allowed(text: str, expected: str) -> None:
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[arena]\nsegment = "192KiB"\n', '5: arena.segment = "192KiB": allowed is a power of two'),
        ("[arena]\nsize = 5000000\n", "5: arena.size = 5000000: allowed are multiples of segment, such as 4864KiB"),
        ('[arena]\nsegment = "1MiB"\n', '5: arena.segment = "1MiB": allowed is 64KiB to 256KiB'),
        ('[links]\ngive_up = "1s"\n', "4: links.request_deadline: allowed is give_up, 1s, or less"),
        ('[links]\ngive_up = "2s"\nreconnect_max = "1100ms"\n', "6: links.reconnect_max = "),
        ('[links]\nreconnect_max = "5s"\n', 'reconnect_max = "5s": allowed is half of give_up, 2500ms, or less'),
        ("[remotify]\nlow = 0.8\n", "5: remotify.low = 0.8: allowed is high, 0.75, or less"),
        ('[nbd]\nlisten = "10.0.0.1:1"\n', '5: nbd.listen = "10.0.0.1:1": 10.0.0.1:1 is served with TLS only'),
        ('[nbd]\nlisten = "127.0.0.1:1"\ntls = "require"\n', "5: nbd.listen = "),
        (
            '[[exports]]\nname = "a"\nsize = 8192\nmax_size = 4096\n',
            "7: exports[0].max_size = 4096: allowed is size, 8KiB",
        ),
        (
            '[[exports]]\nname = "a"\nsize = 1\nallow = "web"\n',
            '7: exports[0].allow = "web": allowed with a [cluster] section',
        ),
        (
            CLUSTER + '[[exports]]\nname = "a"\nsize = 1\nallow = ["web", "We b"]\n',
            'exports[0].allow = ["web", "We b"]: allowed are names, each 1 to 63',
        ),
        (2 * '[[exports]]\nname = "a"\nsize = 1\n', '8: exports[1].name = "a": another export has this name too'),
        ('[lend]\nsize = "1GiB"\n', "4: lend: needs a [cluster] section"),
        (
            CLUSTER + '[[peers]]\nname = "alpha"\nnumber = 3\naddress = "1.1.1.1:1"\n',
            '10: peers[0].name = "alpha": this',
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(text: str, expected: str) -> None:
    assert expected in refusal(NODE + text)


def test_a_run_dir_too_long_for_a_socket_is_refused() -> None:
    assert "because a socket's path is limited" in refusal(NODE + f'run_dir = "/{"x" * 100}"\n')


def test_every_mistake_is_reported_in_the_order_of_the_file() -> None:
    lines = refusal('[node]\nname = ""\nnumber = -1\n[lend]\nsiz = 1\n').splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "5"]


def test_a_file_that_is_not_there_or_no_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="larger than"):
        load("/dev/zero")


@given(st.text(alphabet='[]node.peers="1ab\n #{},\\', max_size=60))
def test_whatever_stands_in_the_file_is_accepted_or_refused_and_nothing_else(text: str) -> None:
    try:
        read(text)
    except ConfigError as error:
        assert "/etc/ramster/node.toml:" in str(error)


def test_a_configuration_cannot_be_changed() -> None:
    config: Any = read(NODE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.arena.size_bytes = 1


def test_every_default_is_allowed() -> None:
    for cls in SECTIONS.values():
        for key, field, knob in knobs(cls):
            if field.default not in (dataclasses.MISSING, None):
                written = tomllib.loads(f"value = {default_toml(field.default, knob.show(field.default))}")["value"]
                assert knob.parse(written) == field.default, key


def default_toml(default: object, shown: str) -> str:
    return shown if isinstance(default, bool | float) or shown.isdigit() or shown[0] in '"[' else f'"{shown}"'


def test_every_knob_has_help_that_is_a_sentence() -> None:
    for cls in SECTIONS.values():
        for key, _, knob in knobs(cls):
            assert knob.help.endswith("."), key


def test_the_document_has_exactly_the_knobs_of_the_code() -> None:
    assert (DOCS / "configuration.md").read_text() == configuration(), "run make docs"


def test_the_documented_example_is_accepted() -> None:
    assert read(EXAMPLE).peers[0].name == "beta"
