"""Who may have how much, as tables."""

from __future__ import annotations

import pytest

from ramster.frontswap.shares import NbdClient, nbd_refusal, region_refusal


def clients(text: str) -> list[NbdClient]:
    """ "32*vm@10.0.0.1" are 32 connections from there to vm; "user 5" stands for nbd.sock; a trailing ! for ours."""
    found = []
    for each in text.split(", ") if text else []:
        count, _, rest = each.rpartition("*")
        export, _, source = rest.partition("@")
        own = source.endswith("!")
        source = source.rstrip("!")
        found += [NbdClient(export, source, source.startswith("user"), own)] * int(count or 1)
    return found


@pytest.mark.parametrize(
    ("limit", "there", "coming", "swap", "refused"),
    [
        (64, "", "vm@10.0.0.1", False, ""),
        (64, "31*vm@10.0.0.1", "vm@10.0.0.1", False, ""),
        (64, "32*vm@10.0.0.1", "vm@10.0.0.2", False, "the export has 32"),
        (64, "32*vm@10.0.0.1", "db@10.0.0.1", False, "10.0.0.1 has 32"),
        (64, "32*vm@10.0.0.1", "db@10.0.0.2", False, ""),
        (64, "32*vm@10.0.0.1, 16*db@10.0.0.2", "web@10.0.0.3", False, "keeps the last 16 of 64 for nbd.sock"),
        (64, "32*vm@10.0.0.1, 16*db@10.0.0.2", "web@user 5", False, ""),
        (64, "32*vm@10.0.0.1, 24*db@user 5", "web@user 6", False, "keeps the last 8 of 64 for what this machine swaps"),
        (64, "32*vm@10.0.0.1, 24*db@user 5", "swap@user 0!", True, ""),
        (64, "32*vm@10.0.0.1, 24*db@user 5", "swap@127.0.0.1", True, "for nbd.sock"),
        (64, "32*swap@127.0.0.1", "swap@user 0!", True, ""),
        (64, "32*vm@10.0.0.1", "vm@user 0!", False, ""),
        (64, "31*vm@user 0!, 1*db@user 0!", "web@user 0!", False, ""),
        (64, "31*vm@user 5, 1*db@user 5", "web@user 5", False, "user 5 has 32"),
        (64, "64*swap@user 0!", "swap@user 0!", True, "serves 64 connections already"),
        (2, "vm@10.0.0.1", "vm@10.0.0.1", False, ""),
        (2, "2*vm@10.0.0.1", "vm@10.0.0.1", False, "serves 2 connections already"),
        (1, "", "vm@10.0.0.1", False, ""),
    ],
)
def test_a_connection_to_an_export(limit: int, there: str, coming: str, swap: bool, refused: str) -> None:
    said = nbd_refusal(limit, clients(there), clients(coming)[0], swap=swap)
    assert refused in said
    assert bool(refused) == bool(said)


@pytest.mark.parametrize(
    ("count", "of_process", "of_user", "own", "refused"),
    [
        (0, 0, 0, False, ""),
        (200, 127, 191, False, ""),
        (200, 128, 128, True, "this process has 128"),
        (200, 1, 192, False, "this user has 192"),
        (200, 1, 192, True, ""),
        (256, 0, 0, True, "this node has 256"),
    ],
)
def test_a_region(count: int, of_process: int, of_user: int, own: bool, refused: str) -> None:
    said = region_refusal(count, of_process, of_user, own=own)
    assert refused in said
    assert bool(refused) == bool(said)
