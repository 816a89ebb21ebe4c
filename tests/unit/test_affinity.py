"""Ranks of a job are bound to cores where that helps: on Ascend cards, all of which belong to the job."""

import types

import pytest
import torch

from common import distributed


class Started(Exception):
    pass


def affinity(monkeypatch, ranks, cards, device="npu", **variables):
    """Return CPU_AFFINITY_CONF as `ranks` ranks would see it on a host with so many cards."""

    def start(args):
        raise Started

    monkeypatch.setattr(distributed, "end_with_parent", lambda: None)
    monkeypatch.setattr(distributed, "_node_0", start)
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(device_count=lambda: cards), raising=False)
    environment = dict(variables)
    monkeypatch.setattr(distributed.os, "environ", environment)
    args = types.SimpleNamespace(device=device, device_list=None, device_num=ranks, max_restarts=0)
    with pytest.raises(Started):
        distributed.spawn(args, [])
    return environment.get("CPU_AFFINITY_CONF")


@pytest.mark.parametrize("ranks, cards, variables, expected", [
    (8, 8, {}, "1"),
    (4, 8, {}, None),
    (2, 2, {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}, None),  # a part of the host, under other numbers
    (8, 8, {"CPU_AFFINITY_CONF": "0"}, "0"),
])  # fmt: skip
def test_a_job_with_all_cards_has_its_threads_near_them(ranks, cards, variables, expected, monkeypatch):
    assert affinity(monkeypatch, ranks, cards, **variables) == expected


def test_the_driver_is_asked_which_cores_are_near_where_it_can_be(monkeypatch):
    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: None)
    assert affinity(monkeypatch, 8, 8) == "1,npu_affine:1"


def test_other_devices_are_left_alone(monkeypatch):
    assert affinity(monkeypatch, 8, 8, device="cuda") is None
