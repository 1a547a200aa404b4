"""What all tests share. The files beside this one are made by tools/export_tests.py."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # numbers as a processor computes them

import fastcore.test
import pytest
import torch
from hypothesis import settings

for name, helper in vars(fastcore.test).items():  # test_eq and the others are helpers, not tests
    if name.startswith("test_") and callable(helper):
        helper.__test__ = False

settings.register_profile("llava_cot", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("llava_cot")
torch.set_num_threads(min(2, torch.get_num_threads()))  # tiny models gain nothing from more


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; runs with --slow or -m slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
